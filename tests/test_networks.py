"""The bench of whole networks: what it compares is right, what is wrong or absent is not timed, rows are kept."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bench import bench_networks, interleaved, network_memory, networks
from bench.interleaved import LEAST_ROUNDS, Pace, Race
from bench.network_rivals import CHANNELS_LAST, COMPILED, RIVALS
from bench.networks import OURS, NetworkGroup
from bqnn.packed import rates
from bqnn.packed.cost import Rates
from bqnn.packed.probes import LINEAR_CHANNELS, rates_key
from tests.support.packed_products import relative_error


def tiny_network() -> nn.Module:
    convolution = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(8 * 4 * 4, 10))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    network = networks.Network("Tiny", tiny_network, (3, 8, 8), (1, 4))
    monkeypatch.setitem(networks.NETWORKS, "tiny", network)
    networks.forget()
    yield "tiny"
    networks.forget()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetworkGroup, "pace", Pace(0.0, 0.0, 0.0))


def test_every_variant_is_right_or_says_why_not(tiny: str) -> None:
    variants = [*networks.rivals_of(tiny, compiled=False), *OURS]
    race = Race(NetworkGroup(tiny, 3), variants, timed=False)
    assert {type(failure) for failure in race.failures.values()} <= {pytest.skip.Exception}, race.failures
    assert {"torch fp32", "torch fp32 nhwc", "bqnn fp32", "bqnn bf16", "bqnn int8"} <= set(race.infos)
    for variant, info in race.infos.items():
        is_exact = "fp32" in variant
        assert info["distance"] < (1e-5 if is_exact else 0.1), variant
        assert info["distance"] > 1e-4 or is_exact or variant.startswith(networks.ENGINE), f"{variant} does not round"
        assert info["top1"] == 1.0 or not is_exact


def test_rivals_that_are_installed_run(tiny: str) -> None:
    """Both libraries, at two batches from one export."""
    pytest.importorskip("openvino"), pytest.importorskip("nncf"), pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    variants = [name for name in RIVALS if name.startswith(("onnxruntime", "openvino")) and "bf16" not in name]
    for batch in (1, 4):
        assert set(Race(NetworkGroup(tiny, batch), variants, timed=False).infos) == set(variants)
    x = networks.images(tiny, 4, 0)
    for variant in variants:
        call = networks.rivals(tiny).call(variant, x)
        first = call().clone()
        x.mul_(-1.0)
        assert not torch.equal(call(), first), f"{variant} does not read its input again"
    assert sys.modules["openvino_telemetry"] is None


def test_the_reference_of_ours_has_the_levels_of_the_packed_network(tiny: str) -> None:
    decoded = networks._decoded(tiny)
    convolution, norm = decoded[0], decoded[1]
    assert len(convolution.weight.unique()) == networks.NUM_LEVELS and convolution.weight.dtype == torch.float64
    assert not torch.equal(norm.running_mean, networks.fpnn(tiny)[1].running_mean.double())
    x = networks.images(tiny, 5, 9)
    with torch.no_grad():
        assert relative_error(bqnn.pack(networks.quantized(tiny))(x), decoded(x.double())) < 1e-5


def test_what_is_wrong_is_not_timed(tiny: str) -> None:
    group = NetworkGroup(tiny, 3)
    right = group.call("torch fp32")().detach()
    for variant in ("torch fp32", "onnxruntime fp32", "openvino bf16"):
        with pytest.raises(AssertionError, match=f"{variant}: relative error"):
            group.check(variant, right.flip(0))
    with pytest.raises(AssertionError, match="bqnn int8: relative error"):
        group.check("bqnn int8", -group.call("bqnn fp32")().detach())
    flipped = group.check("openvino int8", right.flip(0))
    assert flipped["distance"] > 0.1


def test_the_engine_gets_the_packed_network_and_batches_for_int8(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile(net: nn.Module, example: Tensor, precision: str, calibration: list[Tensor] | None) -> nn.Module:
        asked.append((precision, calibration is not None, any(isinstance(m, bqnn.PackedConv2d) for m in net.modules())))
        return net

    monkeypatch.setattr(bqnn, "compile", compile, raising=False)
    variants = [name for name in OURS if name.startswith(networks.ENGINE)]
    assert set(Race(NetworkGroup(tiny, 2), variants, timed=False).infos) == set(variants)
    assert asked == [("fp32", False, True), ("bf16", False, True), ("int8", True, True)]


def test_a_network_of_vectors_has_no_memory_format() -> None:
    assert not set(CHANNELS_LAST) & set(networks.rivals_of("mlp"))
    assert set(networks.rivals_of("lenet5")) == set(RIVALS)
    assert set(RIVALS) - set(networks.rivals_of("lenet5", compiled=False)) == set(COMPILED)


def test_one_network_from_the_command_line(
    tiny: str, hurried: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, chosen = tmp_path / "rows.jsonl", ["torch fp32", "bqnn fp32", "bqnn compiled bf16"]
    options = ["--net", tiny, "--rounds", "3", "--out", str(out), "--variants", *chosen]
    networks.main(options)
    networks.main([*options, "--batch", "2"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ran = ["torch fp32", "bqnn fp32", *(["bqnn compiled bf16"] if hasattr(bqnn, "compile") else [])]
    assert [(row["batch"], row["variant"]) for row in rows] == [(b, name) for b in (1, 4, 2) for name in ran]
    assert all(row["network"] == tiny and row["seconds"] > 0.0 and row["rounds"] == 3 for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("network tiny, batch") == 3
    assert printed.count("torch fp32 takes") == 3
    with pytest.raises(SystemExit):
        networks.main([*options, "--rounds", "1"])


def test_every_network_has_its_claims() -> None:
    medians: dict[str, dict[str, float]] = {}
    for case in bench_networks.cases(compiled=True):
        net, batch, variant = case.values
        medians.setdefault(networks.group_name(net, batch), {})[variant] = 1.0 if variant in OURS else 2.0
    claims = list(bench_networks.claims(medians))
    assert [claim.measured for claim in claims] == [2.0] * len(medians) and len(medians) == 21
    assert not list(bench_networks.claims({name: {} for name in medians}))


@pytest.mark.parametrize("asked", [False, True], ids=["default", "compiled"])
def test_compiling_is_asked_for(asked: bool) -> None:
    found: list[Any] = []
    config = SimpleNamespace(getoption=lambda name, default: asked)
    metafunc = SimpleNamespace(config=config, parametrize=lambda names, cases: found.extend(cases))
    bench_networks.pytest_generate_tests(metafunc)  # type: ignore[arg-type]
    assert {case.values[0] for case in found} == set(networks.NETWORKS)
    assert {case.values[2] for case in found} == {*RIVALS, *OURS} - (set() if asked else set(COMPILED))


def test_a_visit_has_its_warm_calls() -> None:
    calls: list[None] = []
    slow = 1.0  # a call that takes so long is not made until threads and caches have settled
    interleaved._visit(lambda: calls.append(None), slow, Pace(0.0, 1.0, 0.0, warm=2))
    assert len(calls) == 3


def test_rounds_may_be_fewer() -> None:
    times = interleaved.interleaved_seconds({"it": lambda: None}, 0.0, Pace(0.0, 0.0, 0.0), least_rounds=4)
    assert len(times["it"]) == 4 < LEAST_ROUNDS


@pytest.fixture
def packed_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To new processes too, which find it in their file of rates: what "auto" does is not measured."""
    monkeypatch.setenv(rates.ENVIRONMENT, str(tmp_path))
    rates.remember(
        {
            rates_key("packed_linear", 3, "fp32", channels, execution, threads): Rates(1e-6, (1,), (seconds,))
            for execution, seconds in (("packed", 1e-12), ("dense", 1e-11))
            for channels in LINEAR_CHANNELS
            for threads in range(1, (os.cpu_count() or 1) + 1)
        }
    )


def test_the_memory_of_a_network_is_that_of_its_weights_and_activations(packed_is_faster: None) -> None:
    """The MLP has 80.1 MB of weights, at M = 3 a twentieth of that; its activations take 2 x 4 KiB x 4 an image."""
    if not network_memory.CLEAR.exists():
        pytest.skip("this system does not tell the peak")
    found = {
        variant: network_memory.measure_apart("mlp", 16, variant) for variant in ("torch fp32", "bqnn compiled fp32")
    }
    plain, packed = found.values()
    assert isinstance(plain, network_memory.Memory) and isinstance(packed, network_memory.Memory), found
    assert 80e6 <= plain.held <= plain.peak <= 120e6
    assert 4e6 <= packed.held <= packed.peak <= 40e6
    lines = list(network_memory.lines({**found, "absent": "not installed"}))
    assert lines[1].endswith("  1.00") and lines[3].split(maxsplit=1) == ["absent", "not installed"]
    assert float(lines[2].split()[-1]) == pytest.approx(plain.peak / packed.peak, abs=0.01)
