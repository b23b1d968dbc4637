"""``python -m bench.tables [MACHINE ...]``: README's tables, from the files of bench/results/.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Its machines are those of the one line
``<!-- machines: NAME ... -->``, names of files, which the arguments replace: `make bench` writes the file of the
machine at hand and prints its name. Tests compare README with the files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import accuracy_mlp as mlp
from bench import (
    bench_lenet5,
    bench_networks,
    bench_packed_conv2d,
    bench_packed_linear,
    bench_training,
    claims_lenet5,
    heterogeneous_lenet5,
)
from bench import uncertainty_lenet5 as lenets
from bench.machine import RESULTS
from bench.networks import NETWORKS, group_name
from bench.summary import DISTURBED, fastest, times_faster
from bqnn.core.codes import packed_width
from bqnn.models import lenet5

README = Path(__file__).resolve().parent.parent / "README.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MACHINES = re.compile(r"<!-- machines: (.*?) -->")

Groups = Mapping[str, dict[str, Any]]
Lines = Iterator[str]


def render(readme: str, machines: Sequence[str], folder: Path = RESULTS) -> str:
    """The text of README with its tables, and the line of its machines, made anew."""
    results = [json.loads((folder / f"{name}.json").read_text()) for name in machines]

    def table(found: re.Match[str]) -> str:
        name = found[2]
        if name in OF_A_MACHINE:
            lines = [line for result in results for line in _of_machine(result, name)]
        else:
            lines = list(OF_A_FILE[name](folder))
        return "\n".join([found[1].rstrip("\n"), *lines, found[3]])

    return TABLE.sub(table, MACHINES.sub(f"<!-- machines: {' '.join(machines)} -->", readme))


def machines_of(readme: str) -> list[str]:
    """The machines whose tables ``readme`` shows."""
    found = MACHINES.search(readme)
    return found[1].split() if found else []


def _of_machine(result: dict[str, Any], name: str) -> Lines:
    groups = {key: group for key, group in result["groups"].items() if group["bench"] in BENCHES[name]}
    if not groups:
        return
    machine = result["machine"]
    family, model, _ = machine["cpu_family_model_stepping"]
    dates = sorted({group["date"] for group in groups.values()})
    torches = sorted({group["versions"]["torch"] for group in groups.values()})
    elsewhere = max(group["elsewhere"] or 0.0 for group in groups.values())
    disturbed = f", while something else took up to {elsewhere:.0%} of the cores" if elsewhere > DISTURBED else ""
    yield ""
    yield (
        f"{machine['cpu']} (family {family}, model {model}), {machine['cpu_isa']}, {machine['threads']} threads, "
        f"torch {', '.join(torches)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}{disturbed}:"
    )
    yield ""
    yield from OF_A_MACHINE[name](groups)
    yield ""


def _header(*cells: str) -> Lines:
    yield _line(cells)
    yield "|---" * len(cells) + "|"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _medians(groups: Groups, name: str) -> dict[str, float]:
    return {variant: row["seconds"] for variant, row in groups.get(name, {"rows": {}})["rows"].items()}


def _times(
    groups: Groups, label: str, names: Sequence[str], variants: Sequence[str], baselines: Sequence[str]
) -> Lines:
    """A row: in each group the fastest of ``variants``, in ms and times faster than the fastest of ``baselines``; no
    row where no group has one."""
    cells = []
    for name in names:
        medians = _medians(groups, name)
        ratio = times_faster(medians, variants, baselines)
        fastest = min((medians[variant] for variant in variants if variant in medians), default=None)
        cells.append("" if fastest is None or ratio is None else f"{_ms(fastest)} ({_ratio(ratio)})")
    if any(cells):
        yield _line([label, *cells])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10.0 else f"{ratio:.2f}"


def packed_linear(groups: Groups) -> Lines:
    """Everything that ran on the large layer."""
    bench = bench_packed_linear
    names = [bench.group_name(bench.LARGE, batch) for batch in bench.LARGE_BATCHES]
    yield from _header("{} x {}".format(*bench.LARGE), *(f"batch {batch}" for batch in bench.LARGE_BATCHES))
    for rival in bench.RIVALS:
        yield from _times(groups, rival, names, [rival], bench.BASELINES)
    for num_levels in (3, 16):
        for variant in bench.ours(num_levels, ("packed",)):
            label = f"**M = {num_levels}, {variant.split()[1]}**"
            yield from _times(groups, label, names, [variant], bench.BASELINES)


def packed_linear_odd(groups: Groups) -> Lines:
    """The other layers, as "auto" runs them."""
    bench = bench_packed_linear
    yield from _header("M = 3", *(f"batch {batch}" for batch in bench.ODD_BATCHES))
    for shape in bench.ODD:
        names = [bench.group_name(shape, batch) for batch in bench.ODD_BATCHES]
        for label, variants in (
            ("torch fp32", bench.BASELINES),
            ("fp32", bench.ours(3, ("auto",), ("fp32",))),
            ("the best of fp32, bf16, int8", bench.ours(3, ("auto",))),
        ):
            yield from _times(groups, f"{shape[0]} x {shape[1]}, {label}", names, variants, bench.BASELINES)


def packed_conv2d(groups: Groups) -> Lines:
    """Each layer against both of torch's dtypes."""
    bench = bench_packed_conv2d
    yield from _header("M = 3", *(f"batch {batch}" for batch in bench.BATCHES))
    for shape in bench.WIDE + bench.NARROW:
        names = [bench.group_name(shape, batch) for batch in bench.BATCHES]
        layer = f"{shape.inputs} to {shape.outputs}, {shape.kernel}x{shape.kernel} on {shape.size}x{shape.size}"
        for label, variants in (
            ("torch fp32", bench.BASELINES),
            ("torch bf16", [bench.TORCH_BF16]),
            ("fp32", bench.ours(("fp32",), "nchw", "nhwc")),
            ("the best of bf16 and int8", bench.ours(("bf16", "int8"), "nchw", "nhwc")),
            ("the same, bfloat16 images", bench.ours(("bf16", "int8"), "bf16-nhwc")),
        ):
            yield from _times(groups, f"{layer}, {label}", names, variants, bench.BASELINES)


