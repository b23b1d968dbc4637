"""The command `bqnn`: train, sweep, recipes, eval, predict, pack, report, info, demo."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bqnn._version import __version__
from bqnn.cli import commands
from bqnn.cli.messages import Parser, in_flags
from bqnn.core.check import PRECISIONS
from bqnn.core.text import shown
from bqnn.data.splits import NAMES
from bqnn.lab.folder import PACKED, SPLITS, WEIGHTS
from bqnn.lab.recipe import CHOICES, Recipe
from bqnn.ops.dispatch import BackendError
from bqnn_command import interrupted

USER_ERROR, FAILURE = 2, 1  # exit statuses

# What each field of a recipe means; the options of `bqnn train` are made of the fields themselves.
HELP = {
    "model": "the built-in network",
    "dataset": f"{', '.join(NAMES)} or folder:PATH",
    "method": "bayes: M-ary quantized with a posterior; fpnn: full precision",
    "num_levels": "M, levels of a weight, 2 to 16",
    "layer_levels": "M of single layers, like 'conv1=4 fc=16', in place of num_levels",
    "estimator": "how the likelihood sees the weights in training",
    "prior": "the prior of the weights",
    "spike_width": "of the prior mixture: deviation of its spikes, in narrowest gaps between levels",
    "slab_share": "of the prior mixture: weight of its slab",
    "start_sigma": "posterior deviation at the start, in narrowest gaps between levels",
    "partition": "thresholds half-way between the levels, or learned",
    "granularity": "one codebook for a whole tensor, or for each output channel",
    "pretrain_epochs": "epochs of the full-precision phase",
    "deterministic_epochs": "epochs of the next phase, M-ary without Bayes (fpnn: full precision)",
    "epochs": "epochs of the last phase, M-ary with a posterior (fpnn: full precision)",
    "batch_size": "images a step",
    "lr": "highest learning rate of the first phase",
    "deterministic_lr": "highest learning rate of the second phase",
    "bayes_lr": "highest learning rate of the last phase",
    "codebook_lr": "learning rate of levels and thresholds, as a factor",
    "variance_lr": "learning rate of the posterior variances, as a factor",
    "weight_decay": "of weights that have no prior",
    "kl_weight": "factor of the divergence from the prior; 1 is the evidence lower bound",
    "kl_warmup": "epochs over which the divergence from the prior is ramped in",
    "augment": "how training images are varied",
    "label_smoothing": "share of each label that goes to all classes alike, in the loss of training alone",
    "autocast": "dtype of products in training and tests, where the device has it; weights and losses stay float32",
    "image_size": "pixels a side to resize to, or none",
    "validation": "training images held out, or none for the data set's own number",
    "seed": "of initial weights, order, augmentation and sampling",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with ``arguments`` (by default those of the process) and returns its exit status.

    0: done. 1: training failed. 2: something is wrong with what was asked for; one line on stderr says what. 130:
    interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(given)
    try:
        if options.threads is not None:
            _set_threads(options.threads)
        options.command(options)
    except (ValueError, OSError, ImportError, MemoryError, BackendError) as error:
        return _fail(error, USER_ERROR, options.parser)
    except FloatingPointError as error:
        return _fail(error, FAILURE, options.parser)
    except KeyboardInterrupt:
        status = interrupted()
        if options.command is commands.train and commands.has_run(options.out):
            again = ["bqnn", *(word for word in given if word not in ("--force", "--resume")), "--resume"]
            print(f"bqnn: to go on: {shlex.join(again)}", file=sys.stderr)
        return status
    return 0


def _fail(error: Exception, status: int, parser: argparse.ArgumentParser) -> int:
    text = in_flags(str(error) or type(error).__name__, parser)
    print("bqnn: error:", shown(text), file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command; ``command`` of what it returns is the function that does the work."""
    parser = Parser("bqnn", description="Bayesian M-ary quantized networks.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], None], name: str, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        sub.set_defaults(command=command, parser=sub)
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own number)")
        return sub

    sub = add(commands.train, "train", "train a network, quantized or at full precision")
    recipe = sub.add_argument_group("recipe", "A recipe, and options that override its fields.")
    text = "a built-in recipe (bqnn recipes lists them), or a file, whose name ends in .toml or has a folder"
    recipe.add_argument("--recipe", metavar="NAME|FILE", help=text)
    _add_recipe(recipe)
    sub.add_argument("--out", type=_path, required=True, metavar="DIR", help="folder of the run")
    sub.add_argument(
        "--init",
        type=_path,
        metavar="FILE",
        help=f"{WEIGHTS} of a full-precision run, for the first phase; of a quantized one, for two",
    )
    text = "train an ensemble of S networks from one full-precision trunk, each with its own seed"
    sub.add_argument("--members", type=int, metavar="S", help=text)
    exclusive = sub.add_mutually_exclusive_group()
    exclusive.add_argument("--resume", action="store_true", help="go on from the last checkpoint, with its recipe")
    exclusive.add_argument("--force", action="store_true", help="replace the run that is in DIR")
    sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _add_data(sub, download=True)

    sub = add(commands.sweep, "sweep", "train many runs of a recipe, with other values in some of its fields")
    sub.add_argument("file", type=_path, metavar="FILE", help="what to vary, and what to compare runs by: a TOML file")
    sub.add_argument(
        "--out", type=_path, required=True, metavar="DIR", help="folder of the runs; one that has some is gone on with"
    )
    sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _add_data(sub, download=True)

    sub = add(commands.recipes, "recipes", "list the built-in recipes, or show one")
    sub.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show, as a file that --recipe takes")

    sub = add(
        commands.evaluate, "eval", "test a run, or a packed file and those compiled of it: error, NLL, calibration"
    )
    _add_network(sub)
    sub.add_argument("--split", choices=SPLITS, default="test", help="images to test on (default: %(default)s)")
    _add_samples(sub)
    text = "estimate the BatchNorm statistics of each sample again, on training images"
    sub.add_argument("--refresh", action="store_true", help=text)
    sub.add_argument("--dataset", metavar="NAME", help="for a file; by default that of the run beside it")
    text = "for a file: a folder of images, one folder a class, all of which are tested"
    sub.add_argument("--data", type=_path, metavar="DIR", help=text)
    sub.add_argument(
        "--uncertainty",
        action="store_true",
        help="calibration, corruptions, images from outside, error against coverage; kept with a run, for the report",
    )
    sub.add_argument("-o", "--output", type=_path, metavar="FILE", help="what --uncertainty has found, as JSON")
    _add_data(sub)

    sub = add(commands.predict, "predict", "say what is on images: classes, with probabilities")
    _add_network(sub)
    sub.add_argument("images", type=_path, nargs="+", metavar="IMAGE", help="files, or folders of images")
    _add_samples(sub)
    sub.add_argument("--top", type=int, default=3, metavar="K", help="classes to show (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print JSON, with the probabilities of all classes")
    _add_data(sub)

    sub = add(commands.pack, "pack", "pack a trained run into a file, and compile it")
    sub.add_argument("run", type=_path, metavar="DIR", help="folder of the run")
    sub.add_argument("-o", "--output", type=_path, metavar="FILE", help=f"by default DIR/{PACKED}")
    sub.add_argument("--no-compile", action="store_true", help="write no compiled networks beside the packed one")
    _add_data_root(sub)

    sub = add(commands.write_report, "report", "show runs in one HTML page")
    sub.add_argument("runs", type=_path, nargs="+", metavar="DIR", help="folders of runs")
    sub.add_argument("-o", "--output", type=_path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")
    sub.add_argument("--linear", action="store_true", help="histograms with a linear axis of counts")
    sub.add_argument("--no-time", action="store_true", help="do not measure test times")

    sub = add(commands.info, "info", "say what a packed file holds")
    sub.add_argument("file", type=_path, metavar="FILE")

    sub = add(commands.demo, "demo", "train, pack and test LeNet-5 on the digits, in half a minute")
    sub.add_argument("--out", type=_path, default=Path("runs/demo"), metavar="DIR", help="(%(default)s)")
    return parser


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    """One option for each field of Recipe. What is not given is left out, so that --resume can take the run's own."""
    types = typing.get_type_hints(Recipe)
    for field in fields(Recipe):
        optional = type(None) in typing.get_args(types[field.name])
        kind = typing.get_args(types[field.name])[0] if optional else types[field.name]
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_or_none(kind) if optional else kind,
            choices=CHOICES.get(field.name),
            default=argparse.SUPPRESS,
            metavar=None if field.name in CHOICES else kind.__name__.upper(),
            help=f"{HELP[field.name]} (default: {'none' if field.default in (None, '') else field.default})",
        )


