"""Configurations of the packed products: the table, files of them, and kernels that are launched with other ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import FormatError
from bqnn.kernels import configs
from bqnn.kernels.configs import CONFIG_FIELDS, ENVIRONMENT, Launch
from bqnn.ops._packed import PRECISIONS
from bqnn.ops.packed_conv2d import packed_conv2d
from bqnn.ops.packed_linear import packed_linear
from bqnn.packed import PackedConv2d, PackedLinear
from tests import test_packed_conv2d
from tests.helpers import triton_devices
from tests.test_packed_linear import make_case

DEVICES = triton_devices("packed_linear")

PRODUCT = {"kernel": "product", "BM": 32, "BN": 32, "BW": 16, "UNROLLED": True, "num_warps": 4, "num_stages": 2}
PRODUCT |= {"most_splits": 1}
LAUNCH = Launch("packed_linear", "sm_90", "bf16", 2, "tensor", 2, 64, 4096, 4096)
ENTRY: dict[str, Any] = {**LAUNCH._asdict(), "config": PRODUCT, "seconds": 1e-5, "default_seconds": 2}


@pytest.fixture(autouse=True)
def no_tuned_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests install is forgotten after them; the environment names no file."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    for name in ("table", "tuned", "trial"):
        monkeypatch.setattr(configs._State, name, None)


def text_of(*entries: Any, **others: Any) -> str:
    return json.dumps({"version": 1, "tuned": list(entries), **others})


def test_a_file_is_read() -> None:
    gemv = {"kernel": "gemv", "BN": 2, "BW": 512, "num_warps": 4}
    other = LAUNCH._replace(rows=1)
    assert configs.parse(text_of(ENTRY, {**other._asdict(), "config": gemv})) == {LAUNCH: PRODUCT, other: gemv}
    assert configs.parse(text_of()) == {}


def changed(**fields: Any) -> dict[str, Any]:
    return {**ENTRY, **fields}


def with_config(**fields: Any) -> dict[str, Any]:
    return changed(config={**PRODUCT, **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "this is no JSON", id="empty"),
        pytest.param('{"version": 1, "tuned": [', "this is no JSON", id="cut"),
        pytest.param("[]", "a list 'tuned' is needed, got \\[\\]", id="list"),
        pytest.param('{"version": 1}', "a list 'tuned' is needed", id="no-list"),
        pytest.param(text_of(version=2), "version must be 1, got 2", id="version"),
        pytest.param(text_of(rule={}), "the unknown field 'rule'", id="field"),
        pytest.param(text_of(3), "tuned\\[0\\] must be an object, got 3", id="entry"),
        pytest.param(text_of(ENTRY, changed(op="conv")), "tuned\\[1\\]: op can not be 'conv'", id="op"),
        pytest.param(text_of(changed(architecture="H200")), "architecture can not be 'H200'", id="architecture"),
        pytest.param(text_of(changed(precision="fp8")), "precision can not be 'fp8'", id="precision"),
        pytest.param(text_of(changed(bits=3)), "bits can not be 3", id="bits"),
        pytest.param(text_of(changed(x_bytes=True)), "x_bytes can not be True", id="bool-for-int"),
        pytest.param(text_of(changed(rows=100)), "rows can not be 100", id="rows"),
        pytest.param(text_of(changed(columns=4096.0)), "columns can not be 4096.0", id="float-for-int"),
        pytest.param(text_of(changed(seconds=-1)), "seconds can not be -1", id="seconds"),
        pytest.param(text_of(changed(seconds=float("nan"))), "seconds can not be nan", id="nan"),
        pytest.param(text_of(changed(card="H200")), "has the unknown field 'card'", id="entry-field"),
        pytest.param(text_of({"op": "packed_linear"}), "tuned\\[0\\] has no 'architecture'", id="missing"),
        pytest.param(text_of(changed(config=[])), "config must have a kernel, one of gemv, product", id="config"),
        pytest.param(text_of(with_config(kernel="spmv")), "config must have a kernel", id="kernel"),
        pytest.param(text_of(with_config(kernel=["gemv"])), "config must have a kernel", id="kernel-list"),
        pytest.param(text_of(with_config(BM=24)), "config: BM can not be 24", id="BM"),
        pytest.param(text_of(with_config(BN=8)), "config: BN can not be 8", id="BN"),
        pytest.param(text_of(with_config(UNROLLED=1)), "config: UNROLLED can not be 1", id="int-for-bool"),
        pytest.param(text_of(with_config(num_warps=3)), "config: num_warps can not be 3", id="warps"),
        pytest.param(text_of(with_config(num_stages=0)), "config: num_stages can not be 0", id="stages"),
        pytest.param(text_of(with_config(maxnreg=64)), "config has the unknown field 'maxnreg'", id="config-field"),
        pytest.param(text_of(changed(precision="int8")), "BW must be 32 or more for 'int8', got 16", id="int8"),
        pytest.param(
            text_of(changed(op="packed_conv2d", config={"kernel": "gemv", "BN": 1, "BW": 16, "num_warps": 1})),
            "kernel can not be 'gemv' for packed_conv2d",
            id="gemv-conv2d",
        ),
        pytest.param(text_of(ENTRY, ENTRY), "tuned\\[1\\] is for the same launches as an entry before", id="twice"),
    ],
)
def test_what_is_wrong_with_a_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "configs.json").write_text(text)
    with pytest.raises(FormatError, match=f"configs.json: .*{message}"):
        bqnn.load_configs(tmp_path / "configs.json")
    assert not configs._State.tuned


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bqnn.load_configs(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\x80\x04\x95")
    with pytest.raises(FormatError, match="binary: this is no JSON"):
        bqnn.load_configs(tmp_path / "binary")


def test_the_environment_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs.json").write_text(text_of(ENTRY))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "configs.json"))
    assert configs.find(lambda: LAUNCH) == PRODUCT
    assert configs.find(lambda: LAUNCH._replace(architecture="sm_80")) is None
    configs.install({LAUNCH: {**PRODUCT, "num_warps": 8}})
    assert configs.find(lambda: LAUNCH)["num_warps"] == 8
    monkeypatch.setattr(configs._State, "table", None)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        configs.find(lambda: LAUNCH)


def test_the_checked_in_table() -> None:
    table = json.loads(configs.TABLE.read_text())
    assert set(table) == {"version", "rule", "candidates", "tuned"}
    configs.parse(json.dumps({name: table[name] for name in ("version", "tuned")}))
    for precision in PRECISIONS:
        rows = [tile["BM"] for tile in configs.rule(precision)]
        assert rows == sorted(set(rows))
        assert rows[0] == 16
        for tile in configs.candidates(precision):
            assert all(configs.TILE_FIELDS[name](value) for name, value in tile.items())


@pytest.mark.parametrize("architecture", [80, 90, 100], ids=lambda architecture: f"sm_{architecture}")
def test_every_candidate_may_stand_in_a_file(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_linear = pytest.importorskip("bqnn.kernels.packed_linear", reason="Triton is not installed")
    monkeypatch.setattr(packed_linear, "architecture", lambda: architecture)
    for op in configs.OPS:
        for precision, x_bytes in (("fp32", 4), ("fp32", 2), ("bf16", 2), ("int8", 1)):
            for rows in (1, 2, 16, 64, 1024):
                for bits in (1, 2, 4):
                    for codebooks in configs.CODEBOOKS:
                        launch = Launch(op, f"sm_{architecture}", precision, bits, codebooks, x_bytes, rows, 64, 64)
                        found = packed_linear.candidates(launch)
                        entries = [{**launch._asdict(), "config": config} for config in found]
                        assert [configs.parse(text_of(entry)) for entry in entries] == [{launch: c} for c in found]
                        assert len(found) > 1
                        assert all(set(c) == {"kernel", *CONFIG_FIELDS[c["kernel"]]} for c in found)


def launches_of(call: Any) -> Launch:
    with configs.trial() as trial:
        call()
    (launch,) = trial.launches
    return launch


class Spy:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launched = kernel, []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> Any:
            self.launched.append(keywords)
            return self.kernel[grid](*arguments, **keywords)

        return launch


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Spy]:
    linear = pytest.importorskip("bqnn.kernels.packed_linear")
    conv2d = pytest.importorskip("bqnn.kernels.packed_conv2d")
    found = {}
    for module, name in (
        (linear, "packed_linear_gemv_kernel"),
        (linear, "packed_linear_fwd_kernel"),
        (conv2d, "packed_conv2d_fwd_kernel"),
    ):
        found[name] = Spy(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_product_with_every_candidate(rows: int, precision: str, device: str, spies: dict[str, Spy]) -> None:
    linear = pytest.importorskip("bqnn.kernels.packed_linear")
    x, codes, levels, bias, _ = make_case(3, "tensor", rows, 3 if rows < 4 else 17, 260)
    exact = packed_linear(x, codes, levels, bias, precision, backend="reference")
    here = [tensor.to(device) for tensor in (x, codes, levels, bias)]

    def run() -> Tensor:
        return packed_linear(*here, precision, backend="triton").cpu()

    launch = launches_of(run)
    assert launch[-3:] == (1 << (rows - 1).bit_length(), 4 if rows < 4 else 32, 512)
    candidates = linear.candidates(launch)
    assert {config["kernel"] for config in candidates} == ({"gemv", "product"} if rows < 4 else {"product"})
    for config in candidates:
        with configs.trial(launch, config):
            y = run()
        if precision == "int8":
            assert torch.equal(y, exact)
        else:
            assert (y - exact).norm() <= 1e-5 * exact.norm(), config
        gemv = config["kernel"] == "gemv"
        used = spies["packed_linear_gemv_kernel" if gemv else "packed_linear_fwd_kernel"].launched[-1]
        assert {name: used[name] for name in config if name in used} == {
            name: value for name, value in config.items() if name not in ("kernel", "most_splits")
        }


@pytest.mark.parametrize("device", DEVICES)
def test_a_tuned_configuration_is_for_its_launches_alone(device: str, spies: dict[str, Spy]) -> None:
    launched = spies["packed_linear_fwd_kernel"].launched

    def tile(rows: int, num_levels: int = 3, granularity: str = "tensor") -> tuple[int, int]:
        x, codes, levels, bias, _ = make_case(num_levels, granularity, rows, 37, 300)
        y = packed_linear(*(tensor.to(device) for tensor in (x, codes, levels, bias)), backend="triton")
        expected = packed_linear(x, codes, levels, bias, backend="reference")
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
        return launched[-1]["BM"], launched[-1]["BN"]

    x, codes, levels, bias, _ = make_case(3, "tensor", 6, 37, 300)
    launch = launches_of(lambda: packed_linear(x.to(device), codes.to(device), levels.to(device), backend="triton"))
    before = tile(6)
    configs.install({launch: {**PRODUCT, "BN": 128}})
    assert before == (16, 64)
    assert [tile(rows) for rows in (4, 5, 8, 9)] == [before, (32, 128), (32, 128), before]
    assert tile(6, num_levels=5) == before
    assert tile(6, granularity="channel") == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_every_candidate(groups: int, device: str, spies: dict[str, Spy]) -> None:
    linear = pytest.importorskip("bqnn.kernels.packed_linear")
    x, codes, levels, bias, _ = test_packed_conv2d.make_case(3, "tensor", (1, 6 * groups, 4 * groups), (3, 2), groups)
    x = x[:, :, :4, :5]
    arguments = ((3, 2), 1, 1, 1, groups, "int8")
    expected = packed_conv2d(x, codes, levels, bias, *arguments, backend="reference")
    here = [tensor.to(device) for tensor in (x, codes, levels, bias)]
    launch = launches_of(lambda: packed_conv2d(*here, *arguments, backend="triton"))
    assert (launch.op, launch.rows, launch.channels, launch.columns) == ("packed_conv2d", 32, 8, 32)
    for config in linear.candidates(launch):
        with configs.trial(launch, config):
            assert torch.equal(packed_conv2d(*here, *arguments, backend="triton").cpu(), expected)
        used = spies["packed_conv2d_fwd_kernel"].launched[-1]
        assert (used["BM"], used["num_stages"]) == (config["BM"], config["num_stages"])


def small_net(device: str) -> tuple[nn.Module, Tensor]:
    """A convolution and a linear layer that the backend "triton" runs, and what they take."""
    _, codes, levels, bias, _ = test_packed_conv2d.make_case(3, "tensor", (1, 6, 4), 2)
    conv2d = PackedConv2d(4, 2, codes, levels, bias, precision="int8", execution="packed", relu=True)
    _, codes, levels, bias, _ = make_case(3, "channel", 1, 2, 12)
    linear = PackedLinear(12, codes, levels, bias, "int8", "packed")
    x = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(conv2d, nn.Flatten(), linear).to(device), x.to(device)


class Timer:
    """Seconds that fall from call to call, so that the last configuration of a layer is the fastest; or do not."""

    def __init__(self, falling: bool) -> None:
        self.falling, self.calls = falling, 0

    def __call__(self, call: Any) -> float:
        call()
        self.calls += 1
        return 1.0 / self.calls if self.falling else 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_autotune_saves_what_is_faster(device: str, tmp_path: Path, spies: dict[str, Spy]) -> None:
    linear = pytest.importorskip("bqnn.kernels.packed_linear")
    net, x = small_net(device)
    expected = net(x)
    timer = Timer(falling=True)
    tuning = bqnn.autotune(net, x, timer=timer)
    assert [row.launch["op"] for row in tuning] == ["packed_conv2d", "packed_linear"]
    launches = [Launch(**row.launch) for row in tuning]
    candidates = [linear.candidates(launch) for launch in launches]
    assert [row.config for row in tuning] == [of_layer[-1] for of_layer in candidates]
    assert timer.calls == sum(map(len, candidates)) + 2
    assert all(row.seconds < row.default_seconds for row in tuning)
    assert str(tuning).splitlines()[2].startswith("packed_linear  int8")
    # They take effect at once, and where the file is loaded.
    net[2].execution = "packed"  # forgets its layout
    assert torch.equal(net(x), expected)
    assert spies["packed_linear_gemv_kernel"].launched[-1]["BN"] != 0
    tuning.save(tmp_path / "configs.json")
    assert configs.read(tmp_path / "configs.json") == {
        launch: row.config for launch, row in zip(launches, tuning, strict=True)
    }
    configs._State.table = configs._State.tuned = None
    assert configs.find(lambda: launches[0]) is None
    bqnn.load_configs(tmp_path / "configs.json")
    assert configs.find(lambda: launches[0]) == tuning[0].config
    # The same launches are not measured twice.
    timer.calls = 0
    assert len(bqnn.autotune(nn.Sequential(*net, nn.Identity()), x, x, timer=timer)) == 2
    assert timer.calls == sum(map(len, candidates)) + 2


@pytest.mark.parametrize("device", DEVICES)
def test_autotune_keeps_the_rule_where_nothing_is_faster(device: str, tmp_path: Path) -> None:
    net, x = small_net(device)
    tuning = bqnn.autotune(net, x, timer=Timer(falling=False))
    assert tuning == []
    tuning.save(tmp_path / "empty.json")
    bqnn.load_configs(tmp_path / "empty.json")


@pytest.mark.parametrize("device", DEVICES)
def test_autotune_leaves_out_what_computes_something_else(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("bqnn.kernels.packed_linear")
    real = linear.splits_of

    def wrong_where_one_part_is_asked_for(*arguments: Any) -> tuple[int, int]:
        splits, span = real(*arguments)
        return (splits, span // 2) if arguments[-1] == 1 else (splits, span)

    monkeypatch.setattr(linear, "splits_of", wrong_where_one_part_is_asked_for)
    _, codes, levels, bias, _ = make_case(3, "tensor", 1, 9, 600)
    x = torch.randn(20, 600, device=device)
    for precision in ("fp32", "int8"):
        layer = PackedLinear(600, codes, levels, bias, precision, "packed").to(device)
        (row,) = bqnn.autotune(layer, x, timer=Timer(falling=True))
        assert row.config["most_splits"] > 1


@pytest.mark.parametrize("device", DEVICES)
def test_autotune_leaves_out_what_spills_or_does_not_fit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("bqnn.kernels.packed_linear")
    net, x = small_net(device)
    real_compiled = configs.compiled
    with monkeypatch.context() as patch:
        spilled = SimpleNamespace(n_spills=2)
        patch.setattr(configs, "compiled", lambda kernel: real_compiled(spilled))
        assert bqnn.autotune(net, x, timer=Timer(falling=True)) == []
    real = linear.configuration

    def too_large(*arguments: Any) -> dict[str, Any]:
        config = real(*arguments)
        if configs._State.trial is not None and configs._State.trial.forced:
            raise linear.LaunchError("out of shared memory")
        return config

    monkeypatch.setattr(linear, "configuration", too_large)
    assert bqnn.autotune(net, x, timer=Timer(falling=True)) == []


def test_autotune_says_why_it_can_not_run() -> None:
    layer = copy.deepcopy(small_net("cpu")[0][2])
    with pytest.raises(bqnn.BackendError, match="autotune needs a GPU to measure on, and its input is on cpu"):
        bqnn.autotune(layer, torch.zeros(1, 12))
    with pytest.raises(ValueError, match="inputs must be one or more, got none"):
        bqnn.autotune(layer)
    if not DEVICES:
        with pytest.raises(bqnn.BackendError, match="the Triton kernels, which can not run here: .*on cpu"):
            bqnn.autotune(layer, torch.zeros(1, 12), timer=Timer(falling=True))
