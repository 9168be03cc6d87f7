"""The parts of a model: the learning rate of each, and for how long it is not trained at all.

A parameter that is frozen has requires_grad False: nothing that lies only below frozen parameters is in the graph, so
that no activation of it is kept and the backward pass ends above it.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.of_timm import group_parameters
from m3vit.training.config import TrainConfig, block_range

TRUNK = "backbone.trunk."


def part_of(name: str) -> str:
    """Return the part (`config.PARTS`) that a parameter of a model belongs to, by its name."""
    if not name.startswith(TRUNK):
        return "heads"
    if not name.startswith(f"{TRUNK}blocks."):
        return "embed"
    found = re.match(r"blocks\.\d+\.mlp\.(experts|router)\.", name.removeprefix(TRUNK))
    return {"experts": "experts", "router": "routers"}[found[1]] if found else "trunk"


def block_of(name: str) -> int | None:
    """Return the index of the trunk's block that a parameter belongs to, None for one of no block."""
    found = re.match(r"blocks\.(\d+)\.", name.removeprefix(TRUNK)) if name.startswith(TRUNK) else None
    return int(found[1]) if found else None


def frozen_epochs(train: TrainConfig, model: MultiTaskModel) -> dict[str, float]:
    """Return for how many epochs, from the first on, each parameter is not trained: infinity is always, 0 is never.

    Of several entries of `train.freeze` and `train.freeze_epochs` that name a parameter, the longest holds. Raises
    InputError for blocks that the trunk lacks, and if the first epoch would train nothing.
    """
    depth = len(model.backbone.trunk.blocks)
    given: dict[str, float] = {**train.freeze_epochs, **dict.fromkeys(train.freeze, math.inf)}
    for entry in given:
        blocks = block_range(entry)
        if blocks and blocks[-1] >= depth:
            raise InputError(f"{entry} is to be frozen: {model.config.trunk} has blocks 0 to {depth - 1}")

    def epochs(name: str) -> float:
        part, block = part_of(name), block_of(name)
        return max((n for entry, n in given.items() if entry == part or block in block_range(entry)), default=0)

    found = {name: epochs(name) for name, _ in model.named_parameters()}
    if all(found.values()):
        raise InputError(
            f"{', '.join(given)} are frozen, which is all of the model in the first epoch: leave something to train"
        )
    return found


def freeze(model: MultiTaskModel, epochs: Mapping[str, float], epoch: int) -> None:
    """Freeze what is not trained in epoch number `epoch` (0, 1, ...), as `frozen_epochs` has it, and nothing else.

    Call it after `model.train()`: modules all of whose parameters are frozen run as in evaluation, without dropout,
    dropped paths and router noise, and keep their running statistics.
    """
    frozen = set[Tensor]()
    for name, parameter in model.named_parameters():
        if epochs[name]:  # of others a decoder may have its own reasons
            parameter.requires_grad_(epochs[name] <= epoch)
        if epochs[name] > epoch:
            frozen.add(parameter)
    for module in model.modules() if frozen else ():
        own = set(module.parameters())
        if own and own <= frozen:
            module.eval()


def lr_factors(train: TrainConfig, model: MultiTaskModel) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied by: its part's factor and its depth's.

    Depth is that of timm's `param_groups_layer_decay`, by the trunk's own `group_matcher`: what stands before the
    blocks, then block by block, then the heads, which have the full rate.
    """
    trunk = model.backbone.trunk
    layers: dict[str, int] = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    last = len(trunk.blocks) + 1

    def factor(name: str) -> float:
        layer = layers[name.removeprefix(TRUNK)] if name.startswith(TRUNK) else last
        return float(train.lr_scale.get(part_of(name), 1.0) * train.layer_decay ** (last - layer))

    return {name: factor(name) for name, _ in model.named_parameters()}


class Row(NamedTuple):
    """Parameters of one part that are frozen for as long."""

    part: str
    blocks: str  # "7-11"; "" for none
    parameters: int
    frozen: float  # epochs, as of `frozen_epochs`
    rates: tuple[float, float]  # lowest and highest peak learning rate


def rows(train: TrainConfig, model: MultiTaskModel) -> list[Row]:
    """Return what is trained of a model, in the order of its parameters."""
    epochs, factors = frozen_epochs(train, model), lr_factors(train, model)
    groups: dict[tuple[str, float], list[str]] = {}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name in sizes:
        groups.setdefault((part_of(name), epochs[name]), []).append(name)
    return [
        Row(
            part,
            _ranges(sorted({block for name in names if (block := block_of(name)) is not None})),
            sum(sizes[name] for name in names),
            frozen,
            (train.lr * min(factors[name] for name in names), train.lr * max(factors[name] for name in names)),
        )
        for (part, frozen), names in groups.items()
    ]


def ahead(train: TrainConfig, model: MultiTaskModel) -> str | None:
    """Return a line for people if what stands before the blocks would learn faster or earlier than the first of them.

    `lr_scale` and `freeze` of the trunk leave `embed` at the full rate, at which pretrained patches are gone in an
    epoch. `layer_decay` is left out: it is slowest before the blocks.
    """
    frozen = frozen_epochs(train, model)
    patches = min((n for name, n in frozen.items() if part_of(name) == "embed"), default=math.inf)
    first = min(n for name, n in frozen.items() if part_of(name) == "trunk" and block_of(name) == 0)
    rate, of_blocks = (train.lr * train.lr_scale.get(part, 1.0) for part in ("embed", "trunk"))
    if patches == math.inf or (rate <= of_blocks and patches >= first):
        return None
    after = f" after epoch {first:g}" if first else ""
    return (
        f"embed, which is a part of its own, learns at {rate:.3g}, the first block "
        f"{'not at all' if first == math.inf else f'at {of_blocks:.3g}{after}'}: patches that were learnt are soon "
        "lost so; freeze it too, or give it a lower train.lr_scale"
    )


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers in short: 0-3, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def table(train: TrainConfig, model: MultiTaskModel) -> str:
    """Return the rows as text: part, parameters, whether it is trained, peak learning rate."""
    lines = [("part", "parameters", "trained", "learning rate")]
    for row in rows(train, model):
        low, high = row.rates
        rate = f"{high:.3g}" if math.isclose(low, high) else f"{low:.3g} to {high:.3g}"
        when = {0: "yes", math.inf: "no"}.get(row.frozen, f"after epoch {row.frozen:g}")
        name = f"{row.part} of blocks {row.blocks}" if row.blocks else row.part
        lines.append((name, f"{row.parameters:,}", when, "" if row.frozen == math.inf else rate))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)
