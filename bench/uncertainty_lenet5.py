"""What the posterior of a small network says: calibration, and robustness against noise and corruption.

    python -m bench.uncertainty_lenet5 --out runs/uncertainty [--case lenet5-mnist] [--seeds 0 1 2] [--test] [--save]

Trains what is missing, one network after the other, M = 3 or 2, every layer quantized and as many epochs for each. The
networks of a seed have their full-precision phase in common, the quantized ones the deterministic phase too; what is
stopped goes on where it was. Each is tested as it is, and the one with the prior "mixture" also as the mean of 16
networks that are drawn from its *packed* form: codes drawn once, BatchNorm statistics of their own. "ensemble" is four
deterministic networks from one trunk, "mixture ensemble" four with that prior, as they are and with four drawn of each.
Without ``--test`` that is on the validation images, clean and with Gaussian noise of the deviation 1 of a standardised
pixel; with it, for the end, on the test images, with every corruption and image from outside that bqnn.lab.uncertainty
has.

T is the temperature of the least NLL on clean validation images: 1 is calibrated. NLL and mutual information (MI) are
in nats an image, error and ECE (15 bins) in percent. ``--save`` writes the rows to bench/results/, in place of those
of the same case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.kept import kept
from bench.machine import RESULTS, describe_machine
from bench.summary import Verdict
from bqnn.bayes.layers import bayes_layers
from bqnn.core.files import write_content
from bqnn.data.splits import Splits, batches, normalise
from bqnn.engine.pack import pack
from bqnn.files.network import save as save_network
from bqnn.lab.ensemble import EnsembleRun, EnsembleTrainer
from bqnn.lab.evaluate import EVAL_BATCH, find_split
from bqnn.lab.folder import WEIGHTS
from bqnn.lab.metrics import best_temperature
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import load_recipe
from bqnn.lab.train import Trainer
from bqnn.lab.uncertainty import ask, drawn_networks, mean_scores, measure_drawn, scores

TABLE = RESULTS / "uncertainty_lenet5.json"
SAMPLES, SEED = 16, 0
NOISE = 1.0  # deviations of a standardised pixel

MNIST, MIXTURE = load_recipe("lenet5-mnist"), load_recipe("lenet5-mnist-mixture")
CASES = {
    "lenet5-mnist": MNIST,
    "lenet5-caffe-mnist": load_recipe("lenet5-caffe-mnist"),
    "lenet5-cifar10": replace(MNIST, dataset="cifar10", augment="crop_flip"),
}
_OF_MIXTURE = {name: value for name, value in asdict(MIXTURE).items() if value != asdict(MNIST)[name]}
NETWORKS: dict[str, dict[str, Any]] = {
    "fpnn": {"method": "fpnn"},
    "deterministic": {"estimator": "deterministic"},
    "default": {},
    "default, M = 2": {"num_levels": 2},
    "mixture": _OF_MIXTURE,
    "ensemble": {"estimator": "deterministic"},
    "mixture ensemble": _OF_MIXTURE,
}
"""What each network's recipe changes in that of the case."""
MEMBERS = {"ensemble": 4, "mixture ensemble": 4}
"""How many networks those that are ensembles have."""
DRAWN = ("mixture", "mixture ensemble")
"""The networks that are also tested as the mean of several: draws from the default's posterior are all alike."""

Row = dict[str, Any]
Scores = Mapping[str, float]


def train(
    recipe: Recipe, folder: Path, data_root: Path, init: Path | None = None, kind: type[Trainer] = Trainer
) -> Trainer:
    """The trainer, of that kind, of a finished run."""
    trainer = kind(recipe, folder, data_root=data_root, init=init)
    trainer.resume()
    trainer.run(progress=False)
    return trainer


class Trained(NamedTuple):
    """A finished run, or an ensemble's."""

    folder: Path
    seed: int
    net: nn.Module
    data: Splits
    fpnn_bytes: int


def train_network(name: str, base: Recipe, folder: Path, data_root: Path) -> Trained:
    """One of :data:`NETWORKS`, after what comes before it in ``folder``."""
    recipe = replace(base, **NETWORKS[name])
    trunk = train(replace(base, method="fpnn", deterministic_epochs=0, epochs=0), folder / "trunk", data_root)
    init, size = trunk.folder / WEIGHTS, 4 * sum(each.numel() for each in trunk.net.parameters())
    if name in MEMBERS:
        ensemble = EnsembleRun(folder / name, recipe, MEMBERS[name])
        EnsembleTrainer(ensemble, init=init, data_root=data_root).train(progress=False)
        return Trained(ensemble.folder, base.seed, ensemble.load(), trunk.data, size)
    if recipe.method != "fpnn":
        first = replace(base, num_levels=recipe.num_levels, epochs=0)
        quantized = "quantized" if first.num_levels == base.num_levels else f"quantized-{first.num_levels}"
        init = train(first, folder / quantized, data_root, init).folder / WEIGHTS
    trainer = train(recipe, folder / name, data_root, init)
    return Trained(trainer.folder, base.seed, trainer.net, trainer.data, size)


