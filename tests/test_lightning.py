"""The callback of Lightning: it trains what fit trains, resumes, and refuses what it can not do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.bayes.layers import bayes_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning, of the extra lightning, is not installed")
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    import bqnn.lightning
    from bqnn.lightning import ThreePhases

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: what it would rather have of so small a training

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()


class Batches:
    """A loader that says how many batches it has and nothing else; Lightning takes a list for several loaders."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


BATCHES = Batches([(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)])
EPOCHS = (1, 2, 2)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
    """What a user has, without a word about quantization."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or make_net()
        self.validated: list[float] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.validated.append(F.cross_entropy(self(x), y).item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e9)


class Seeds(Callback):  # type: ignore[misc]
    """Noise that is the same in an epoch, whatever was before it."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(trainer.current_epoch)


class Log(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.records.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def trainer(*callbacks: Any, max_epochs: int = 5, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        **{"enable_checkpointing": False, **quiet, **options},
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_trains_to_the_bits_of_fit() -> None:
    options: dict[str, Any] = {"num_levels": 4, "prior": "mixture", "weight_decay": 0.1}
    expected = bqnn.fit(make_net(), BATCHES, validation=BATCHES, epochs=EPOCHS, dataset_size=48, seed=7, **options)
    module, log = Module(), Log()
    torch.manual_seed(7)
    trainer(ThreePhases(EPOCHS, dataset_size=48, **options), log).fit(module, BATCHES, BATCHES)
    assert same(module.net.cpu(), expected.net)
    for found, record in zip(log.records, expected.history, strict=True):
        assert found["train_nll"] == pytest.approx(record["nll"], rel=1e-5)
        assert found["train_kl"] == pytest.approx(record["kl"], rel=1e-5)
    assert log.records[-1]["train_kl"] > 0 == log.records[2]["train_kl"]
    # Validation is of the quantized network, with statistics of its own.
    validated = [sum(module.validated[i : i + 3]) / 3 for i in range(0, 15, 3)]
    assert validated == pytest.approx([record["validation_nll"] for record in expected.history], rel=1e-5)
    torch.testing.assert_close(bqnn.pack(module.net.eval())(X), module.net(X), rtol=1e-4, atol=1e-5)


def test_the_trainers_epochs_are_shared_out() -> None:
    module = Module()
    trainer(ThreePhases(dataset_size=48), max_epochs=4).fit(module, BATCHES)
    assert {layer.estimator for layer in bayes_layers(module).values()} == {"moment"}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 16)
    converted = Module(bqnn.convert(make_net(), 2))
    trainer(ThreePhases(), max_epochs=2).fit(converted, loader)
    assert {layer.num_levels for layer in bayes_layers(converted).values()} == {2}


@pytest.mark.parametrize("epoch", range(4))
def test_a_checkpoint_resumes_to_the_same_bits(epoch: int, tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    parts = ThreePhases(EPOCHS, dataset_size=48), Seeds(), checkpoints
    whole, resumed = Module(), Module()
    trainer(*parts, enable_checkpointing=True).fit(whole, BATCHES)
    callbacks = ThreePhases(EPOCHS, dataset_size=48), Seeds()
    trainer(*callbacks).fit(resumed, BATCHES, ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"), weights_only=False)
    assert same(whole, resumed)


def test_phases_without_epochs_give_the_quantized_network() -> None:
    expected = bqnn.fit(make_net(), BATCHES, epochs=(2, 0, 0), dataset_size=48, seed=7)
    module = Module()
    torch.manual_seed(7)
    trainer(ThreePhases((2, 0, 0), dataset_size=48), max_epochs=2).fit(module, BATCHES)
    assert same(module.net.cpu(), expected.net)


@pytest.mark.parametrize("epochs", [None, EPOCHS, (2, 0, 0)], ids=["shared", "given", "first-phase"])
@pytest.mark.parametrize("steps", [True, 2], ids=["one-step", "two-steps"])
def test_a_fast_dev_run_takes_its_steps_in_the_last_phase(epochs: Any, steps: Any) -> None:
    module, before = Module(), make_net().state_dict()
    run = trainer(ThreePhases(epochs, dataset_size=48), fast_dev_run=steps)
    run.fit(module, BATCHES, BATCHES)
    assert run.global_step == len(module.validated) == int(steps)
    assert {layer.estimator for layer in bayes_layers(module).values()} == {"moment"}
    assert run.callback_metrics["train_kl"] > 0
    state = module.net.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert not torch.equal(state["0.weight"], before["0.weight"])
    assert not torch.equal(state["1.running_mean"], before["1.running_mean"])
    torch.testing.assert_close(bqnn.pack(module.net.eval())(X), module.net(X), rtol=1e-4, atol=1e-5)


def test_accumulated_batches_have_the_divergence_once() -> None:
    nets = []
    for repeats in (1, 2):
        net = bqnn.convert(make_net()[3], 3, estimator="sample", start_sigma=1e-3)
        module = Module(nn.Sequential(nn.Linear(6, 8), nn.Sequential(net)))
        module.net[0].load_state_dict(make_net()[0].state_dict())
        callback = ThreePhases((0, 0, 3), dataset_size=48, kl_warmup=0.0)
        batches = Batches([(X[:16], Y[:16])] * repeats)
        trainer(callback, max_epochs=3, accumulate_grad_batches=repeats).fit(module, batches)
        nets.append(module.net)
    for first, second in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class NoForward(pl.LightningModule):  # type: ignore[name-defined, misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


class Infinite(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float("inf")


SIZE: dict[str, Any] = {"dataset_size": 48}


@pytest.mark.parametrize(
    ("module", "arguments", "batches", "error", "message"),
    [
        (Module, {"epochs": (1, 1, 1), **SIZE}, BATCHES, ValueError, "epochs must be the 5 max_epochs of the trainer"),
        (Module, {"epochs": (1, -1, 5), **SIZE}, BATCHES, ValueError, "epochs must be at least 0"),
        (Module, {"bayes_lr": 0.0, **SIZE}, BATCHES, ValueError, "bayes_lr must be positive"),
        (Module, {"num_levels": 17, **SIZE}, BATCHES, ValueError, "num_levels must be from 2 to 16"),
        (Module, {}, BATCHES, ValueError, "dataset_size must be given"),
        (
            Module,
            SIZE,
            Batches([{"x": X, "y": Y}]),
            TypeError,
            "inputs must be given where a batch is no pair .* got dict of 2",
        ),
        (ByHand, SIZE, BATCHES, ValueError, "automatic_optimization"),
        (NoForward, SIZE, BATCHES, ValueError, "the module must have a forward"),
        (Infinite, SIZE, BATCHES, FloatingPointError, "the loss of epoch 1 is nan; a smaller lr"),
    ],
    ids=["sum", "negative", "rate", "levels", "size", "inputs", "by-hand", "no-forward", "infinite"],
)
def test_what_can_not_be_is_refused(
    module: Any, arguments: dict[str, Any], batches: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer(ThreePhases(**arguments)).fit(module(), batches)


@pytest.mark.parametrize(
    ("imported", "installed", "expected"),
    [
        ((), ("lightning", "pytorch_lightning"), "lightning.pytorch"),
        ((), ("pytorch_lightning",), "pytorch_lightning"),
        (("pytorch_lightning",), ("lightning", "pytorch_lightning"), "pytorch_lightning"),
        (("lightning.pytorch", "pytorch_lightning"), (), "lightning.pytorch"),
        ((), (), "lightning.pytorch"),
    ],
)
def test_lightning_has_two_names(
    imported: tuple[str, ...], installed: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bqnn.lightning, "sys", SimpleNamespace(modules=dict.fromkeys(imported)))
    monkeypatch.setattr(bqnn.lightning, "find_spec", lambda name: name in installed)
    assert bqnn.lightning._name_of_lightning() == expected


def test_arguments_that_are_wrong_without_a_trainer() -> None:
    with pytest.raises(ValueError, match="dataset_size must be from 1"):
        ThreePhases(dataset_size=0)
    with pytest.raises(TypeError, match="inputs must be a function"):
        ThreePhases(inputs="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trainer must have max_epochs, .* got -1"):
        trainer(ThreePhases(), max_epochs=-1).fit(Module(), BATCHES)
    converted = Module(bqnn.convert(make_net(), 2))
    with pytest.raises(ValueError, match="num_levels can't be given for a net that has Bayes layers"):
        trainer(ThreePhases(num_levels=3)).fit(converted, BATCHES)