def network(groups: Groups) -> Lines:
    """LeNet-5: the full-precision network, then the packed one."""
    bench = bench_lenet5
    yield from _header("LeNet-5", *(f"batch {batch}" for batch in bench.BATCHES))
    names = [f"lenet5, batch {batch}" for batch in bench.BATCHES]
    for variant in bench.FPNN:
        yield from _times(groups, variant.replace("fpnn", "FPNN"), names, [variant], bench.BASELINES)
    for variant in bench.PACKED:
        precision, execution = variant.split()
        if execution != "packed":
            label = f"**packed {precision}**" if execution == "auto" else f"**packed {precision}, compiled**"
            yield from _times(groups, label, names, [variant], bench.BASELINES)


def networks(groups: Groups) -> Lines:
    """Whole networks: torch eager, the fastest rival and the best of ours by name, and the ratio of the two."""
    bench = bench_networks
    yield from _header("network, batch", "FPNN in torch, fp32", "the fastest rival", "**bqnn**", "times faster")
    for net, network in NETWORKS.items():
        for batch in network.batches:
            medians = _medians(groups, group_name(net, batch))
            ratio = times_faster(medians, bench.OURS, bench.RIVALS)
            if ratio is None:
                continue
            theirs, ours = (fastest(medians, names) for names in (bench.RIVALS, bench.OURS))
            eager = min((medians[name] for name in bench.BASELINES if name in medians), default=None)
            cells = ["" if eager is None else _ms(eager), f"{_ms(medians[theirs])}, {theirs}"]
            cells += [f"{_ms(medians[ours])}, {ours.removeprefix('bqnn ')}", f"**{_ratio(ratio)}**"]
            yield _line([f"{network.title}, {batch}", *cells])


def training(groups: Groups) -> Lines:
    """Steps: their time, and the bytes that wait for backward, over the full-precision network's."""
    bench = bench_training
    names = {f"training, {model} batch {sizes[0][0]}": model for model, sizes in bench.NETWORKS.items()}
    titles = [f"{model} batch {name.split()[-1]}" for name, model in names.items()]
    yield from _header("M = 3", *(f"{title}: {what}" for title in titles for what in ("time", "bytes kept")))
    for variant in bench.VARIANTS[1:]:
        cells = []
        for name in names:
            medians = _medians(groups, name)
            share = times_faster(medians, bench.BASELINES, [variant])
            saved = groups.get(name, {"rows": {}})["rows"].get(variant, {}).get("saved_for_backward")
            cells += ["" if share is None else f"{share:.2f}", "" if saved is None else f"{saved:.2f}"]
        if any(cells):
            yield _line([VARIANT_NAMES[variant], *cells])


VARIANT_NAMES = {
    "published": "the published layers, written plainly",
    "reference moment": "`moment` on the reference",
    "cpu moment": "**`moment`**",
    "cpu local": "**`local`**",
    "cpu sample": "**`sample`**",
    "cpu moment, exact": "**`moment`, exact variances**",
}


def elementwise(groups: Groups) -> Lines:
    """The ops on a million weights."""
    yield from _header("a million weights", "reference", "kernels")
    for name, label in (
        *((f"KL, M = {m}, tensor", f"`spike_slab_kl`, value and gradients, M = {m}") for m in (3, 16)),
        *((f"packed, M = {m}", f"`assign_codes` with packing, M = {m}") for m in (3, 16)),
    ):
        medians = _medians(groups, name)
        if {"reference", "cpu"} <= set(medians):
            ratio = medians["reference"] / medians["cpu"]
            yield _line([label, _ms(medians["reference"]), f"{_ms(medians['cpu'])} ({_ratio(ratio)})"])


