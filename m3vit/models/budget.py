"""What of a model is used: a value, given to the forward pass and to whatever is made of the model.

How many experts a token goes to, by task; and how many hidden units the experts and the dense MLPs have, for all tasks:
the first so many, so that a smaller budget uses a part of what a larger one does. A dense block may be left out whole.
And how many channels the head of each task has. Layers are named by their block, as in `model.moe_blocks`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from m3vit.errors import InputError, short

KEYS = ("top_k", "kept", "width", "decoder", "heads")
Kept = Mapping[str, Mapping[int, tuple[int, ...]]]  # experts, ascending, by task and block
ALL_KEPT: Kept = MappingProxyType({})
ALL_CHANNELS: Mapping[str, int] = MappingProxyType({})


class Use(NamedTuple):
    """What a task uses of one MoE layer: so many experts per token, of those kept, and the first hidden units of each.

    The width is the same for all tasks.
    """

    top_k: int
    kept: tuple[int, ...]
    width: int


class Uses(NamedTuple):
    """A budget as the model takes it: what each task uses of each MoE layer, and units of dense MLPs, by block.

    0 units leave out the block, its attention too. `decoder`: experts that a decoder of such assembles from, `heads`:
    channels of the tasks' heads, where they are not all.
    """

    layers: list[list[Use]]
    widths: dict[int, int]
    decoder: Kept = ALL_KEPT
    heads: Mapping[str, int] = ALL_CHANNELS


@dataclass(frozen=True)
class LayerBudget:
    """A budget of one MoE layer for one task. None: as trained.

    top_k: experts per token. kept: the experts to choose from, ascending. width: hidden units of each that are used,
    the first so many. where: which task and layer, for messages.

    Scores are still the softmax over all experts; the kept ones are ranked, and what the best of them get is not
    renormalised: a token whose K best experts are kept gets the very same output.
    """

    top_k: int | None = None
    kept: tuple[int, ...] | None = None
    width: int | None = None
    where: str = field(default="a layer", compare=False)

    def __post_init__(self) -> None:
        for key, least, what in (("top_k", 1, "above 0"), ("width", 0, "of 0 or more")):
            value = getattr(self, key)
            if value is not None and not _whole(value, least):
                raise InputError(f"budget of {self.where}: {key} is {short(value)}, give a whole number {what}")
        if self.kept is not None:
            ids = self.kept if isinstance(self.kept, tuple) else (None,)
            if not ids or not all(_whole(expert, 0) for expert in ids) or sorted(set(ids)) != list(ids):
                raise InputError(
                    f"budget of {self.where}: kept are {short(self.kept)}, name one or more experts, ascending"
                )

    def resolve(self, experts: int, top_k: int, width: int) -> Use:
        """Return what is used of a layer of `experts` that have `width` hidden units each, trained with `top_k`.

        Raises InputError for more than the layer has.
        """
        kept = tuple(range(experts)) if self.kept is None else self.kept
        if kept[-1] >= experts:
            raise InputError(f"budget of {self.where}: kept are {list(kept)}, but its experts are 0 to {experts - 1}")
        used = top_k if self.top_k is None else self.top_k
        if used > len(kept):
            raise InputError(
                f"budget of {self.where}: top_k is {used} with {len(kept)} experts kept of {experts}: give 1 to that"
            )
        if self.width is not None and not 0 < self.width <= width:
            raise InputError(
                f"budget of {self.where}: width is {self.width}, but its experts have {width} hidden units: give 1 to "
                "that"
            )
        return Use(used, kept, width if self.width is None else self.width)


@dataclass(frozen=True)
class Budget:
    """What is used of each block; of what is not named all, as trained.

    `top_k` {task: {block: experts per token}}, `kept` {task: {block: experts to choose from, ascending}}, `width`
    {block: hidden units of each expert, or of the dense MLP; 0 leaves out a dense block}. `LayerBudget` says what they
    mean. Raises InputError for values that no model can have; `check` and `LayerBudget.resolve` compare with one.

    `decoder` {task: {block: experts to assemble from, ascending}}: of a decoder with experts after these blocks. Its
    weights are the softmax over all, and those of the others are left out of the sum.

    `heads` {task: channels of its head, the first so many}: of decoders that can do with a part (`Decoder.channels`).
    """

    top_k: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    width: Mapping[int, int] = field(default_factory=dict)
    decoder: Kept = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies, and without tasks of which nothing is said: equal budgets compare equal.
        for key in ("top_k", "kept", "decoder"):
            object.__setattr__(self, key, {task: dict(of) for task, of in getattr(self, key).items() if of})
        for key in ("width", "heads"):
            object.__setattr__(self, key, dict(getattr(self, key)))
        for task in self.tasks or [""]:
            for block in self.blocks:
                self.layer(task, block)
        for task, of in self.decoder.items():
            for block, kept in of.items():
                LayerBudget(kept=kept, where=f"the decoder, {task}, block {block}")
        for task, channels in self.heads.items():
            if not _whole(channels, 1):
                raise InputError(
                    f"budget of the head of {task}: channels are {short(channels)}, give a whole number above 0"
                )

    @property
    def tasks(self) -> list[str]:
        """The tasks that something is said of."""
        return list({**self.top_k, **self.kept, **self.decoder, **self.heads})

    @property
    def blocks(self) -> list[int]:
        """The blocks of the trunk that something is said of, ascending."""
        named = [block for of in (*self.top_k.values(), *self.kept.values(), self.width) for block in of]
        return sorted(set(named))

    @property
    def left_out(self) -> tuple[int, ...]:
        """The blocks that are left out, ascending."""
        return tuple(sorted(block for block, width in self.width.items() if width == 0))

    @property
    def full(self) -> bool:
        """Whether everything is used as trained, by what is said."""
        return self == FULL

    def shortened(self, hidden: Mapping[int, int], channels: Mapping[str, int]) -> "Budget":
        """Return the budget without widths and channels that are all of a model's: the same by what it does."""
        width = {block: units for block, units in self.width.items() if units != hidden.get(block)}
        heads = {task: count for task, count in self.heads.items() if count != channels.get(task)}
        return replace(self, width=width, heads=heads)

    def layer(self, task: str, block: int) -> LayerBudget:
        """Return the budget of a task in a block."""
        top_k, kept = (of.get(task, {}).get(block) for of in (self.top_k, self.kept))
        where = f"{task}, block {block}" if task else f"block {block}"
        return LayerBudget(top_k, kept, self.width.get(block), where)  # type: ignore[arg-type]

    def layers(self, task: str, blocks: Sequence[int]) -> list[LayerBudget]:
        """Return the budgets of a task in the blocks with experts."""
        return [self.layer(task, block) for block in blocks]

    def check(self, tasks: Sequence[str], blocks: Sequence[int], mlps: Mapping[int, int] | None = None) -> None:
        """Raise InputError for a task or a block that a model of these does not have.

        blocks: those with experts. mlps: hidden units of the dense MLPs of which a part can be used, by block.
        """
        mlps = mlps or {}
        if beside := [task for task in self.tasks if task not in tasks]:
            raise InputError(f"budget names task {', '.join(beside)}: this model has {', '.join(tasks)}")
        routed = {block for of in (*self.top_k.values(), *self.kept.values()) for block in of}
        if beside := [
            str(block) for block in self.blocks if block not in blocks and (block in routed or block not in mlps)
        ]:
            have = ", ".join(map(str, blocks)) or "none"
            dense = f"; widths may be of {', '.join(map(str, mlps))} too" if mlps else ""
            raise InputError(f"budget names block {', '.join(beside)}: the blocks with experts are {have}{dense}")
        for block, hidden in mlps.items():
            if (width := self.width.get(block, hidden)) > hidden:
                raise InputError(
                    f"budget of block {block}: width is {width}, but its MLP has {hidden} hidden units: give 1 to that"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the budget as JSON values: blocks are texts, kept experts lists."""
        return {
            "top_k": {task: {str(block): count for block, count in of.items()} for task, of in self.top_k.items()},
            "kept": _texts(self.kept),
            "width": {str(block): width for block, width in self.width.items()},
            **({"decoder": _texts(self.decoder)} if self.decoder else {}),
            **({"heads": dict(self.heads)} if self.heads else {}),
        }

    @classmethod
    def from_json(cls, value: Any) -> "Budget":
        """Return the budget of what `to_json` returned; keys may be missing. Raises InputError for anything else."""
        if not isinstance(value, dict) or set(value) - set(KEYS):
            raise InputError(f"budget is {short(value)}: give an object with {', '.join(KEYS)} or some of them")
        top_k, *lists = (
            {task: _by_block(of, key) for task, of in _object(value, key).items()}
            for key in ("top_k", "kept", "decoder")
        )
        kept, decoder = (
            {
                task: {block: tuple(ids) if isinstance(ids, list) else ids for block, ids in of.items()}
                for task, of in found.items()
            }
            for found in lists
        )
        return cls(top_k, kept, _by_block(_object(value, "width"), "width"), decoder, _object(value, "heads"))


FULL = Budget()


def in_all_layers(top_k: Mapping[str, int], blocks: Sequence[int]) -> Budget:
    """Return the budget of so many experts per token, by task, in each of the blocks."""
    return Budget({task: dict.fromkeys(blocks, count) for task, count in top_k.items()})


def read_top_k(text: str, tasks: Sequence[str], num_experts: int) -> dict[str, int]:
    """Parse `--top-k 2` or `depth=1,semseg=2` into experts per token by task, or raise InputError."""
    advice = f"give a number, 1 to {num_experts}, or task=number,... of the tasks {', '.join(tasks)}"
    result: dict[str, int] = {}
    for part in text.split(","):
        task, _, number = part.rpartition("=")
        if not number.strip().isdigit() or not 1 <= int(number) <= num_experts or (task and task.strip() not in tasks):
            raise InputError(f"--top-k is {text!r}: {advice}")
        if task.strip() in result or (not task and result):
            raise InputError(
                f"--top-k is {text!r}, which says twice how many {task.strip() or 'a task'} gets: {advice}"
            )
        result |= {task.strip(): int(number)} if task else dict.fromkeys(tasks, int(number))
    return result


def _texts(kept: Kept) -> dict[str, dict[str, list[int]]]:
    return {task: {str(block): list(ids) for block, ids in of.items()} for task, of in kept.items()}


def _object(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key, {})
    if not isinstance(found, dict):
        raise InputError(f"budget: {key} is {short(found)}, give an object by {'block' if key == 'width' else 'task'}")
    return found


def _by_block(value: Any, key: str) -> dict[int, Any]:
    if not isinstance(value, dict) or not all(block.isdecimal() for block in value):
        raise InputError(f"budget: {key} has {short(value)}, give an object by block, such as {{'1': ...}}")
    return {int(block): entry for block, entry in value.items()}


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