def _add_network(sub: argparse.ArgumentParser) -> None:
    """The network of a command that runs one."""
    sub.add_argument("path", type=_path, metavar="DIR|FILE", help="folder of a run (not packed), or a file")
    sub.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of a packed file (default: %(default)s)")


def _add_samples(sub: argparse.ArgumentParser) -> None:
    text = "also the mean over N posterior samples, of an ensemble a multiple of its networks"
    sub.add_argument("--samples", type=int, default=1, metavar="N", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")


def _path(text: str) -> Path:
    """The path, with ``~`` replaced, which a shell leaves alone after "=" and in the environment."""
    return Path(text).expanduser()


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = f"{getattr(kind, '__name__', kind)} or none"
    return parse


def _add_data_root(sub: argparse.ArgumentParser) -> None:
    root = os.environ.get("BQNN_DATA", "data")
    sub.add_argument(
        "--data-root", type=_path, default=_path(root), metavar="DIR", help="data sets (default: %(default)s)"
    )


def _add_data(sub: argparse.ArgumentParser, download: bool = False) -> None:
    _add_data_root(sub)
    sub.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    if download:
        sub.add_argument("--download", action="store_true", help="let torchvision download a data set that is missing")


def _set_threads(count: int) -> None:
    if count < 1:
        raise ValueError(f"--threads must be at least 1, got {count}")
    torch.set_num_threads(count)


if __name__ == "__main__":
    sys.exit(main())