def accuracy(folder: Path) -> Lines:
    """Test errors and sizes of LeNet-5 on MNIST."""
    rows = json.loads((folder / "accuracy_lenet5.json").read_text())["table"]
    fpnn = next(row for row in rows if row["row"] == "fpnn")["runs"][0]["bytes"]
    yield from _header("", "seeds", "test error %", "near %", "bits a weight", "bytes on disk", "smaller")
    for row in rows:
        recipe, runs = row["runs"][0]["recipe"], row["runs"]
        deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        error, near = f"{row['test_error']:.2f}{deviation}", row["smallest_near_share"]
        if row["row"] == "fpnn":
            yield _line(["FPNN", str(row["seeds"]), error, "", "32", f"{fpnn:,}", "1"])
            continue
        n_bytes, m = runs[0]["packed_bytes"], recipe["num_levels"]
        label = f"{ROW_NAMES.get(row['row'], 'Bayesian')}, M = {m}"
        size = [f"{_bits_a_weight(m):.2f}", f"{n_bytes:,}", f"{fpnn / n_bytes:.1f} ×"]
        yield _line([label, str(row["seeds"]), error, f"{100 * near:.1f}", *size])


ROW_NAMES = {
    "deterministic-3": "deterministic",
    "moment-3-gaussian": "Gaussian prior",
    "sample-3": "estimator `sample`",
    "local-3": "estimator `local`, the published one",
}


def _bits_a_weight(num_levels: int) -> float:
    """Of LeNet-5's packed weights: each output channel ends with a whole byte."""
    weights = [parameter.flatten(1) for parameter in lenet5().parameters() if parameter.dim() > 1]
    n_bytes = sum(len(weight) * packed_width(weight.shape[1], num_levels) for weight in weights)
    return 8 * n_bytes / sum(weight.numel() for weight in weights)


def uncertainty(folder: Path, each: bool = False) -> Lines:
    """What posteriors say, network by network of the paper's LeNets, or with every corruption by itself."""
    for case, found in json.loads((folder / lenets.TABLE.name).read_text()).items():
        rows = found["rows"]
        seeds, split = len({row["seed"] for row in rows}), {row["split"] for row in rows}
        yield from ("", f"{case}, {seeds} seeds, {' and '.join(sorted(split))} images:", "")
        yield from lenets.table(rows, each)
        yield ""


def _made_by(bench: Any, of: str = "rows") -> Callable[[Path], Lines]:
    """The table that a bench makes of that entry of its file."""
    return lambda folder: bench.table(json.loads((folder / bench.TABLE.name).read_text())[of])


def gpu(folder: Path) -> Lines:
    """Training ops and steps: what `make gpu` wrote, in ms, and the bytes at the peak."""
    for path in sorted(folder.glob("nvidia-*.json")):
        result = json.loads(path.read_text())
        machine, cases = result["machine"], {}
        for row in result["rows"]:
            if row["case"].startswith(MEASURED_ON_A_GPU) and row["seconds"] is not None:
                cases.setdefault(row["case"], {})[row["variant"]] = row
        yield from ("", f"{machine['gpu']}, torch {machine['torch']}:", "")
        columns = ("kernels", "plain PyTorch", "compiled", "ordinary layer or FPNN")
        yield from _header("ms, and MiB at the peak", *columns)
        for case, rows in cases.items():
            for ours in (variant for variant in rows if variant.startswith("triton")):
                plain = ours.replace("triton", "reference")
                cells = []
                for names in ((ours,), (plain,), ("compiled",), ("ordinary layer", "FPNN")):
                    row = next((rows[name] for name in names if name in rows), None)
                    cells.append("" if row is None else f"{_ms(_gpu_seconds(row))}, {row['peak_bytes'] / 2**20:,.0f}")
                yield _line([f"{case}{ours.removeprefix('triton')}", *cells])
        yield ""


MEASURED_ON_A_GPU = ("sample_", "moment_", "spike_slab_kl", "mixture_kl", "step-")
"""What the cases of that table begin with."""


def _gpu_seconds(row: dict[str, Any]) -> float:
    """Of the device: as a CUDA graph, where that is faster."""
    return min(seconds for seconds in (row["seconds"], row.get("graph_seconds")) if seconds is not None)


OF_A_MACHINE: dict[str, Callable[[Groups], Lines]] = {
    table.__name__: table
    for table in (networks, packed_linear, packed_linear_odd, packed_conv2d, network, training, elementwise)
}
BENCHES = {
    **{name: (name.removesuffix("_odd"),) for name in OF_A_MACHINE},
    "network": ("lenet5",),
    "elementwise": ("spike_slab_kl", "assign_codes"),
}
OF_A_FILE: dict[str, Callable[[Path], Lines]] = {
    **{table.__name__: table for table in (accuracy, uncertainty, gpu)},
    "perceptron": _made_by(mlp, "table"),
    "corruptions": partial(uncertainty, each=True),
    "claims": _made_by(claims_lenet5),
    "heterogeneous": _made_by(heterogeneous_lenet5),
}
ON_THE_SITE_ALONE = ("corruptions", "perceptron", "claims", "heterogeneous")
"""Tables that README has no room for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", help="names of files of bench/results/, those of README where none is")
    machines = parser.parse_args().machines or machines_of(README.read_text())
    README.write_text(render(README.read_text(), machines))


if __name__ == "__main__":
    main()
