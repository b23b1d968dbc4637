"""Runs of the command: training in the phases of a recipe, with a checkpoint an epoch that a kill can't break.

What a phase, its optimizer and a step are is in bqnn.training; here are the data, the checkpoints and the records.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bqnn import models
from bqnn.bayes.batchnorm import refresh_batchnorm
from bqnn.bayes.convert import convert
from bqnn.bayes.layers import bayes_layers
from bqnn.core.checkpoint import digest_of, write_checkpoint
from bqnn.core.files import open_regular, remove_leftovers, write_content
from bqnn.core.text import shown
from bqnn.data.augment import augment
from bqnn.data.splits import Splits, batches, leaves_one, load_dataset, normalise
from bqnn.lab.checkpoint import check_progress, read_checkpoint
from bqnn.lab.evaluate import evaluate, statistics_batches
from bqnn.lab.folder import (
    CHECKPOINT,
    DATA,
    IMAGES,
    METADATA,
    METRICS,
    SPLITS,
    WEIGHTS,
    RunLock,
    check_history,
    check_same,
    print_now,
    read_scores,
)
from bqnn.lab.labels import metadata_of
from bqnn.lab.precision import autocast
from bqnn.lab.processes import ALONE, Processes
from bqnn.lab.progress import describe, progress_bar
from bqnn.lab.recipe import LAYER_OPTIONS, Recipe
from bqnn.reports.report import report
from bqnn.training.epoch import Objective, train_epoch
from bqnn.training.phases import (
    BAYES,
    DETERMINISTIC,
    FULL_PRECISION,
    check_finite,
    enter_phase,
    make_optimizer,
    restore_cycle,
)


def build_network(recipe: Recipe, data: Splits, phase: int = BAYES) -> nn.Module:
    """The network of a phase, freshly initialised, from training images where it is made of them."""
    sizes = {"in_channels": data.in_channels, "num_classes": data.num_classes, "image_size": data.image_size}
    net = models.build(recipe.model, sizes)
    net.initialise(statistics_batches(data, recipe.seed, torch.device("cpu")))
    return quantize(net, recipe, phase)


def quantize(net: nn.Module, recipe: Recipe, phase: int = BAYES) -> nn.Module:
    """``net`` as the recipe trains it in ``phase``: converted, if it is not yet, or itself at full precision."""
    if phase == FULL_PRECISION or recipe.method == "fpnn":
        return net
    if not bayes_layers(net):
        net.requires_grad_(True)  # of what a network freezes nothing is left when it is quantized: it learns again
        options = {name: getattr(recipe, name) for name in LAYER_OPTIONS}
        net = convert(net, recipe.num_levels, overrides=recipe.layer_options, **options)
    enter_phase(net, phase, dict.fromkeys(bayes_layers(net), recipe.estimator))
    return net


class Trainer:
    """One run: a recipe, its data, its folder, and the state that a checkpoint holds.

    Args:
        recipe: what to do.
        folder: where checkpoint.pt, model.safetensors and metrics.json go.
        data_root: where the data sets are.
        device: "cpu" or "cuda".
        download: let torchvision download what is missing.
        init: a model.safetensors of the full-precision network, in place of the first phase, or of a quantized one with
            as many levels, in place of the first two; their epochs are not run.
        processes: that train it together.

    Raises:
        ValueError: the network or the data set does not fit the recipe, or ``init`` does not fit the network.
        FileNotFoundError: the data or ``init`` is not there.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        *,
        data_root: str | Path = "data",
        device: str = "cpu",
        download: bool = False,
        init: str | Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, Path(folder), torch.device(device)
        self.from_init, self.processes = init is not None, processes
        processes.check_batch_size(recipe.batch_size)
        self.data = load_dataset(
            recipe.dataset, data_root, image_size=recipe.image_size, validation=recipe.validation, download=download
        )
        if self.data.num_classes < 2:
            raise ValueError(f"dataset must have two classes or more, got one: {shown(self.data.classes[0])}")
        if self.steps_an_epoch == 0:
            raise ValueError(
                f"dataset must have at least {2 * processes.size} images to train on, got {len(self.data.train)}"
            )
        self.lock = RunLock(self.folder) if processes.leads else nullcontext()
        self.resumed_from: bytes | None = None  # the digest of the checkpoint
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.scores: dict[str, Any] = {}  # what `bqnn eval` has added to metrics.json
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.net = build_network(recipe, self.data, FULL_PRECISION)
        if recipe.batch_size == 1 and any(isinstance(module, nn.BatchNorm1d) for module in self.net.modules()):
            raise ValueError(f"batch_size must be at least 2, since {recipe.model} has BatchNorm, got 1")
        if unknown := set(recipe.layer_options).difference(name for name, _ in self.net.named_modules()):
            raise ValueError(f"layer_levels names {min(unknown)}, which is no layer of {recipe.model}")
        if init is not None:
            self._load_init(init)
        self._start_phase(quantize(self.net, recipe, self.phase))

    @property
    def phase(self) -> int:
        """FULL_PRECISION, DETERMINISTIC or BAYES: the phase of the next epoch."""
        return self.recipe.locate(self.epoch)[0]

    @property
    def drop_last(self) -> bool:
        """Whether the last batch of an epoch is left out, being too few images; other ones every epoch."""
        return leaves_one(len(self.data.train), self.recipe.batch_size, self.processes.size)

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.recipe.batch_size) - self.drop_last

    def _load_init(self, init: str | Path) -> None:
        open_regular(init).close()
        recipe = self.recipe
        try:
            weights = load_file(init)
            self.epoch = recipe.pretrain_epochs
            if recipe.method == "bayes" and any(name.endswith("raw_levels") for name in weights):
                self.epoch += recipe.deterministic_epochs
                self.net = quantize(self.net, recipe, DETERMINISTIC)
            self.net.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            kinds = f"a full-precision {recipe.model}"
            if recipe.method == "bayes":
                kinds += f" or one of {recipe.num_levels} levels"
            raise ValueError(f"init must be {kinds}, got {init}: {error}") from error

    def _start_phase(self, net: nn.Module) -> None:
        self.net = net.to(self.device)
        self.together = self.processes.together(self.net)
        _, epochs, lr = self.recipe.phases[self.phase]
        steps = max(1, epochs * self.steps_an_epoch)
        self.optimizer, self.scheduler = make_optimizer(self.net, self.phase, lr, steps, self.recipe.rates)

    def run(self, progress: bool = True, log: Callable[[str], object] = print_now) -> nn.Module:
        """Trains to the end from where the run stands, and returns the network in evaluation mode.

        Args:
            progress: show a bar for each epoch.
            log: takes a line for each epoch.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the checkpoint of the epoch before is still there.
            OSError: a file can not be written, another process is writing the run, or has been since :meth:`resume`.
        """
        with self.lock:
            return self._run(progress, log)

    def _run(self, progress: bool, log: Callable[[str], object]) -> nn.Module:
        if self.processes.leads:
            if self.resumed_from not in (None, digest_of(self.folder / CHECKPOINT)):
                raise OSError(f"{self.folder / CHECKPOINT} has been replaced since this run read it; resume again")
            for name in (CHECKPOINT, WEIGHTS, METRICS):
                remove_leftovers(self.folder / name)
        if not self.history:
            self.save_checkpoint()
        while self.epoch < self.recipe.total_epochs:
            record, phase = self._run_epoch(progress), self.phase
            self.history.append(record)
            self.epoch += 1
            if self.phase != phase:
                self._start_phase(quantize(self.net, self.recipe, self.phase))
            self.save_checkpoint()
            log(describe(record, self.recipe.total_epochs))
        self.net.eval()
        if self.processes.leads:
            self._write_weights()
            self._write_metrics()
        return self.net

    def _batches(self, progress: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the next epoch, as the network takes them."""
        data, recipe = self.data, self.recipe
        rows = batches(data.train, recipe.batch_size, self.generator, shuffle=True, drop_last=self.drop_last)
        for images, labels in (
            progress_bar(rows, f"epoch {self.epoch + 1}/{recipe.total_epochs}", self.steps_an_epoch)
            if progress
            else rows
        ):
            # Every process makes all images, so that they are the same whatever the number of processes.
            x = augment(normalise(images, data.mean, data.std), self.generator, recipe.augment)
            x, labels = self.processes.part(x), self.processes.part(labels)
            # Convolutions of many channels take a third less time so; the layers keep the layout that they are given.
            yield x.to(self.device, memory_format=torch.channels_last), labels.to(self.device)

    def _run_epoch(self, progress: bool) -> dict[str, Any]:
        recipe, started = self.recipe, time.perf_counter()
        phase, done = recipe.locate(self.epoch)
        likelihood = partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
        context = autocast(recipe, self.device)
        size, weight = len(self.data.train), recipe.kl_weight
        objective = Objective(likelihood, size, recipe.kl_warmup, autocast=context, kl_weight=weight)
        self.processes.draw_own_noise(recipe.seed, self.epoch)
        drawn, steps = self._batches(progress), self.steps_an_epoch
        own = train_epoch(self.together, drawn, self.optimizer, self.scheduler, objective, done, steps)
        means = self.processes.mean(own)
        check_finite(means.loss, self.epoch + 1, phase, recipe.phases[phase].lr)
        layers = bayes_layers(self.net)
        with context:
            if layers:
                refresh_batchnorm(self.net, statistics_batches(self.data, recipe.seed, self.device))
            error, validation_nll = self._validate()
        codebooks = report(self.net) if layers else None
        return {
            "epoch": self.epoch + 1,
            "phase": recipe.phases[phase if layers else FULL_PRECISION].name,
            **means._asdict(),
            "validation_error": error,
            "validation_nll": validation_nll,
            "quantization_loss": codebooks.quantization_loss if codebooks else None,
            "near_share": codebooks.near_share if codebooks else None,
            "seconds": time.perf_counter() - started,
        }

    def _validate(self) -> tuple[float | None, float | None]:
        if len(self.data.validation) == 0 or not self.processes.leads:
            return None, None
        score = evaluate(self.net, self.data.validation, self.data)
        return score.error, score.nll

    def save_checkpoint(self) -> None:
        """Writes checkpoint.pt and metrics.json, each whole or not at all; the first process alone does."""
        if not self.processes.leads:
            return
        state = {
            "recipe": asdict(self.recipe),
            "init": self.from_init,
            "epoch": self.epoch,
            "history": self.history,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "threads": torch.get_num_threads(),
        }
        write_checkpoint(self.folder / CHECKPOINT, state)
        self._write_metrics()

    def resume(self, log: Callable[[str], object] = print_now) -> bool:
        """Goes back to the last whole checkpoint of the folder; False where there is none yet.

        ``log`` takes a line where the number of threads is another one: sums over threads then round in another way,
        and the run goes on to other bytes than without a stop.

        Raises:
            ValueError: the checkpoint is damaged, or of another recipe, and the message names what differs; or ``init``
                was given for a run that began without one; or the metrics.json beside it is damaged or of another run.
        """
        path = self.folder / CHECKPOINT
        found = self.processes.from_leader(self._read() if self.processes.leads else None)
        if found is None:
            return False
        state, scores, digest = found
        try:
            check_history(state["history"])
            check_progress(state, self.recipe)
            self._restore(state)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is not of this run: {shown(str(error))}") from error
        self.scores, self.resumed_from = scores, digest
        if (threads := torch.get_num_threads()) != state["threads"]:
            log(f"{path} was written with {state['threads']} threads, now there are {threads}: the bytes will differ")
        return True

    def _read(self) -> tuple[dict[str, Any], dict[str, Any], bytes] | None:
        """The state in the checkpoint of the folder, the scores beside it and its digest; None where there is none."""
        path = self.folder / CHECKPOINT
        digest = digest_of(path)
        if digest is None:
            if left := [name for name in (WEIGHTS, METRICS) if (self.folder / name).exists()]:
                raise ValueError(
                    f"{path} is not there, but {' and '.join(left)} of its run: there is nothing to resume"
                )
            return None
        state = read_checkpoint(path)
        check_same(path, state["recipe"], self.recipe)
        if self.from_init and not state["init"]:
            raise ValueError(f"init can't be given for {path}, whose run began without one")
        return state, read_scores(self.folder / METRICS, SPLITS, self.recipe), digest

    def _restore(self, state: dict[str, Any]) -> None:
        self.from_init, self.epoch, self.history = state["init"], state["epoch"], state["history"]
        self._start_phase(build_network(self.recipe, self.data, self.phase))
        self.net.load_state_dict(state["net"])
        restore_cycle(self.optimizer, self.scheduler, state["optimizer"], state["scheduler"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_generator"].cpu())

    def _write_weights(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        # One entry: safetensors writes several in an order that changes from process to process.
        about = {"recipe": asdict(self.recipe), "factory": self.net.factory, DATA: metadata_of(self.data).known()}
        metadata = {METADATA: json.dumps(about)}
        blob = save(tensors, metadata)
        write_content(self.folder / WEIGHTS, blob)

    def _write_metrics(self) -> None:
        images = {name: len(getattr(self.data, name)) for name in IMAGES}
        stored = {"recipe": asdict(self.recipe), "history": self.history, "images": images, **self.scores}
        text = json.dumps(stored, indent=1)
        write_content(self.folder / METRICS, text)
