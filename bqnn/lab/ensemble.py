"""Runs of ensembles: members that share one full-precision trunk, each a run in a folder of its own.

The folder of such a run has members.json, with the recipe and the number of members; ``trunk``, the run of the first
phase; and ``member-0`` and so on, runs of the other phases that begin with the weights of the trunk, each with its own
seed: of the order, the augmentation and the sampling. Each of these folders is an ordinary run, which can be resumed,
tested, packed and shown by itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bqnn.core.check import check_int
from bqnn.core.ensemble import Ensemble
from bqnn.core.files import open_regular, write_content
from bqnn.core.text import shown
from bqnn.files.members import MOST_NETWORKS
from bqnn.lab.folder import CHECKPOINT, MEMBERS, METRICS, WEIGHTS, RunLock, check_same, print_now, read_recipe
from bqnn.lab.processes import ALONE, Processes
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run, clear_run, load_network, load_run
from bqnn.lab.train import Trainer

TRUNK, MEMBER = "trunk", "member-"


@dataclass(frozen=True)
class EnsembleRun:
    """What members.json holds, and what follows from it.

    Raises:
        TypeError, ValueError: ``members`` is no integer from 1 to as many as a packed file may hold.
    """

    folder: Path
    recipe: Recipe
    members: int

    def __post_init__(self) -> None:
        check_int("members", self.members, 1, MOST_NETWORKS)

    @property
    def trunk(self) -> tuple[Path, Recipe]:
        """Folder and recipe of the run of the first phase."""
        recipe = replace(self.recipe, method="fpnn", deterministic_epochs=0, epochs=0)
        return self.folder / TRUNK, recipe

    def member(self, index: int) -> tuple[Path, Recipe]:
        """Folder and recipe of a member."""
        return self.folder / f"{MEMBER}{index}", replace(self.recipe, seed=self.recipe.seed + index)

    def runs(self) -> list[Run]:
        """The members as runs; raises as :func:`bqnn.lab.runs.load_run` does."""
        return [load_run(self.member(index)[0]) for index in range(self.members)]

    def load(self) -> Ensemble:
        """The trained networks, not packed; raises as :func:`bqnn.lab.runs.load_network` does."""
        return Ensemble([load_network(run) for run in self.runs()])

    def check_same(self, recipe: Recipe, members: int) -> None:
        """Raises ValueError, with what differs, unless recipe and number of members are these."""
        path = self.folder / MEMBERS
        check_same(path, asdict(self.recipe), recipe)
        if members != self.members:
            raise ValueError(f"{path} is of {self.members} members, now there are {members}")


def load_ensemble_run(folder: Path) -> EnsembleRun | None:
    """What ``folder``/members.json says; None where there is none.

    Raises:
        OSError: it can not be read.
        ValueError: it is not what training writes; one line that names the file.
    """
    path = folder / MEMBERS
    if not path.exists():
        return None
    with open_regular(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or set(content) != {"recipe", "members"}:
            raise ValueError(f"it must be an object of recipe and members, got {content!r:.80}")
        return EnsembleRun(folder, read_recipe(content["recipe"]), content["members"])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what bqnn train writes: {shown(str(error))}") from error


def recipe_in(folder: Path) -> Recipe | None:
    """The recipe of the run in ``folder``, of an ensemble or not; None where there is no run."""
    ensemble = load_ensemble_run(folder)
    if ensemble is not None:
        return ensemble.recipe
    return load_run(folder).recipe if (folder / METRICS).exists() else None


def parts_of(folder: Path) -> list[Path]:
    """The folders of the trunk and the members in ``folder`` that hold a run."""
    candidates = (folder / TRUNK, *sorted(folder.glob(f"{MEMBER}*")))
    return [part for part in candidates if any((part / name).exists() for name in (CHECKPOINT, WEIGHTS, METRICS))]


def clear_ensemble_run(folder: Path) -> None:
    """Removes what the training of members writes into ``folder``, and nothing else.

    Raises:
        OSError: another process is writing a member.
    """
    for part in parts_of(folder):
        with RunLock(part):
            clear_run(part)
        with contextlib.suppress(OSError):  # what else is in it stays
            part.rmdir()
    (folder / MEMBERS).unlink(missing_ok=True)


class EnsembleTrainer:
    """The training of an ensemble: of its trunk, then of one member after the other.

    Args:
        run: its folder, recipe and number of members.
        init: a model.safetensors of the full-precision network, in place of the training of the trunk.
        processes: that train it together.
        options: for every :class:`bqnn.lab.train.Trainer`: ``data_root``, ``device`` and ``download``.

    Raises:
        ValueError, FileNotFoundError: as Trainer does.
    """

    def __init__(
        self,
        run: EnsembleRun,
        *,
        init: str | Path | None = None,
        processes: Processes = ALONE,
        **options: Any,
    ) -> None:
        self.run, self.lock = run, RunLock(run.folder) if processes.leads else contextlib.nullcontext()
        self._options, self.processes = {**options, "processes": processes}, processes
        # Made here, it says what is wrong before anything is written.
        self._trunk = Trainer(run.trunk[1], run.trunk[0], **self._options, init=init)

    def train(self, progress: bool = True, log: Callable[[str], object] = print_now) -> None:
        """Trains what is not trained yet, each from where it stands.

        Args:
            progress: show a bar for each epoch.
            log: takes a line for each epoch, which begins with the name of the run.

        Raises:
            FloatingPointError, OSError, ValueError: as Trainer's ``run`` and ``resume`` do.
        """
        with self.lock:
            run = self.run
            if self.processes.leads:
                text = json.dumps({"recipe": asdict(run.recipe), "members": run.members}, indent=1)
                write_content(run.folder / MEMBERS, text)
            if not self._is_finished(*run.trunk):
                _finish(self._trunk, progress, log)
            for index in range(run.members):
                folder, recipe = run.member(index)
                if not self._is_finished(folder, recipe):
                    _finish(Trainer(recipe, folder, **self._options, init=run.trunk[0] / WEIGHTS), progress, log)

    def _is_finished(self, folder: Path, recipe: Recipe) -> bool:
        """Whether the run in ``folder`` has its weights; ValueError where it is of another recipe."""
        if not self.processes.leads:
            return self.processes.from_leader(None)
        finished = (folder / WEIGHTS).exists()
        if finished:
            check_same(folder / METRICS, asdict(load_run(folder).recipe), recipe)
        return self.processes.from_leader(finished)


def _finish(trainer: Trainer, progress: bool, log: Callable[[str], object]) -> None:
    """Trains a part of an ensemble to its end, from where it stands."""

    def named(line: str) -> None:
        log(f"{trainer.folder.name:<10}{line}")

    with trainer.lock:
        trainer.resume(named)
        trainer.run(progress, named)