def inputs_of(data: Splits, split: str, noise: float) -> Iterator[Tensor]:
    """The standardised images of a split, with noise that is the same for all networks."""
    generator = torch.Generator().manual_seed(SEED)
    for images, _ in batches(find_split(data, split), EVAL_BATCH):
        x = normalise(images, data.mean, data.std)
        yield x + noise * torch.randn(x.shape, generator=generator) if noise else x


def rows_of(name: str, trained: Trained, split: str, data_root: Path) -> list[Row]:
    """A row of the network itself and, of :data:`DRAWN`, one of several networks drawn from its packed form.

    Rows are kept in the folder of the run, and taken from there: no network is tested twice.
    """
    rows: list[Row] = kept(trained.folder / f"{split}.json", lambda: _made_rows(name, trained, split, data_root))
    return rows


def _made_rows(name: str, trained: Trained, split: str, data_root: Path) -> list[Row]:
    net, members = pack(trained.net) if bayes_layers(trained.net) else trained.net, MEMBERS.get(name, 1)
    size = trained.fpnn_bytes if net is trained.net else bytes_of(net)
    start = {"network": name, "seed": trained.seed, "split": split, "bytes": size, "fpnn_bytes": trained.fpnn_bytes}
    rows = []
    for samples in (members, SAMPLES) if name in DRAWN else (members,):
        networks = drawn_networks(net, trained.data, samples if samples > members else 1, SEED)
        found = _tested(networks, samples, trained.data, split, data_root)
        rows.append({**start, "samples": samples, **found})
    return rows


