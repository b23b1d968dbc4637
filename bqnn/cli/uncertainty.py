"""`bqnn eval --uncertainty`: measures, prints a table and writes what it is made of."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from bqnn.data.out_of_distribution import other_name
from bqnn.data.splits import Splits
from bqnn.lab.runs import Run
from bqnn.lab.uncertainty import mean_scores, measure
from bqnn.lab.uncertainty_file import add_uncertainty, write_uncertainty


class Column(NamedTuple):
    """A column of the table."""

    name: str
    score: str
    factor: float  # what the score is multiplied by
    decimals: int


COLUMNS = (
    Column("error %", "error", 1, 2),
    Column("NLL", "nll", 1, 4),
    Column("Brier", "brier", 1, 4),
    Column("ECE %", "ece", 100, 2),
    Column("NLL at T", "scaled_nll", 1, 4),
    Column("ECE at T %", "scaled_ece", 100, 2),
    Column("AURC %", "aurc", 1, 3),
    Column("entropy", "entropy", 1, 4),
    Column("MI", "mutual_information", 1, 4),
)
NATS = ("NLL and entropy", "NLL, entropy and mutual information (MI)")  # of one network, and of several
NAME, NUMBER = 22, 11  # characters of a column


def evaluate_uncertainty(net: nn.Module, data: Splits, name: str, runs: Sequence[Run], options: Namespace) -> None:
    """Prints what a network, or with ``samples`` its posterior, says; writes it to ``output`` and, of one run, into
    its folder.

    Args:
        net: the network, on the device that it is tested on.
        data: its data set.
        name: what kind of network it is.
        runs: whose networks it has; none for a file.
        options: of `bqnn eval`: path, split, samples, seed, data_root and output.
    """
    found = measure(
        net,
        data,
        options.split,
        samples=options.samples,
        seed=options.seed,
        data_root=options.data_root,
        progress=sys.stderr.isatty(),
    )
    result = {"network": name, **found}
    print(f"{options.path}: {options.split} split of {data.name}, {result['images']} images\n")
    print(format_table(result))
    if other_name(data) not in result["ood"]:
        print(f"\n{other_name(data)} is not in {options.data_root}: no images of another data set")
    paths = [add_uncertainty(runs[0], result)] if len(runs) == 1 else []
    if options.output is not None:
        write_uncertainty(options.output, result)
        paths.append(options.output)
    for path in paths:
        print(f"{path} is written")


def format_table(result: Mapping[str, Any]) -> str:
    """The scores of what bqnn.lab.uncertainty measured, those of a corruption as the mean over its strengths."""
    count = result["samples"]
    what = result["network"] if count == 1 else f"{result['network']}, mean of {count} networks"
    rows = {"clean": result["clean"]}
    rows |= {name: mean_scores(strengths) for name, strengths in result["corruptions"].items()}
    rows["all corruptions"] = result["mean"]
    columns = COLUMNS if count > 1 else COLUMNS[:-1]  # a single network has no mutual information
    lines = [
        f"{what}; T = {result['temperature']:.3f}, of the least NLL on validation images",
        f"{'':<{NAME}}" + "".join(f"{each.name:>{NUMBER}}" for each in columns),
        *(f"{name:<{NAME}}{_numbers(row, columns)}" for name, row in rows.items()),
        f"{NATS[count > 1]} in nats an image; of a corruption, the mean over five strengths",
        "",
        *_outside_lines(result["ood"]),
    ]
    return "\n".join(lines)


def _numbers(row: Mapping[str, float], columns: Sequence[Column]) -> str:
    return "".join(f"{each.factor * row[each.score]:{NUMBER}.{each.decimals}f}" for each in columns)


def _outside_lines(ood: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    uncertainties = next(iter(ood.values()))
    head = "".join(f"{'by ' + each.replace('_', ' '):>{2 * NUMBER}}" for each in uncertainties)
    columns = f"{'AUROC':>{NUMBER}}{'FPR95 %':>{NUMBER}}" * len(uncertainties)
    lines = [f"{'told from clean images':<{NAME}}{head}", f"{'':<{NAME}}{columns}"]
    for name, found in ood.items():
        numbers = (f"{each['auroc']:{NUMBER}.3f}{100 * each['fpr95']:{NUMBER}.2f}" for each in found.values())
        lines.append(f"{name:<{NAME}}{''.join(numbers)}")
    return lines
