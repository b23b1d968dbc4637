"""Graphs as torch runs them, for a GPU: on the CPU against the float64 reference, recorded by a stand-in, and on a GPU
where there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bqnn
from bqnn.core.codes import pack_codes
from bqnn.engine import replay
from bqnn.engine.compiled import CPU
from bqnn.engine.graph import RELU, Graph, Node, Value
from bqnn.engine.partition import TorchPart
from bqnn.engine.reference import run
from bqnn.engine.replay import Replay
from bqnn.engine.torch_program import TorchProgram
from bqnn.models import build
from bqnn.packed.base import PackedLayer
from tests.support.compiled import Function, packed
from tests.support.draw_graphs import ACTIVATIONS, draw_graph
from tests.support.helpers import run_with
from tests.support.programs import check_near, of_batch
from tests.support.reads import NothingIsRead
from tests.support.recorded import Recorded, Stream, graphs_stand_in

BF16_TOLERANCE = 0.1
"""Of the norm, over up to twenty nodes that each round to 8 bits; and a tenth of it an element, where they cancel."""


def check_drawn_graph(seed: int) -> None:
    """In both precisions, against the float64 reference."""
    graph, inputs = draw_graph(seed)
    given = of_batch(inputs, (1, 2, 3, 7)[seed % 4])
    expected = run(graph, given)
    check_near(TorchProgram(graph, CPU)(given), expected)
    for y, exact in zip(TorchProgram(graph, CPU, "bf16")(given), expected):
        assert y.dtype == torch.float32
        assert (y - exact).norm() <= BF16_TOLERANCE * exact.norm() + 0.01 * exact.numel() ** 0.5


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_drawn_graphs(first: int) -> None:
    for seed in range(first, first + 40):
        check_drawn_graph(seed)


def by_triton() -> str:
    """In a process that interprets Triton's kernels."""
    from tests.support.interpreter import bfloat16_is_right

    packed = patch.object(PackedLayer, "execution_for", lambda layer, x: "packed")
    with bfloat16_is_right(), packed:
        for seed in range(120, 126):
            check_drawn_graph(seed)
    return "right"


def test_drawn_graphs_by_the_kernels_of_a_gpu() -> None:
    pytest.importorskip("triton")
    variables = {"TRITON_INTERPRET": "1", "BQNN_BACKEND": "triton"}
    assert run_with(variables, "tests.test_torch_program", "by_triton") == "right"


def test_an_empty_batch() -> None:
    graph, inputs = draw_graph(3)
    for y, name in zip(TorchProgram(graph, CPU)([x[:0] for x in inputs]), graph.outputs):
        assert y.shape == (0, *graph.values[name].shape)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (2, 0, 1, 1)], ids=["even", "uneven"])
