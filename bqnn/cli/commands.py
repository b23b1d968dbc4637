"""What the subcommands of `bqnn` do, each from the options that bqnn.cli has parsed."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from bqnn.cli.evaluate import evaluate as test
from bqnn.cli.predict import predict as ask
from bqnn.core.text import shown, suggestion
from bqnn.files import network
from bqnn.files.metadata import Metadata
from bqnn.lab import runs
from bqnn.lab.compile_run import calibration, compiled_path, remove_compiled, save_compiled
from bqnn.lab.ensemble import EnsembleRun, EnsembleTrainer, clear_ensemble_run, load_ensemble_run, parts_of
from bqnn.lab.folder import CHECKPOINT, LOCK, MEMBERS, METRICS, PACKED, WEIGHTS, print_now
from bqnn.lab.processes import join
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import NAMES, load_recipe, summary_of, text_of
from bqnn.lab.sweep import Sweeper, load_sweep
from bqnn.lab.train import Trainer
from bqnn.reports.report import report
from bqnn.view.html import write_html
from bqnn.view.sweep import write_sweep

LONGEST_NAME = 60  # characters of a layer's name in a table
LONGEST_LINE = 200  # of what a file says of its data


def _device(name: str) -> str:
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device must be cpu or, where PyTorch finds a GPU, cuda, got {name!r}")
    return name


def train(options: Namespace) -> None:
    """`bqnn train`."""
    processes = join(_device(options.device))
    recipe, members = processes.from_leader(_asked(options) if processes.leads else None)
    surroundings = {
        "data_root": options.data_root,
        "device": processes.device(options.device),
        "download": options.download,
        "init": options.init,
        "processes": processes,
    }
    shows = processes.leads and not options.quiet
    if members is None:
        text = _train_run(recipe, options, surroundings, shows)
    else:
        text = _train_members(recipe, members, options, surroundings, shows)
    if shows:
        print(text)


def _train_run(recipe: Recipe, options: Namespace, surroundings: Mapping[str, Any], shows: bool) -> str:
    trainer = Trainer(recipe, options.out, **surroundings)
    log = print_now if shows else _ignore
    with trainer.lock:
        if options.resume:
            trainer.resume(log)
        elif trainer.processes.leads:
            _make_room(options)
        trainer.run(shows and sys.stderr.isatty(), log)
    return f"{options.out / WEIGHTS} is written"


def _train_members(
    recipe: Recipe, members: int, options: Namespace, surroundings: Mapping[str, Any], shows: bool
) -> str:
    trainer = EnsembleTrainer(EnsembleRun(options.out, recipe, members), **surroundings)
    with trainer.lock:
        if not options.resume and trainer.processes.leads:
            _make_room(options)
        trainer.train(shows and sys.stderr.isatty(), print_now if shows else _ignore)
    return f"{options.out} has {members} trained members"


def _asked(options: Namespace) -> tuple[Recipe, int | None]:
    """The recipe and the number of members, None of a run of one network; refuses a folder that is not fit for it."""
    folder: Path = options.out
    base = {} if options.recipe is None else asdict(load_recipe(options.recipe))
    given = base | {field.name: getattr(options, field.name) for field in fields(Recipe) if field.name in options}
    if options.resume:
        _refuse_unused(folder)
    elif not options.force:
        _refuse_used(folder)
    ensemble = load_ensemble_run(folder) if options.resume else None
    stored = None
    if options.resume:
        stored = runs.stored_recipe(folder) if ensemble is None else ensemble.recipe
    if stored is not None:
        given = {field.name: given.get(field.name, getattr(stored, field.name)) for field in fields(Recipe)}
    recipe, members = Recipe(**given), options.members
    if ensemble is not None:
        members = ensemble.members if members is None else members
        ensemble.check_same(recipe, members)
    elif stored is not None and members is not None:
        raise ValueError(f"--members can't be given for {folder}, whose run began without")
    return recipe, members


def _make_room(options: Namespace) -> None:
    """Clears the folder with --force, else refuses it if it is used, now that nobody else can begin a run there."""
    if options.force:
        clear_ensemble_run(options.out)
        runs.clear_run(options.out)
    else:
        _refuse_used(options.out)


def has_run(folder: Path) -> bool:
    """Whether there is a run in ``folder``, of a network or an ensemble, that can be resumed or replaced."""
    return bool(_used(folder))


def _used(folder: Path) -> list[str]:
    """What in ``folder`` is of a run."""
    used = [name for name in (CHECKPOINT, WEIGHTS, METRICS, MEMBERS) if (folder / name).exists()]
    return [*used, *(part.name for part in parts_of(folder))]


def _refuse_used(folder: Path) -> None:
    if used := _used(folder):
        raise ValueError(f"{folder} has a run ({', '.join(used)}); go on with --resume, or replace it with --force")


def _refuse_unused(folder: Path) -> None:
    """For --resume: raises ValueError where there is no run, with the name of one beside it that may be meant."""
    if not has_run(folder) and not (folder / LOCK).exists():  # of a run that somebody begins, the lock tells
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        hint = suggestion(folder.name, [each.name for each in beside if each.is_dir() and has_run(each)])
        raise ValueError(f"{folder} has no run to resume; without --resume one begins there{hint}")


def _ignore(line: str) -> None:
    pass


def sweep(options: Namespace) -> None:
    """`bqnn sweep`."""
    sweeper = Sweeper(
        load_sweep(options.file),
        options.out,
        data_root=options.data_root,
        device=_device(options.device),
        download=options.download,
    )
    sweeper.run(not options.quiet and sys.stderr.isatty(), _ignore if options.quiet else print_now)
    table = write_sweep(sweeper)
    if not options.quiet:
        print(table)


def recipes(options: Namespace) -> None:
    """`bqnn recipes`."""
    if options.name is not None:
        print(text_of(options.name), end="")
        return
    width = max(map(len, NAMES)) + 2
    for name in NAMES:
        print(f"{name:<{width}}{summary_of(name)}")


def evaluate(options: Namespace) -> None:
    """`bqnn eval`."""
    test(options, _device(options.device))


def predict(options: Namespace) -> None:
    """`bqnn predict`."""
    ask(options, _device(options.device))


def pack(options: Namespace) -> None:
    """`bqnn pack`."""
    ensemble = load_ensemble_run(options.run)
    run = runs.load_run(options.run) if ensemble is None else ensemble.runs()[0]
    if run.recipe.method == "fpnn":
        raise ValueError(f"{options.run} is a full-precision run; only a run with --method bayes can be packed")
    output: Path = options.output or options.run / PACKED
    metadata = runs.load_metadata(run, options.data_root)
    net = runs.save_packed(runs.load_network(run) if ensemble is None else ensemble.load(), output, metadata)
    name, arguments = runs.load_factory(run)
    dense, packed = runs.fpnn_bytes(name, arguments), output.stat().st_size
    of, one = ("", "") if ensemble is None else (f" of {ensemble.members} networks", "one at ")
    print(f"{output}: {packed:,} bytes{of}; {one}full precision: {dense:,} bytes; {dense / packed:.1f} times smaller")
    print("every layer of the file decodes to the quantized weight of the run")
    if options.no_compile:
        remove_compiled(output)
        return
    example = torch.zeros(2, arguments["in_channels"], arguments["image_size"], arguments["image_size"])
    given = save_compiled(
        net, output, example, lambda: calibration(runs.load_data(run.recipe, options.data_root)), metadata
    )
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
    width = max([20, *(len(name) + 2 for name in names.values())])
    made = f"{factory[0]}({', '.join(f'{k}={v}' for k, v in factory[1].items())})" if factory else "not a built-in one"
    what = "network" if content["networks"] == 1 else f"{content['networks']} networks, each"
    print(f"{options.file}: format {content['version']}, {what} {shown(made)}")
    for line in _about(content["metadata"]):
        print(shown(line, LONGEST_LINE))
    head = f"{'layer':<{width}}{'kind':<14}{'shape':<20}{'M':>3}{'codebooks':>11}"
    print(f"{head}{'posterior':>11}{'bits a weight':>15}{'bytes':>10}")
    for name, layer in layers.items():
        shape = "x".join(map(str, layer["shape"]))
        options_of = layer.get("bayes", layer)
        codebooks = layer["shape"][0] if options_of.get("granularity") == "channel" else 1
        kind = f"{'bayes ' if 'bayes' in layer else ''}{layer['kind']}"
        print(
            f"{names[name]:<{width}}{kind:<14}{shape:<20}{layer['num_levels']:>3}{codebooks:>11}"
            f"{'yes' if layer['posterior_bytes'] else '-':>11}{layer['bits_per_weight']:>15.2f}{layer['bytes']:>10,}"
        )
    posteriors = sum(layer["posterior_bytes"] for layer in layers.values())
    others = sum(tensor["bytes"] for tensor in content["tensors"].values()) - posteriors
    others -= sum(layer["bytes"] for layer in layers.values())
    rows = [("posteriors", posteriors)] if posteriors else []
    rows += [("other tensors", others), ("header", content["header_bytes"]), ("file", content["bytes"])]
    for text, size in rows:
        print(f"{text:<{width + 74}}{size:>10,}")


def _about(metadata: Metadata) -> list[str]:
    """What a file says of images and classes, in lines."""
    lines = []
    if metadata.dataset is not None:
        lines.append(f"trained on {metadata.dataset}")
    if metadata.in_channels is not None and metadata.image_size is not None:
        side = metadata.image_size
        lines.append(f"images of {side}x{side} pixels, channels: {metadata.in_channels}")
    if metadata.mean is not None and metadata.std is not None:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (metadata.mean, metadata.std))
        lines.append(f"normalised with mean {mean} and std {std}, of pixels from 0 to 1")
    if metadata.classes is not None:
        lines.append(f"{len(metadata.classes)} classes: {', '.join(metadata.classes)}")
    return lines


def demo(options: Namespace) -> None:
    """`bqnn demo`."""
    from bqnn.cli.demo import run_demo

    run_demo(options.out, progress=sys.stderr.isatty())
