"""What a comparison of a package with its model found, task by task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3vit.models.router import Routing, expert_load

LIMIT = 1e-4  # worst allowed max |difference| / max |torch| of an image; float32 rounding gives 1e-7 to 1e-5


@dataclass
class Record:
    """What the check found for one task."""

    worst: float = 0.0
    where: str = ""
    errors: list[float] = field(default_factory=list)  # of the images compared in earnest
    sound: dict[str, int] = field(default_factory=dict)  # how many those are, by image size
    near_tie_images: int = 0
    near_tie_tokens: int = 0
    loads: list[Tensor] = field(default_factory=list)  # tokens of each expert, int64 [E], by MoE layer
    allowed: list[Tensor] = field(default_factory=list)  # the experts that this task may use at all, bool [E]
    forced: list[Tensor] = field(default_factory=list)  # the experts that only a forced router reached, bool [E]
    kept: list[Tensor] = field(default_factory=list)  # the experts that the graph holds, bool [E]; empty: all
    integers: dict[str, float] = field(default_factory=dict)  # worst relative error of graphs in integers
    failures: list[str] = field(default_factory=list)

    def count(self, routings: list[Routing]) -> None:
        """Add the tokens that each expert got."""
        loads = [expert_load(routing.expert_ids_RNK, num_experts(routing))[0].cpu() for routing in routings]
        before = self.loads or [torch.zeros_like(load) for load in loads]
        self.loads = [old + new for old, new in zip(before, loads, strict=True)]
        self.allowed = [
            torch.ones_like(load, dtype=torch.bool) if routing.allowed_RE is None else routing.allowed_RE[0].cpu()
            for load, routing in zip(loads, routings, strict=True)
        ]
        if self.kept:
            self.allowed = [allowed & kept for allowed, kept in zip(self.allowed, self.kept, strict=True)]

    def judge(
        self,
        result: NDArray[np.float32],
        expected: NDArray[np.float32],
        ties: NDArray[np.int64],
        size: str,
        where: str,
        limit: float = LIMIT,
    ) -> None:
        """Add how far the logits [B, C, H, W] of one run are from torch's, of which the first B are compared."""
        if not np.isfinite(result).all():  # a NaN compares as neither above nor below the limit
            self.failures.append(f"{where}: not finite")
            return
        for image in range(len(result)):
            scale = max(float(np.abs(expected[image]).max()), 1e-30)
            error = float(np.abs(result[image] - expected[image]).max()) / scale
            wrong = not error <= limit  # NaN, of torch's, too
            if wrong and ties[image]:
                self.near_tie_images += 1
                continue
            self.sound[size] += 1
            self.errors.append(error)
            if error > self.worst:
                self.worst, self.where = error, where
            if wrong:
                self.failures.append(f"{where}: relative error {error:.1e}, limit {limit:.0e}")

    def not_hit(self) -> list[Tensor]:
        """Return which of the experts that the task may use got no token, bool [E], by MoE layer."""
        return [allowed & (load == 0) for allowed, load in zip(self.allowed, self.loads, strict=True)]

    def report(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return it as `check_parity` does, as JSON values. `layers`: the blocks with experts."""
        return {
            "worst_relative_error": self.worst,
            "worst_at": self.where,
            "median_relative_error": float(np.median(self.errors)) if self.errors else None,
            "comparisons": len(self.errors),
            "near_tie_images": self.near_tie_images,
            "near_tie_tokens": self.near_tie_tokens,
            "experts_not_hit": _by_layer(layers, self.not_hit()),
            "experts_forced": _by_layer(layers, self.forced),
            "integer_errors": self.integers,
        }

    def all_failures(self) -> list[str]:
        """Return the failures, among them the sizes of which near ties left nothing to compare."""
        return self.failures + [
            f"{size}: every image has router near ties and differs; use other images"
            for size, count in self.sound.items()
            if not count and not any(failure.startswith(size) for failure in self.failures)
        ]


def num_experts(routing: Routing) -> int:
    return routing.scores_RNE.shape[-1]


def _by_layer(layers: Sequence[int], masks: list[Tensor]) -> dict[str, list[int]]:
    """Return the experts of masks [E], one a MoE layer, by block index; layers without any are left out."""
    found = {str(layer): mask.nonzero().flatten().tolist() for layer, mask in zip(layers, masks, strict=False)}
    return {layer: experts for layer, experts in found.items() if experts}
