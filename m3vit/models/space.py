"""The budgets that a model is trained for: from the smallest to the whole, and what lies between. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from m3vit.models.budget import Budget

WIDTHS = 4  # of a block, evenly spaced from the smallest to all hidden units
UNIT = 8  # hidden units; widths are multiples, where the whole is


class Asked(Protocol):
    """The part of a run's settings (`train`) that says what it was trained for."""

    @property
    def budgets(self) -> int: ...
    @property
    def budget_top_k(self) -> int: ...
    @property
    def budget_width(self) -> float: ...


@dataclass(frozen=True)
class Space:
    """By task and block, experts per token from `fewest` to `top_k`; by block one of `widths`, ascending, the last all.

    `blocks` are those with experts; dense blocks have widths alone.
    """

    tasks: tuple[str, ...]
    blocks: tuple[int, ...]
    fewest: int
    top_k: int
    widths: Mapping[int, tuple[int, ...]]

    @property
    def smallest(self) -> Budget:
        """The budget that has the least of everything."""
        return self.budget(self.fewest, 0)

    @property
    def single(self) -> bool:
        """Whether there is nothing to choose."""
        return (self.fewest == self.top_k or not self.blocks) and all(len(found) == 1 for found in self.widths.values())

    def budget(self, top_k: int, place: int) -> Budget:
        """Return the budget of so many experts per token everywhere, and of the `place`-th width of each block."""
        counts = {task: dict.fromkeys(self.blocks, top_k) for task in self.tasks}
        return Budget(counts, width={block: found[min(place, len(found) - 1)] for block, found in self.widths.items()})

    def random(self, rng: np.random.Generator) -> Budget:
        """Return a budget of which every number is drawn by itself, each as likely as another."""
        counts = {
            task: {block: int(rng.integers(self.fewest, self.top_k + 1)) for block in self.blocks}
            for task in self.tasks
        }
        return Budget(counts, width={block: int(rng.choice(found)) for block, found in self.widths.items()})


def space_of(tasks: Sequence[str], top_k: int, hidden: Mapping[int, int], blocks: Sequence[int], asked: Asked) -> Space:
    """Return the budgets of a model that was, or is to be, trained so.

    hidden: hidden units by block, of one expert in `blocks`, of the dense MLP elsewhere.
    """
    widths = {block: width_choices(units, asked.budget_width) for block, units in hidden.items()}
    return Space(tuple(tasks), tuple(blocks), min(asked.budget_top_k, top_k), top_k, widths)


def width_choices(hidden: int, share: float) -> tuple[int, ...]:
    """Return the widths from a share of `hidden` units up to all of them, ascending."""
    unit = math.gcd(hidden, UNIT)
    shares = np.linspace(share, 1, WIDTHS)
    return tuple(sorted({min(hidden, unit * max(1, round(hidden * float(one) / unit))) for one in shares}))
