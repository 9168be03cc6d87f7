"""The budgets that a model is trained for: from the smallest to the whole, and what lies between. No torch.

A block that may be left out has 0 among its widths. Heads have a choice of channels where their decoder can do with a
part of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from m3vit.errors import InputError
from m3vit.models.budget import Budget

if TYPE_CHECKING:
    from m3vit.models.multitask import MultiTaskModel

WIDTHS = 4  # of a block or a head, evenly spaced from the smallest to all hidden units or channels
UNIT = 8  # hidden units, channels; widths are multiples, where the whole is


class Asked(Protocol):
    """The part of a run's settings (`train`) that says what it was trained for."""

    @property
    def budgets(self) -> int: ...
    @property
    def budget_top_k(self) -> int: ...
    @property
    def budget_width(self) -> float: ...
    @property
    def budget_skip(self) -> Sequence[int]: ...
    @property
    def budget_heads(self) -> float: ...


@dataclass(frozen=True)
class Space:
    """By task and block, experts per token from `fewest` to `top_k`; by block one of `widths`, ascending, the last all.

    `blocks` are those with experts; dense blocks have widths alone. `heads`: by task, numbers of channels, likewise.
    """

    tasks: tuple[str, ...]
    blocks: tuple[int, ...]
    fewest: int
    top_k: int
    widths: Mapping[int, tuple[int, ...]]
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def smallest(self) -> Budget:
        """The budget that has the least of everything."""
        return self.budget(self.fewest, 0)

    @property
    def single(self) -> bool:
        """Whether there is nothing to choose."""
        choices = [*self.widths.values(), *self.heads.values()]
        return (self.fewest == self.top_k or not self.blocks) and all(len(found) == 1 for found in choices)

    @property
    def narrow_heads(self) -> dict[str, tuple[int, ...]]:
        """The heads that have a choice."""
        return {task: found for task, found in self.heads.items() if len(found) > 1}

    def budget(self, top_k: int, place: int) -> Budget:
        """Return the budget of so many experts per token everywhere, and the `place`-th width of blocks and heads."""
        counts = {task: dict.fromkeys(self.blocks, top_k) for task in self.tasks}
        widths = {block: found[min(place, len(found) - 1)] for block, found in self.widths.items()}
        heads = {task: found[min(place, len(found) - 1)] for task, found in self.narrow_heads.items()}
        return Budget(counts, width=widths, heads=heads)

    def random(self, rng: np.random.Generator) -> Budget:
        """Return a budget of which every number is drawn by itself, each as likely as another."""
        counts = {
            task: {block: int(rng.integers(self.fewest, self.top_k + 1)) for block in self.blocks}
            for task in self.tasks
        }
        widths = {block: int(rng.choice(found)) for block, found in self.widths.items()}
        heads = {task: int(rng.choice(found)) for task, found in self.narrow_heads.items()}
        return Budget(counts, width=widths, heads=heads)


def space_of(model: "MultiTaskModel", asked: Asked) -> Space:
    """Return the budgets of a model that was, or is to be, trained so.

    Raises InputError for blocks and channels that cannot be left out.
    """
    blocks, hidden, channels = model.backbone.moe_indices, model.hidden_widths(), model.heads.channels
    dense = [block for block in hidden if block not in blocks]
    if beside := [str(block) for block in asked.budget_skip if block not in dense]:
        raise InputError(
            f"train.budget_skip names {', '.join(beside)}: the blocks that can be left out are the dense ones, "
            f"{', '.join(map(str, dense)) or 'of which there are none'}"
        )
    widths = {
        block: ((0,) if block in asked.budget_skip else ()) + width_choices(units, asked.budget_width)
        for block, units in hidden.items()
    }
    if asked.budget_heads < 1 and not channels:
        raise InputError(
            f"train.budget_heads is {asked.budget_heads:g}, and {model.config.head} heads cannot do with a part of "
            "their channels, as pup ones can: leave it out"
        )
    heads = {task: width_choices(count, asked.budget_heads) for task, count in channels.items()}
    tasks, top_k = tuple(model.config.tasks), model.config.top_k
    return Space(tasks, tuple(blocks), min(asked.budget_top_k, top_k), top_k, widths, heads)


def require_trained(found: Space, budget: Budget, trained: bool) -> None:
    """Raise InputError for a budget that is below the smallest that a model was trained for.

    `trained`: it was trained for budgets. Others take fewer experts all the same, which loses what it loses, but not
    parts of experts and MLPs, which are of no use by themselves.
    """
    if not trained:
        if less := [block for block, width in budget.width.items() if width < found.widths[block][-1]]:
            raise InputError(
                f"the budget has {budget.width[less[0]]} hidden units in block {less[0]}, and this run was not trained "
                "for fewer than all: train with --train.budgets, or search again for this run"
            )
        if less_of := [task for task, channels in budget.heads.items() if channels < found.heads[task][-1]]:
            raise InputError(
                f"the budget has {budget.heads[less_of[0]]} channels in the head of {less_of[0]}, and this run was not "
                "trained for fewer than all: train with --train.budgets and --train.budget_heads, or search again for "
                "this run"
            )
        return
    for task, of in budget.top_k.items():
        if few := [block for block, count in of.items() if count < found.fewest]:
            raise InputError(
                f"the budget has {of[few[0]]} experts per token for {task} in block {few[0]}: the smallest that this "
                f"run was trained for has {found.fewest} (train.budget_top_k)"
            )
    for block, width in budget.width.items():
        smallest = next(one for one in found.widths[block] if one)
        if width < smallest and (width or 0 not in found.widths[block]):
            what = f"{width} hidden units in block {block}" if width else f"no block {block}"
            raise InputError(
                f"the budget has {what}: the smallest that this run was trained for has {smallest} hidden units there "
                "(train.budget_width, train.budget_skip)"
            )
    for task, channels in budget.heads.items():
        if channels < (smallest := found.heads[task][0]):
            raise InputError(
                f"the budget has {channels} channels in the head of {task}: the smallest that this run was trained for "
                f"has {smallest} (train.budget_heads)"
            )


def width_choices(hidden: int, share: float) -> tuple[int, ...]:
    """Return the widths from a share of `hidden` units up to all of them, ascending."""
    unit = math.gcd(hidden, UNIT)
    shares = np.linspace(share, 1, WIDTHS)
    return tuple(sorted({min(hidden, unit * max(1, round(hidden * float(one) / unit))) for one in shares}))
