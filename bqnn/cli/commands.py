"""What the subcommands of `bqnn` do, each from the options that bqnn.cli has parsed."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import torch

from bqnn.cli.evaluate import evaluate as test
from bqnn.core.text import shown
from bqnn.files import network
from bqnn.lab import runs
from bqnn.lab.compile_run import calibration, compiled_path, remove_compiled, save_compiled
from bqnn.lab.folder import CHECKPOINT, METRICS, WEIGHTS, print_now
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer
from bqnn.reports.report import report
from bqnn.view.html import write_html

PACKED = "packed.safetensors"
LONGEST_NAME = 60  # characters of a layer's name in a table


def _device(name: str) -> str:
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device must be cpu or, where PyTorch finds a GPU, cuda, got {name!r}")
    return name


def train(options: Namespace) -> None:
    """`bqnn train`."""
    folder: Path = options.out
    recipe = {field.name: getattr(options, field.name) for field in fields(Recipe) if field.name in options}
    if not (options.resume or options.force):
        _refuse_used(folder)
    if options.resume and (stored := runs.stored_recipe(folder)) is not None:
        recipe = {field.name: recipe.get(field.name, getattr(stored, field.name)) for field in fields(Recipe)}
    trainer = Trainer(
        Recipe(**recipe),
        folder,
        data_root=options.data_root,
        device=_device(options.device),
        download=options.download,
        init=options.init,
    )
    log = _ignore if options.quiet else print_now
    with trainer.lock:
        if options.resume:
            trainer.resume(log)
        elif options.force:
            runs.clear_run(folder)
        else:
            _refuse_used(folder)  # now that nobody else can begin one
        trainer.run(progress=sys.stderr.isatty() and not options.quiet, log=log)
    if not options.quiet:
        print(f"{folder / WEIGHTS} is written")


def _refuse_used(folder: Path) -> None:
    if used := [name for name in (CHECKPOINT, WEIGHTS, METRICS) if (folder / name).exists()]:
        raise ValueError(f"{folder} has a run ({', '.join(used)}); go on with --resume, or replace it with --force")


def _ignore(line: str) -> None:
    pass


def evaluate(options: Namespace) -> None:
    """`bqnn eval`."""
    test(options, _device(options.device))


def pack(options: Namespace) -> None:
    """`bqnn pack`."""
    run = runs.load_run(options.run)
    if run.recipe.method == "fpnn":
        raise ValueError(f"{options.run} is a full-precision run; only a run with --method bayes can be packed")
    output: Path = options.output or options.run / PACKED
    net = runs.save_packed(runs.load_network(run), output)
    name, arguments = runs.load_factory(run)
    dense, packed = runs.fpnn_bytes(name, arguments), output.stat().st_size
    print(f"{output}: {packed:,} bytes; full precision: {dense:,} bytes; {dense / packed:.1f} times smaller")
    print("every layer of the file decodes to the quantized weight of the run")
    if options.no_compile:
        remove_compiled(output)
        return
    example = torch.zeros(2, arguments["in_channels"], arguments["image_size"], arguments["image_size"])
    given = save_compiled(net, output, example, lambda: calibration(runs.load_data(run.recipe, options.data_root)))
    for precision, fast in given.items():
        if isinstance(fast, str):
            print(f"not compiled for {precision}: {fast}")
        else:
            file = compiled_path(output, precision)
            print(f"{file}: {file.stat().st_size:,} bytes, compiled for {precision}")


def write_report(options: Namespace) -> None:
    """`bqnn report`."""
    found = [runs.load_run(folder) for folder in options.runs]
    for run in found:
        if run.finished and run.recipe.method == "bayes":
            print(f"{run.folder}: {run.title}\n{report(runs.load_network(run))}\n")
    write_html(found, options.output, log_counts=not options.linear, measure=not options.no_time)
    print(f"{options.output} is written")


def info(options: Namespace) -> None:
    """`bqnn info`. What comes from the file is not trusted with the terminal: names may hold its control characters."""
    content = network.info(options.file)
    layers, factory = content["layers"], content["factory"]
    names = {name: shown(name, LONGEST_NAME) for name in layers}
    width = max(20, *(len(name) + 2 for name in names.values()))
    made = f"{factory[0]}({', '.join(f'{k}={v}' for k, v in factory[1].items())})" if factory else "not a built-in one"
    print(f"{options.file}: format {content['version']}, network {shown(made)}")
    head = f"{'layer':<{width}}{'kind':<14}{'shape':<20}{'M':>3}{'codebooks':>11}"
    print(f"{head}{'posterior':>11}{'bits a weight':>15}{'bytes':>10}")
    for name, layer in layers.items():
        shape = "x".join(map(str, layer["shape"]))
        codebooks = layer["shape"][0] if layer.get("granularity") == "channel" else 1
        print(
            f"{names[name]:<{width}}{layer['kind']:<14}{shape:<20}{layer['num_levels']:>3}{codebooks:>11}"
            f"{'yes' if layer['posterior_bytes'] else '-':>11}{layer['bits_per_weight']:>15.2f}{layer['bytes']:>10,}"
        )
    posteriors = sum(layer["posterior_bytes"] for layer in layers.values())
    others = sum(tensor["bytes"] for tensor in content["tensors"].values()) - posteriors
    others -= sum(layer["bytes"] for layer in layers.values())
    rows = [("posteriors", posteriors)] if posteriors else []
    rows += [("other tensors", others), ("header", content["header_bytes"]), ("file", content["bytes"])]
    for text, size in rows:
        print(f"{text:<{width + 74}}{size:>10,}")


def demo(options: Namespace) -> None:
    """`bqnn demo`."""
    from bqnn.cli.demo import run_demo

    run_demo(options.out, progress=sys.stderr.isatty())
