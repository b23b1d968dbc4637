"""The demonstration: LeNet-5 on the digits at full precision and with three levels a weight, packed and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bqnn.core.timing import measure_side_by_side
from bqnn.data.splits import normalise
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files.network import info
from bqnn.lab.compile_run import COMPILED, calibration, compiled_path, save_compiled
from bqnn.lab.evaluate import evaluate, find_split, score_network
from bqnn.lab.folder import WEIGHTS, print_now
from bqnn.lab.labels import metadata_of
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import load_recipe
from bqnn.lab.runs import add_scores, clear_run, fpnn_bytes, load_factory, load_run, save_packed
from bqnn.lab.train import Trainer
from bqnn.reports.report import report
from bqnn.view.html import BATCH, FPNN_BITS, write_html


def run_demo(
    out: str | Path,
    recipe: Recipe | None = None,
    progress: bool = False,
    log: Callable[[str], object] = print_now,
) -> dict[str, dict[str, float]]:
    """Trains, packs, compiles, saves, loads and tests; prints a table and writes ``out``/report.html.

    ``recipe`` is by default the built-in "lenet5-digits".

    Returns:
        for "fpnn", "packed", "compiled-fp32" and "compiled-int8": ``accuracy`` (percent of the test images), ``bits`` a
        weight, ``bytes`` on disk, and ``seconds``, the median test time of a batch.

    Raises:
        RuntimeError: the packed network decodes to other weights, or predicts another class, than the unpacked one.
    """
    out, recipe = Path(out), recipe or load_recipe("lenet5-digits")
    fpnn = replace(recipe, method="fpnn")
    log("Full precision, the phase that both networks begin with")
    _train(replace(fpnn, deterministic_epochs=0, epochs=0), out / "start", None, progress, log)
    start = out / "start" / WEIGHTS
    log("\nFull precision, to its end (the FPNN)")
    dense_trainer = _train(fpnn, out / "fpnn", start, progress, log)
    log(f"\nBayesian, {recipe.num_levels} levels a weight")
    trainer = _train(recipe, out / "bayes", start, progress, log)

    dense, net, data = dense_trainer.net, trainer.net, trainer.data
    file = out / "packed.safetensors"
    metadata = metadata_of(data)
    packed = save_packed(net, file, metadata)
    test = find_split(data, "test")
    dense_scores = score_network(dense, test, data)
    for folder, scores in ((out / "fpnn", dense_scores), (out / "bayes", score_network(net, test, data))):
        add_scores(load_run(folder), "test", scores)
    score, packed_score = evaluate(net, test, data), evaluate(packed, test, data)
    if not torch.equal(score.predictions, packed_score.predictions):
        count = int((score.predictions != packed_score.predictions).sum())
        raise RuntimeError(f"packed and unpacked network disagree on {count} of {len(test)} images")

    x = normalise(test.images[:BATCH], data.mean, data.std)
    found = save_compiled(packed, file, x, lambda: calibration(data), metadata)
    compiled = {precision: fast for precision, fast in found.items() if isinstance(fast, CompiledNetwork)}
    for precision in found.keys() - compiled:
        log(f"not compiled for {precision}: {found[precision]}")
    seconds = measure_side_by_side([dense, packed, *compiled.values()], x)
    codebooks = report(net)
    runs = [load_run(out / "fpnn"), load_run(out / "bayes")]
    dense_bytes = fpnn_bytes(*load_factory(runs[0]))
    result = {
        "fpnn": {
            "accuracy": 100 - dense_scores["error"],
            "bits": FPNN_BITS,
            "bytes": dense_bytes,
            "seconds": seconds[0],
        },
        "packed": {
            "accuracy": 100 - packed_score.error,
            "bits": codebooks.bits,
            "bytes": file.stat().st_size,
            "seconds": seconds[1],
        },
    }
    for (precision, fast), each in zip(compiled.items(), seconds[2:], strict=True):
        path = compiled_path(file, precision)
        result[f"compiled-{precision}"] = {
            "accuracy": 100 - evaluate(fast, test, data).error,
            "bits": _bits(path),
            "bytes": path.stat().st_size,
            "seconds": each,
        }
    log(f"\n{codebooks}\n")
    log(format_table(result, recipe.num_levels, len(test), len(x)))
    write_html(runs, out / "report.html")
    log(f"packed and unpacked network agree on all {len(test)} test images\n{out / 'report.html'} is written")
    return result


def _train(recipe: Recipe, folder: Path, init: Path | None, progress: bool, log: Callable[[str], object]) -> Trainer:
    clear_run(folder)
    trainer = Trainer(recipe, folder, init=init)
    trainer.run(progress, log)
    return trainer


def _bits(file: Path) -> float:
    """Bits a weight of the codes in a file."""
    layers = info(file)["layers"].values()
    weights = [math.prod(layer["shape"]) for layer in layers]
    return sum(layer["bits_per_weight"] * count for layer, count in zip(layers, weights, strict=True)) / sum(weights)


def format_table(result: dict[str, dict[str, float]], num_levels: int, images: int, batch: int) -> str:
    """What :func:`run_demo` returns, as text, each network against the full-precision one."""
    names = {"fpnn": "FPNN", "packed": f"M = {num_levels}, packed"}
    names |= {f"compiled-{precision}": f"compiled, {precision}" for precision in COMPILED}
    dense = result["fpnn"]
    lines = [
        f"{'':<16}{'accuracy':>10}{'bits a weight':>15}{'bytes':>10}{'smaller':>10}{'ms a batch':>12}{'of FPNN':>9}"
    ]
    for name, row in result.items():
        lines.append(
            f"{names[name]:<16}{row['accuracy']:>8.2f} %{row['bits']:>15.2f}{row['bytes']:>10,.0f}"
            f"{dense['bytes'] / row['bytes']:>8.1f} x{1e3 * row['seconds']:>12.2f}"
            f"{row['seconds'] / dense['seconds']:>9.2f}"
        )
    return "\n".join([*lines, f"({images} test images; a batch is {batch} images)"])
