"""What the subcommands of `bqnn` do, each from the options that bqnn.cli has parsed."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bqnn import models
from bqnn.cli.uncertainty import evaluate_uncertainty
from bqnn.core.text import shown
from bqnn.core.timing import measure_side_by_side
from bqnn.data.splits import Split, Splits, load_dataset, normalise
from bqnn.engine.compiled import CompiledNetwork
from bqnn.files import network
from bqnn.lab import runs
from bqnn.lab.compile_run import calibration, compiled_path, load_compiled, remove_compiled, save_compiled
from bqnn.lab.evaluate import find_split, score_network
from bqnn.lab.folder import CHECKPOINT, METRICS, WEIGHTS, print_now
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer
from bqnn.reports.report import report
from bqnn.view.html import BATCH, write_html

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
    if options.output is not None and not options.uncertainty:
        raise ValueError("--output is for --uncertainty")
    device, path = _device(options.device), options.path
    run = runs.load_run(path) if path.is_dir() else None
    beside = path.parent / METRICS
    if run is not None:
        if options.dataset is not None or options.precision != "fp32":
            raise ValueError("--dataset and --precision are for a packed file; a run has its own")
        net, data = runs.load_network(run), runs.load_data(run.recipe, options.data_root)
    else:
        net = network.load(path, precision=options.precision)
        if isinstance(net, CompiledNetwork) and (device != "cpu" or options.precision != "fp32"):
            raise ValueError(f"--device and --precision are not for {path}, a compiled network with its own")
        if options.dataset is not None:
            data = load_dataset(options.dataset, options.data_root, image_size=_image_size(net))
        elif beside.exists():
            data = runs.load_data(runs.load_run(path.parent).recipe, options.data_root)
        else:
            raise ValueError(f"--dataset must say what to test {path} on: there is no {METRICS} beside it")
    torch.manual_seed(options.seed)
    split = find_split(data, options.split)
    if run is not None:
        name = "quantized" if run.recipe.method == "bayes" else "full precision"
    else:
        name = f"compiled, {net.precision}" if isinstance(net, CompiledNetwork) else "packed"
    if options.uncertainty:
        return evaluate_uncertainty(net.to(device), data, name, run, options)
    nets = {name: net}
    if name == "packed":
        nets |= {f"compiled, {precision}": fast for precision, fast in load_compiled(path).items()}
    times = None if run is not None else _times(nets, split, data)
    scores = score_network(net.to(device), split, data, options.samples)
    print(f"{path}: {options.split} split of {data.name}, {scores['images']} images")
    for each, fast in nets.items():
        _print_scores(each, scores if fast is net else score_network(fast, split, data))
    if "sampled" in scores:
        sampled = scores["sampled"]
        _print_scores(f"mean of {sampled['samples']} samples", sampled)
        information = f"mutual information {sampled['mutual_information']:.4f} nats"
        print(f"{'':<22}entropy {sampled['entropy']:.4f} nats  {information}")
    if run is not None:
        runs.add_scores(run, options.split, scores)
    if times is not None:
        print(times)


def _image_size(net: nn.Module) -> int | None:
    """The side in pixels of the images that a network of a file takes; None where the file does not say."""
    if isinstance(net, CompiledNetwork):
        return net.inputs[0].shape[-1]
    return net.factory[1]["image_size"] if isinstance(net, models.Network) else None


def _times(nets: dict[str, nn.Module], split: Split, data: Splits) -> str:
    """A line of what a batch of the split takes in each of ``nets``, which are on the CPU."""
    x = normalise(split.images[:BATCH], data.mean, data.std)
    seconds = measure_side_by_side(list(nets.values()), x)
    times = "; ".join(f"{name} {1e3 * each:.2f} ms" for name, each in zip(nets, seconds, strict=True))
    return f"median time of {len(x)} images on the CPU: {times}"


def _print_scores(name: str, scores: dict[str, Any]) -> None:
    print(f"{name:<22}error {scores['error']:.2f} %  NLL {scores['nll']:.4f} nats  ECE {100 * scores['ece']:.2f} %")


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
    print(f"{'layer':<{width}}{'kind':<14}{'shape':<20}{'M':>3}{'codebooks':>11}{'bits a weight':>15}{'bytes':>10}")
    for name, layer in layers.items():
        shape = "x".join(map(str, layer["shape"]))
        codebooks = layer["shape"][0] if layer.get("granularity") == "channel" else 1
        print(
            f"{names[name]:<{width}}{layer['kind']:<14}{shape:<20}{layer['num_levels']:>3}{codebooks:>11}"
            f"{layer['bits_per_weight']:>15.2f}{layer['bytes']:>10,}"
        )
    others = sum(tensor["bytes"] for tensor in content["tensors"].values())
    others -= sum(layer["bytes"] for layer in layers.values())
    header = content["header_bytes"]
    for text, size in (("other tensors", others), ("header", header), ("file", content["bytes"])):
        print(f"{text:<{width + 63}}{size:>10,}")


def demo(options: Namespace) -> None:
    """`bqnn demo`."""
    from bqnn.cli.demo import run_demo

    run_demo(options.out, progress=sys.stderr.isatty())
