"""What the float model's tensors reach on calibration images: the number formats of both schedules follow from it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from hls4ml.utils.torch import CustomFXTracer
from torch import Tensor, fx

from m3vit.export.hls import leaf
from m3vit.export.hls.magnitudes import Magnitudes
from m3vit.export.hls.schedules import Progress, silent

BATCH_TOKENS = 2048  # run at once: more only take memory


class Calibration(NamedTuple):
    """What each node's output reaches, and each leaf's inner tensors, by name; plus the traced graph."""

    outputs: Magnitudes
    inner: dict[str, Magnitudes]
    graph: fx.GraphModule


class _Recorder(fx.Interpreter):
    """Runs the traced model and notes what every node's output reaches."""

    def __init__(self, module: fx.GraphModule, reached: Magnitudes) -> None:
        super().__init__(module)
        self.reached = reached

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.reached.note(n.name, value)
        return value


def batches(model: leaf.LoweredModel, tokens: np.ndarray, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a model takes, for every task: tokens [B, T, 3 p^2] of [m, T, 3 p^2] and task ids [B, 1]."""
    step = max(1, BATCH_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), step):
        progress(start, len(tokens), "calibration images through torch, for every task")
        batch = torch.from_numpy(tokens[start : start + step])
        for task_id in range(len(model.tasks)):
            yield batch, torch.full((len(batch), 1), float(task_id))


@torch.no_grad()
def calibrate(
    model: leaf.LoweredModel, tokens: np.ndarray, progress: Progress = silent, octaves: bool = False
) -> Calibration:
    """Run the float model on tokens [m, T, 3 p^2] for every task and record ranges. Names are those hls4ml will use."""
    graph = fx.GraphModule(model, CustomFXTracer().trace(model))
    leaves: dict[str, Any] = {
        node.name: graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"
    }
    outputs, inner = Magnitudes(octaves), {name: Magnitudes(octaves) for name in leaves}
    for name, module in leaves.items():
        module.observed = inner[name]
    try:
        for batch, task in batches(model, tokens, progress):
            _Recorder(graph, outputs).run(batch, task)
    finally:
        for module in leaves.values():
            module.observed = None
    return Calibration(outputs, inner, graph)
