"""What the float model's tensors reach on calibration images: the number formats of both schedules follow from it."""

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


class EachTask(fx.Interpreter):
    """Runs a traced model on images for every task. What comes before anything of a task's own is run once for all."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        _, task = (node for node in module.graph.nodes if node.op == "placeholder")
        own = {task}
        for node in module.graph.nodes:
            if own & set(node.all_input_nodes):
                own.add(node)
        self.common = set(module.graph.nodes) - own
        self.handed_on = {node for node in self.common if own & set(node.users)}
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.common and n.op != "placeholder" and self.handed_on <= self.kept.keys():
            return self.kept.get(n)
        value = self.run_new(n)
        if n in self.handed_on:
            self.kept[n] = value
        return value

    def run_new(self, n: fx.Node) -> Any:
        """Return what a node gives, which is not known yet."""
        return super().run_node(n)

    def run_images(self, tasks: int, tokens: np.ndarray, progress: Progress) -> None:
        """Run tokens [m, T, 3 p^2], for so many tasks."""
        step = max(1, BATCH_TOKENS // tokens.shape[1])
        for start in range(0, len(tokens), step):
            progress(start, len(tokens), "calibration images through torch, for every task")
            batch = torch.from_numpy(tokens[start : start + step])
            for task in range(tasks):
                self.run(batch, torch.full((len(batch), 1), float(task)))
            self.kept.clear()


class _Recorder(EachTask):
    """Notes what every node's output reaches."""

    def __init__(self, module: fx.GraphModule, reached: Magnitudes) -> None:
        super().__init__(module)
        self.reached = reached

    def run_new(self, n: fx.Node) -> Any:
        value = super().run_new(n)
        if isinstance(value, Tensor):
            self.reached.note(n.name, value, wide=n.op != "call_module")  # sums: of the residual stream
        return value


def traced(model: leaf.LoweredModel) -> fx.GraphModule:
    """Return a model traced down to its leaves, as hls4ml sees it."""
    return fx.GraphModule(model, CustomFXTracer().trace(model))


@torch.no_grad()
def calibrate(
    model: leaf.LoweredModel, tokens: np.ndarray, progress: Progress = silent, octaves: bool = False
) -> Calibration:
    """Run the float model on tokens [m, T, 3 p^2] for every task and record ranges. Names are those hls4ml will use."""
    graph = traced(model)
    leaves: dict[str, Any] = {
        node.name: graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"
    }
    outputs, inner = Magnitudes(octaves), {name: Magnitudes(octaves) for name in leaves}
    for name, module in leaves.items():
        module.observed = inner[name]
    try:
        _Recorder(graph, outputs).run_images(len(model.tasks), tokens, progress)
    finally:
        for module in leaves.values():
            module.observed = None
    return Calibration(outputs, inner, graph)
