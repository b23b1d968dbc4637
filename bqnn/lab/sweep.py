"""Sweeps: many runs of one recipe with other values in some of its fields, chosen by Optuna or all of a grid.

A sweep is a TOML file::

    recipe = "lenet5-mnist"         # a built-in recipe, or a file
    trials = 40                     # how many runs; of a grid, all that there are
    sampler = "search"              # or "grid"
    minimize = ["error", "bytes"]   # one or two of error, nll (on the validation images) and bytes (of the packed file)
    init = "runs/trunk/model.safetensors"

    [fixed]                         # fields of the recipe for all runs
    epochs = 2

    [search]                        # fields of the recipe to choose: of a list, or between two numbers
    num_levels = [2, 3, 4]
    bayes_lr = { low = 1e-3, high = 1e-2, log = true }

    [search.layer_levels]           # M of single layers
    conv1 = [2, 4, 8]

Its folder has ``study.log``, Optuna's journal, and the runs ``trial-0``, ``trial-1`` and so on. Any number of
processes, on machines that share the folder, may work on it at a time; each takes the next run, or goes on with one
that nobody is writing any more.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from bqnn.core.check import check_int
from bqnn.core.extras import needs
from bqnn.core.files import open_regular
from bqnn.core.text import shown
from bqnn.lab.folder import PACKED, print_now
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import load_recipe, parsed_toml
from bqnn.lab.runs import save_packed
from bqnn.lab.train import Trainer

if TYPE_CHECKING:
    import optuna

OBJECTIVES = ("error", "nll", "bytes")
SAMPLERS = ("search", "grid")
MOST_TRIALS = 100_000
STUDY, LOCK, TRIAL = "study.log", ".sweep-lock", "trial-"
LAYER = "layer_levels."
"""What the names of parameters begin with that are M of a single layer."""
_RANGE = {"low": (int, float), "high": (int, float), "log": (bool,)}


class Range(NamedTuple):
    """Between two numbers, integers where both are; evenly in the logarithm, or not."""

    low: float
    high: float
    log: bool = False


Choices = tuple[Any, ...] | Range


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says.

    Raises:
        ValueError: a field has a value that it can not have.
    """

    base: Recipe
    search: Mapping[str, Choices]
    trials: int
    sampler: str = "search"
    minimize: tuple[str, ...] = ("error", "bytes")
    init: str | None = None

    def __post_init__(self) -> None:
        check_int("trials", self.trials, 1, MOST_TRIALS)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r:.80}")
        known = set(self.minimize) <= set(OBJECTIVES) and len(set(self.minimize)) == len(self.minimize)
        if not known or not 1 <= len(self.minimize) <= 2:
            raise ValueError(f"minimize must be one or two of {', '.join(OBJECTIVES)}, got {list(self.minimize)!r:.80}")
        if self.base.method == "fpnn" and "bytes" in self.minimize:
            raise ValueError("minimize can't have bytes where method is fpnn: the network is not packed")
        if not self.search:
            raise ValueError("search must have a field of the recipe or more, got none")
        for name, choices in self.search.items():
            values = [choices.low, choices.high] if isinstance(choices, Range) else choices
            for value in values:
                self.recipe({name: value})  # what a field can not be, it says

    def recipe(self, parameters: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial."""
        levels = " ".join(f"{name.removeprefix(LAYER)}={m}" for name, m in parameters.items() if name.startswith(LAYER))
        chosen = {name: value for name, value in parameters.items() if not name.startswith(LAYER)}
        if levels:
            chosen["layer_levels"] = levels
        return Recipe.of_fields({**asdict(self.base), **chosen})

    def grid(self) -> Iterator[dict[str, Any]]:
        """The parameters of all trials of a grid."""
        for values in itertools.product(*self.search.values()):
            yield dict(zip(self.search, values))

    def described(self) -> str:
        """All of it but the number of trials, as JSON: what the trials of one study have in common."""
        return json.dumps({**asdict(self), "trials": None}, sort_keys=True)


def load_sweep(path: str | os.PathLike[str]) -> Sweep:
    """The sweep of a file; paths of a recipe and of ``init`` in it are relative to the working directory.

    Raises:
        ValueError: it is no TOML, or a field is unknown, missing, or of a wrong type or value; one line that names it.
        OSError: it can not be read.
    """
    with open_regular(Path(path).expanduser()) as file:
        text = file.read()
    try:
        return _sweep_of(parsed_toml(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is no sweep: {shown(str(error))}") from error


def _sweep_of(content: dict[str, Any]) -> Sweep:
    kinds = {"recipe": str, "trials": int, "sampler": str, "minimize": list, "init": str, "fixed": dict, "search": dict}
    for name, value in content.items():
        if name not in kinds:
            raise ValueError(f"it has the unknown field {name!r:.80}")
        if type(value) is not kinds[name]:
            raise ValueError(f"{name} must be of type {kinds[name].__name__}, got {value!r:.80}")
    base = load_recipe(content["recipe"]) if "recipe" in content else Recipe()
    base = Recipe.of_fields({**asdict(base), **content.get("fixed", {})})
    search: dict[str, Choices] = {}
    for name, value in content.get("search", {}).items():
        if name == LAYER.rstrip(".") and isinstance(value, dict):
            search |= {LAYER + layer: _choices(LAYER + layer, each) for layer, each in value.items()}
        else:
            search[name] = _choices(name, value)
    options: dict[str, Any] = {name: content[name] for name in ("sampler", "init") if name in content}
    if "minimize" in content:
        options["minimize"] = tuple(content["minimize"])
    is_grid = options.get("sampler") == "grid"
    if is_grid and "trials" in content:
        raise ValueError("trials can't be given of a grid, which is run as a whole")
    if is_grid and any(isinstance(choices, Range) for choices in search.values()):
        raise ValueError("search must have lists alone where sampler is grid")
    if not is_grid and "trials" not in content:
        raise ValueError("it must have the field 'trials'")
    trials = math.prod(map(len, search.values())) if is_grid else content["trials"]
    return Sweep(base, search, trials, **options)


def _choices(name: str, value: Any) -> Choices:
    if isinstance(value, list) and value:
        return tuple(value)
    if isinstance(value, dict) and {"low", "high"} <= set(value) <= set(_RANGE):
        if all(type(number) in _RANGE[field] for field, number in value.items()):
            chosen = Range(**value)
            if chosen.low < chosen.high and (chosen.low > 0 or not chosen.log):
                return chosen
    raise ValueError(
        f"{name} of search must be a list of values, or {{ low, high }} with low < high and, if log is true, "
        f"low > 0, got {value!r:.80}"
    )


class Trial(NamedTuple):
    """A run of a sweep that is over: its number, what was chosen, and what came of it, None where it failed."""

    number: int
    parameters: dict[str, Any]
    values: dict[str, float] | None
    best: bool
    """Whether no other trial is better: of two objectives, in one without being worse in the other."""


class Sweeper:
    """Works on a sweep in a folder.

    Args:
        options: of every :class:`bqnn.lab.train.Trainer`: ``data_root``, ``device`` and ``download``.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
        ValueError: the folder has the study of another sweep.
    """

    def __init__(self, sweep: Sweep, folder: Path, **options: Any) -> None:
        self.sweep, self.folder, self._options = sweep, folder, options
        with needs("sweep"):
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        with self._claiming():
            storage = JournalStorage(JournalFileBackend(str(folder / STUDY)))
            directions = [optuna.study.StudyDirection.MINIMIZE] * len(sweep.minimize)
            self.study = optuna.create_study(
                storage=storage, study_name="sweep", directions=directions, load_if_exists=True
            )
            described = sweep.described()
            stored = self.study.user_attrs.get("sweep")
            if stored not in (None, described):
                raise ValueError(f"{folder} has the trials of another sweep")
            if stored is None:
                self.study.set_user_attr("sweep", described)
                for parameters in sweep.grid() if sweep.sampler == "grid" else ():
                    self.study.enqueue_trial(parameters)

    def run(self, progress: bool = True, log: Callable[[str], object] = print_now) -> None:
        """Runs trials until there are no more to begin, and none that somebody left.

        Raises:
            OSError, ValueError: as :class:`bqnn.lab.train.Trainer` does; the trial can be gone on with.
        """
        while True:
            with ExitStack() as stack:
                number = self._claim(stack)
                if number is None:
                    return
                self._finish(number, progress, log)

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        with FileLock(self.folder / LOCK, thread_local=False):
            yield

    def _claim(self, stack: ExitStack) -> int | None:
        """The number of a trial that is this process's until ``stack`` ends; None where there is none left."""
        import optuna

        with self._claiming():
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == optuna.trial.TrialState.RUNNING:
                    with suppress(Timeout):  # somebody else works on it
                        stack.enter_context(self._owning(trial.number))
                        return int(trial.number)
            begun = sum(trial.state != optuna.trial.TrialState.WAITING for trial in trials)
            if begun >= self.sweep.trials:
                return None
            # A sampler for each trial: no two draw the same, and a sweep that was stopped goes on as it would have.
            self.study.sampler = optuna.samplers.TPESampler(
                seed=self.sweep.base.seed * MOST_TRIALS + begun, multivariate=True, constant_liar=True
            )
            asked = self.study.ask()
            for name, choices in self.sweep.search.items():
                _suggest(asked, name, choices)
            stack.enter_context(self._owning(asked.number))
            return int(asked.number)

    def _owning(self, number: int) -> FileLock:
        """What the one process holds that works on a trial; the system takes it from a process that dies."""
        return FileLock(self.folder / f".{TRIAL}{number}", timeout=0, thread_local=False)

    def trial_folder(self, number: int) -> Path:
        """The folder of a trial's run."""
        return self.folder / f"{TRIAL}{number}"

    def _finish(self, number: int, progress: bool, log: Callable[[str], object]) -> None:
        import optuna

        parameters = self.study.get_trials(deepcopy=False)[number].params
        folder = self.trial_folder(number)
        trainer = Trainer(self.sweep.recipe(parameters), folder, init=self.sweep.init, **self._options)
        if not len(trainer.data.validation):
            raise ValueError("validation must leave images to compare trials on, got 0")

        def named(line: str) -> None:
            log(f"{folder.name:<10}{line}")

        trainer.resume(named)
        try:
            net = trainer.run(progress, named)
        except FloatingPointError as error:
            named(str(error))
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
            return
        last = trainer.history[-1]
        found = {"error": last["validation_error"], "nll": last["validation_nll"]}
        if "bytes" in self.sweep.minimize:
            save_packed(net, folder / PACKED)
            found["bytes"] = (folder / PACKED).stat().st_size
        self.study.tell(number, [found[name] for name in self.sweep.minimize])
        named("  ".join(f"{name} {found[name]:,.5g}" for name in self.sweep.minimize))

    def trials(self) -> list[Trial]:
        """The trials that are over, the best first, in the order of the first objective."""
        best = {trial.number for trial in self.study.best_trials}
        over = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        rows = [
            Trial(
                trial.number,
                trial.params,
                dict(zip(self.sweep.minimize, trial.values)) if trial.values else None,
                trial.number in best,
            )
            for trial in over
        ]
        return sorted(rows, key=lambda row: (not row.best, row.values is None, *(row.values or {}).values()))


def _suggest(trial: optuna.Trial, name: str, choices: Choices) -> None:
    if not isinstance(choices, Range):
        trial.suggest_categorical(name, choices)
    elif isinstance(choices.low, int) and isinstance(choices.high, int):
        trial.suggest_int(name, choices.low, choices.high, log=choices.log)
    else:
        trial.suggest_float(name, choices.low, choices.high, log=choices.log)