def bytes_of(net: nn.Module) -> int:
    """Of the file that a packed network or ensemble is kept in."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        save_network(net, path)
        return path.stat().st_size


def _tested(networks: Sequence[nn.Module], samples: int, data: Splits, split: str, data_root: Path) -> Row:
    if split == "test":
        found: Row = measure_drawn(networks, samples, SEED, data, split, data_root=data_root)
        corruptions = {name: mean_scores(strengths) for name, strengths in found["corruptions"].items()}
        row = {key: found[key] for key in ("temperature", "clean", "mean", "ood")} | {"corruptions": corruptions}
    else:
        held_out = find_split(data, split).labels
        clean = ask(networks, inputs_of(data, split, 0.0), data)
        temperature = best_temperature(clean.probs, held_out)
        row = {"temperature": temperature, "clean": scores(clean, held_out, temperature)}
    noisy = ask(networks, inputs_of(data, split, NOISE), data)
    return {**row, "noise": scores(noisy, find_split(data, split).labels, row["temperature"])}


def show(row: Row) -> str:
    parts = [f"{row['network']:<15}{row['samples']:>3} seed {row['seed']} T {row['temperature']:.2f}"]
    for case in ("clean", "noise"):
        found = row[case]
        likelihood = f"error {found['error']:.2f} NLL {found['nll']:.4f} at T {found['scaled_nll']:.4f}"
        parts.append(f"{case}: {likelihood} ECE {100 * found['ece']:.2f} MI {found['mutual_information']:.4f}")
    return "  ".join(parts)


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """What is asked of the mean of 16 networks out of one packed file, as means over the seeds: times at least 1.

    A quantity that has to be small stands as what is asked over what is measured.
    """
    by_name = {name: [row for row in rows if row["network"] == name] for name in NETWORKS}
    yield from _of_ensemble(by_name["fpnn"], by_name["ensemble"])
    drawn = [row for row in by_name["mixture"] if row["samples"] == SAMPLES]
    point = by_name["deterministic"]
    if not drawn or not point:
        return
    yield Verdict("MI under noise, over 0.01 nats", 1.0, _mean(drawn, "noise", "mutual_information") / 0.01)
    for score, share in (("nll", 0.75), ("ece", 0.5)):
        text = f"{share} of the deterministic network's {score.upper()} under noise, over the measured"
        yield Verdict(text, 1.0, share * _mean(point, "noise", score) / _mean(drawn, "noise", score))
    others = [point, [row for row in by_name["default"] if row["samples"] == 1]]
    best = min(_mean(of, "clean", "error") for of in others if of)
    yield Verdict(
        "the best clean error and 0.05, over the measured", 1.0, (best + 0.05) / _mean(drawn, "clean", "error")
    )
    temperature = fmean(row["temperature"] for row in drawn)
    yield Verdict(f"0.1 over |T - 1|, T = {temperature:.3f}", 1.0, 0.1 / max(1e-9, abs(temperature - 1)))


def _of_ensemble(fpnn: Sequence[Row], ensemble: Sequence[Row]) -> Iterator[Verdict]:
    """What is asked of an ensemble: to be ahead of the FPNN, in a fifth of its bytes."""
    if not fpnn or not ensemble:
        return
    for case, images in (("clean", "clean"), ("mean", "corrupted")):
        if case not in fpnn[0]:
            continue
        for score in ("error", "nll"):
            ratio = _mean(fpnn, case, score) / _mean(ensemble, case, score)
            yield Verdict(f"the FPNN's {score} on {images} images, over the ensemble's", 1.0, ratio)
    size = ensemble[0]["fpnn_bytes"] / 5 / ensemble[0]["bytes"]
    yield Verdict("a fifth of the FPNN's bytes, over the ensemble's", 1.0, size)


def _mean(rows: Sequence[Row], case: str, score: str) -> float:
    return fmean(row[case][score] for row in rows)


def table(rows: Sequence[Row], each: bool = True) -> Iterator[str]:
    """A Markdown table of means over the seeds, with their standard deviation where there are several; with ``each``
    corruption and set of images from outside by itself."""
    corruptions = list(rows[0].get("corruptions", ()))
    names = ["clean", "noise 1.0", *(corruptions if each else []), *(["all corruptions"] if corruptions else [])]
    yield "| | " + " | ".join(f"{name}, {count}" for name, count in _columns(rows)) + " |"
    yield "|---" * (1 + len(_columns(rows))) + "|"
    groups = [[row for row in rows if (row["network"], row["samples"]) == column] for column in _columns(rows)]
    yield _line("T", [_spread([row["temperature"] for row in group], 2) for group in groups])
    for name in names:
        yield _line(
            f"{name}: error %, NLL, ECE %, MI", [_cell([_scores(row, name) for row in each]) for each in groups]
        )
    for outside in rows[0].get("ood", ()) if each else ():
        found = [fmean(row["ood"][outside]["entropy"]["auroc"] for row in group) for group in groups]
        yield _line(f"{outside}: AUROC by entropy", [f"{each:.3f}" for each in found])


def _columns(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["network"], row["samples"]) for row in rows))


def _scores(row: Row, name: str) -> Scores:
    found: Scores = row["corruptions"][name] if name in row.get("corruptions", ()) else row[_KEYS[name]]
    return found


_KEYS = {"clean": "clean", "noise 1.0": "noise", "all corruptions": "mean"}


def _cell(found: Sequence[Scores]) -> str:
    values = (("error", 1, 2), ("nll", 1, 4), ("ece", 100, 2), ("mutual_information", 1, 4))
    return ", ".join(_spread([factor * each[name] for each in found], decimals) for name, factor, decimals in values)


def _spread(values: Sequence[float], decimals: int) -> str:
    mean = f"{fmean(values):.{decimals}f}"
    return f"{mean} ± {stdev(values):.{decimals}f}" if len(values) > 1 else mean


def _line(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def save(case: str, rows: Sequence[Row]) -> None:
    """Puts rows into the file, in place of those of the same case."""
    content = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    content[case] = {"machine": describe_machine(), "networks": NETWORKS, "rows": list(rows)}
    write_content(TABLE, json.dumps(content, indent=1) + "\n")


def parser_of_runs(description: str | None) -> argparse.ArgumentParser:
    """With the options that say which runs: ``--out``, ``--data``, ``--case`` and ``--seeds``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--case", choices=CASES, default="lenet5-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def trained_networks(arguments: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, Trained]]:
    """For each seed of :func:`parser_of_runs` and each of ``names``, the name and the finished run."""
    for seed in arguments.seeds:
        base, folder = replace(CASES[arguments.case], seed=seed), arguments.out / f"{arguments.case}-{seed}"
        for name in names:
            yield name, train_network(name, base, folder, arguments.data)


def main() -> None:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--test", action="store_true", help="test images, in place of those held out")
    parser.add_argument("--save", action="store_true", help=f"write the rows to {TABLE.name}")
    arguments = parser.parse_args()
    split = "test" if arguments.test else "validation"
    rows: list[Row] = []
    for name, trained in trained_networks(arguments, arguments.only):
        for row in rows_of(name, trained, split, arguments.data):
            rows.append(row)
            print(show(row), flush=True)
    print("\n".join(["", *table(rows), "", *map(str, verdicts(rows))]))
    if arguments.save:
        save(arguments.case, rows)


if __name__ == "__main__":
    main()