@pytest.mark.parametrize("scales", [(1.0, 2.0, 0.5), (-1.0, 2.0, -0.5), (0.0, 1.0, 1.0)], ids=["up", "down", "zero"])
def test_scales_of_any_sign_go_into_the_levels(
    scales: tuple[float, ...], padding: tuple[int, ...], residual: bool
) -> None:
    """A channel with the scale 0 has no increasing levels: its layer is a dense one."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "codes": pack_codes(torch.randint(3, (3, 18), dtype=torch.uint8, generator=generator), 3),
        "levels": torch.tensor([[-1.0, 0.25, 1.5]]),
        "scale": torch.tensor(scales),
        "bias": torch.randn(3, generator=generator),
    }
    sizes = {"kernel": (3, 3), "stride": (1, 1), "padding": padding, "dilation": (1, 1), "groups": 1}
    names = ("x", "r") if residual else ("x",)
    values = {name: Value(name, shape) for name, shape in (("x", (2, 5, 6)), ("r", (3, 5, 6)), ("y", (3, 5, 6)))}
    node = Node("conv2d", names, "y", sizes, tensors, RELU)
    graph = Graph(names, ("y",), {name: values[name] for name in (*names, "y")}, (node,))
    graph.check()
    inputs = [torch.randn(2, *values[name].shape, generator=generator) for name in names]
    check_near(TorchProgram(graph, CPU)(inputs), run(graph, inputs))


def test_nothing_is_read_back_and_nothing_comes_from_the_host() -> None:
    """A number that becomes a tensor in a call would be copied from the host."""
    for seed in range(20):
        graph, inputs = draw_graph(seed)
        program = TorchProgram(graph, CPU)
        program(inputs)
        with NothingIsRead() as ops:
            program(inputs)
        assert not [name for name in ops.seen if name.startswith(("lift_fresh", "scalar_tensor"))]


def test_quantized_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="graph must be float32 to run by torch"):
        TorchProgram(draw_graph(0, quantized=True)[0], CPU)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    with graphs_stand_in(monkeypatch) as made:
        yield made


def test_a_batch_size_is_recorded_once_and_replayed(graphs: list[Recorded]) -> None:
    graph, inputs = draw_graph(5)
    replayed = Replay(TorchProgram(graph, CPU))
    generator = torch.Generator().manual_seed(0)
    for batch in (2, 3, 2, 3, 2):
        given = [torch.randn(batch, *x.shape[1:], generator=generator) for x in inputs]
        check_near(replayed(given), run(graph, given))
    assert len(graphs) == 2 and [each.replays for each in graphs] == [3, 2]
    assert len(Stream.waited) == 4, "a call waits for the one before it"


def test_results_stay_as_they_are_when_others_come(graphs: list[Recorded]) -> None:
    graph, inputs = draw_graph(5)
    replayed = Replay(TorchProgram(graph, CPU))
    first = replayed(list(inputs))
    kept = [y.clone() for y in first]
    replayed([x + 1 for x in inputs])
    assert all(map(torch.equal, first, kept))


def test_what_inference_mode_has_recorded_runs_outside_of_it(graphs: list[Recorded]) -> None:
    graph, inputs = draw_graph(5)
    with torch.inference_mode():
        replayed = Replay(TorchProgram(graph, CPU))
        replayed(list(inputs))
    check_near(replayed([x + 1 for x in inputs]), run(graph, [x + 1 for x in inputs]))
    assert len(graphs) == 1


def test_no_more_recordings_are_kept_than_said(graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 2)
    graph, inputs = draw_graph(5)
    replayed = Replay(TorchProgram(graph, CPU))
    for batch in (1, 2, 1, 3, 1, 2):  # 2 was used before 1, and goes when 3 comes
        replayed(of_batch(inputs, batch))
    assert [len(each.calls) > 0 for each in graphs] == [True] * 4
    assert [each.replays for each in graphs] == [3, 1, 1, 1]


def test_no_images_and_a_capture_of_the_callers_run_the_program(graphs: list[Recorded]) -> None:
    graph, inputs = draw_graph(5)
    replayed = Replay(TorchProgram(graph, CPU))
    assert replayed([x[:0] for x in inputs])[0].shape[0] == 0
    outer = Recorded()
    with torch.cuda.graph(outer):
        outputs = replayed(list(inputs))
    assert outer.calls and graphs == [outer]
    kept = [y.clone() for y in outputs]
    for x in inputs:
        x += 1
    outer.replay()
    assert not all(map(torch.equal, outputs, kept))
    check_near(outputs, run(graph, inputs))


def test_threads_take_turns(graphs: list[Recorded]) -> None:
    graph, inputs = draw_graph(5)
    replayed = Replay(TorchProgram(graph, CPU))
    given = [[x * factor for x in inputs] for factor in range(1, 5)]
    found: dict[int, Any] = {}

    def call(index: int) -> None:
        for _ in range(5):
            found[index] = replayed(given[index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graphs) == 1
    for index in range(4):
        check_near(found[index], run(graph, given[index]))


def test_what_torch_runs_moves_along() -> None:
    """Constants, and tensors that a call makes of nothing."""

    def forward(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        with torch.autocast("cpu", enabled=False):  # a graph in the graph
            more = torch.cumsum(x, 1) + torch.zeros(5, device=x.device)
        return F.linear(more * places, torch.ones(4, 5))

    fast = bqnn.compile(Function(forward), torch.randn(3, 5))
    (part,) = [part for part in fast.parts if isinstance(part, TorchPart)]
    moved = part.on(torch.device("meta"))
    assert all(buffer.is_meta for buffer in moved.module.buffers())
    graphs = [module.graph for module in moved.module.modules() if isinstance(module, fx.GraphModule)]
    places = [node.kwargs["device"].type for graph in graphs for node in graph.nodes if "device" in node.kwargs]
    assert len(graphs) > 1 and set(places) == {"meta"}
    (y,) = moved.module(*(torch.empty(2, 5, device="meta") for _ in part.inputs))
    assert y.is_meta and y.shape[0] == 2
    assert not any(buffer.is_meta for buffer in part.module.buffers())


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vgg7", "densenet"])
def test_networks_on_cuda(name: str, precision: str) -> None:
    net, tolerance = packed(build(name, {})), BF16_TOLERANCE if precision == "bf16" else 1e-4
    channels, side = (1, 28) if name == "lenet5" else (3, 32)
    x = torch.randn(5, channels, side, side)
    exact = bqnn.dequantize(net).double()(x.double())
    fast = bqnn.compile(net.cuda(), x.cuda(), precision=precision)
    assert fast.device.type == "cuda"
    for _ in range(2):
        y = fast(x.cuda())
        assert (y.cpu() - exact).norm() <= tolerance * exact.norm()
    assert (fast.cpu()(x) - exact).norm() <= 1e-4 * exact.norm()
    assert (fast.cuda()(x.cuda()).cpu() - exact).norm() <= tolerance * exact.norm()


@on_a_gpu
def test_torch_compile_on_cuda(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "bqnn")
    net = packed(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))).cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="bqnn")(x), net(x), rtol=1e-3, atol=1e-3)
    assert "the engine is not used" not in caplog.text


@on_a_gpu
def test_what_is_compiled_for_int8_does_not_go_to_cuda() -> None:
    net = packed(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="runs on the CPU alone"):
        bqnn.compile(net, x, precision="int8", calibration=[x]).cuda()
    with pytest.raises(ValueError, match="precision must be another, got 'int8'"):
        bqnn.compile(net.cuda(), x.cuda(), precision="int8", calibration=[x.cuda()])


def test_the_activations_of_torch_are_the_reference_s() -> None:
    """Each of them, where it bends."""
    x = torch.linspace(-6, 6, 101)[None]
    for activation in ACTIVATIONS:
        node = Node("activation", ("x",), "y", activation=activation)
        graph = Graph(("x",), ("y",), {name: Value(name, (101,)) for name in "xy"}, (node,))
        check_near(TorchProgram(graph, CPU)([x]), run(graph, [x]))
