"""How the losses of several tasks become one step (`train.weighting`).

uncertainty: Kendall, Gal, Cipolla, CVPR 2018 (arXiv 1705.07115): the sum over tasks of exp(-s) L / 2 + s / 2, the
log-variances s learned. dwa: Liu, Johns, Davison, CVPR 2019 (arXiv 1803.10704), section 4.2. The gradient methods are
TorchJD's (torchjd.org): PCGrad (arXiv 2001.06782), MGDA (arXiv 1810.04650), Aligned-MTL (arXiv 2305.19000).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3vit.label_sets import resolve
from m3vit.training.config import GRADIENT_METHODS, Config

TEMPERATURE = 2.0  # of dwa


class Fixed:
    """The weights of the task table and `train.task_weights`; what the other ways start from."""

    def __init__(self, fixed: Mapping[str, float]) -> None:
        self.fixed = dict(fixed)

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser learns beside the model."""
        return []

    def weights(self) -> dict[str, float]:
        """Return the weight of each task's loss in the next step."""
        return self.fixed

    def observe(self, losses: dict[str, float], scale: float, backward: Callable[[Tensor], None]) -> None:
        """See the unweighted losses of a step, those of all processes, before the optimiser moves.

        `scale` is how much the losses of the tasks drawn stand for; `backward` computes gradients of a loss.
        """

    def end_epoch(self) -> None:
        """See that an epoch is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


class Uncertainty(Fixed):
    """Learned log-variances. They see the losses of all processes, so they are the same in each."""

    def __init__(self, fixed: Mapping[str, float], device: torch.device) -> None:
        super().__init__(fixed)
        # exp(-s) / 2 is the fixed weight; a weight of 0 has no logarithm.
        start = [-math.log(2 * max(weight, 1e-12)) for weight in fixed.values()]
        self.log_variances = nn.Parameter(torch.tensor(start, device=device))

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_variances]

    def weights(self) -> dict[str, float]:
        values = (0.5 * torch.exp(-self.log_variances.detach())).tolist()
        return dict(zip(self.fixed, values, strict=True))

    def observe(self, losses: dict[str, float], scale: float, backward: Callable[[Tensor], None]) -> None:
        names = list(self.fixed)
        chosen = [names.index(task) for task in losses]
        values = self.log_variances.new_tensor(list(losses.values()))
        s = self.log_variances[chosen]
        backward(scale * (0.5 * torch.exp(-s) * values + 0.5 * s).sum())

    def state_dict(self) -> dict[str, Any]:
        return {"log_variances": self.log_variances.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.log_variances.copy_(state["log_variances"])


class DynamicAverage(Fixed):
    """The fixed weights times T softmax(r / temperature), r a task's mean loss in the last epoch by that before."""

    def __init__(self, fixed: Mapping[str, float]) -> None:
        super().__init__(fixed)
        self.sums: dict[str, list[float]] = {}  # of the running epoch: sum of losses, steps
        self.means: list[dict[str, float]] = []  # of the last two epochs

    def weights(self) -> dict[str, float]:
        if len(self.means) < 2:
            return self.fixed
        before, last = self.means
        # A task without a loss in one of the two epochs counts as one that stands still.
        ratios = [last[task] / before[task] if last.get(task) and before.get(task) else 1.0 for task in self.fixed]
        shares = torch.softmax(torch.tensor(ratios, dtype=torch.float64) / TEMPERATURE, dim=0).tolist()
        return {
            task: weight * len(shares) * share for (task, weight), share in zip(self.fixed.items(), shares, strict=True)
        }

    def observe(self, losses: dict[str, float], scale: float, backward: Callable[[Tensor], None]) -> None:
        for task, loss in losses.items():
            total, steps = self.sums.get(task, [0.0, 0.0])
            self.sums[task] = [total + loss, steps + 1]

    def end_epoch(self) -> None:
        self.means = [*self.means, {task: total / steps for task, (total, steps) in self.sums.items()}][-2:]
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.means = state["sums"], state["means"]


class GradientMethod(Fixed):
    """Weighs, in each step, the tasks' gradients of the parameters they share. A task's own parameters are not weighed.

    PCGrad's weights sum up what each task adds, so that tasks without conflicts get 1; those of MGDA and Aligned-MTL
    are shares, multiplied by the number of tasks here to make the step as long as the other ways'.
    """

    def __init__(self, fixed: Mapping[str, float], kind: str) -> None:
        from torchjd.aggregation import AlignedMTLWeighting, MGDAWeighting, PCGradWeighting

        super().__init__(fixed)
        self.shares = kind != "pcgrad"
        self.weigh = {"pcgrad": PCGradWeighting, "mgda": MGDAWeighting, "aligned_mtl": AlignedMTLWeighting}[kind]()

    def combine(self, gramian_TT: Tensor, seed: int) -> Tensor:
        """Return the weight of each task's gradient, from the inner products of the gradients."""
        with torch.random.fork_rng(devices=[]):  # PCGrad draws orders: the same in every process
            torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would seed a GPU's too
            # float64: the products of gradients of very different lengths. On the CPU: MPS has none.
            weights: Tensor = self.weigh(gramian_TT.cpu().double()).to(gramian_TT)
        return weights * len(weights) if self.shares else weights


def make_weighting(config: Config, device: torch.device) -> Fixed:
    """Return the way of `train.weighting`."""
    tasks = resolve(config.model.tasks, config.model.label_set)
    fixed = {task.name: config.train.task_weights.get(task.name, task.weight) for task in tasks}
    kind = config.train.weighting
    if kind in GRADIENT_METHODS:
        return GradientMethod(fixed, kind)
    if kind == "uncertainty":
        return Uncertainty(fixed, device)
    return DynamicAverage(fixed) if kind == "dwa" else Fixed(fixed)
