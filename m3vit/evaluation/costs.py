"""What budgets cost: tables of what each block saves, of anything that adds up over the blocks.

Blocks of one kind (experts or a dense MLP, of one width) save the same: each kind is looked at once, in the first of
its blocks, in the graph of the first task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from m3vit.models.budget import FULL, Budget
from m3vit.models.config import ModelConfig
from m3vit.models.space import Space
from m3vit.models.trial import meta_model
from m3vit.profiling import total_macs

Measure = Callable[[str, Budget], float]  # of a task's graph under a budget


@dataclass(frozen=True)
class Costs:
    """`whole` of each task's graph; `saved` by block, {(experts per token, hidden units): what they leave of it}.

    `heads` by task, {channels: what they leave of it}; nothing where heads have no choice.

    name: as --cost takes it. unit: of the numbers. Of dense blocks the experts per token are 0. measure: what a graph
    costs by itself, where blocks need not add up to it.
    """

    name: str
    unit: str
    whole: Mapping[str, float]
    saved: Mapping[int, Mapping[tuple[int, int], float]]
    heads: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    measure: Measure | None = None

    def share(self, budget: Budget) -> float | None:
        """Return the share of the cost of all tasks' graphs that a budget takes, measured; None if it adds up."""
        if self.measure is None:
            return None
        return sum(self.measure(task, budget) for task in self.whole) / sum(self.whole.values())

    def of(self, task: str, counts: Mapping[int, int], widths: Mapping[int, int], channels: int | None = None) -> float:
        """Return the cost of a task with so many experts per token, and hidden units, by block; the rest whole.

        channels: of its head; None: all.
        """
        saved: float = 0 if channels is None else self.heads[task][channels]
        for block, table in self.saved.items():
            most = max(table)
            saved += table[counts.get(block, most[0]), widths.get(block, most[1])]
        return self.whole[task] - saved


def costs_of(
    name: str,
    unit: str,
    measure: Measure,
    found: Space,
    hidden: Mapping[int, int],
    progress: Callable[[int, int, str], None] | None = None,
) -> Costs:
    """Return the costs of a model's budgets. hidden: hidden units of each block (`MultiTaskModel.hidden_widths`)."""
    kinds: dict[tuple[bool, tuple[int, ...]], int] = {}
    for block, units in hidden.items():
        kinds.setdefault((block in found.blocks, found.widths.get(block, (units,))), block)
    first, tables, done = found.tasks[0], {}, 0
    choices = {kind: [(count, width) for count in _counts(found, kind[0]) for width in kind[1]] for kind in kinds}
    total = len(found.tasks) + sum(len(some) - 1 for some in (*choices.values(), *found.narrow_heads.values()))

    def measured(task: str, budget: Budget) -> float:
        nonlocal done
        value = measure(task, budget)
        done += 1
        if progress:
            progress(done, total, f"cost in {unit}")
        return value

    whole = {task: measured(task, FULL) for task in found.tasks}
    for kind, block in kinds.items():
        most, table = max(choices[kind]), {}
        for count, width in choices[kind]:
            budget = Budget({first: {block: count}} if kind[0] else {}, width={block: width})
            table[count, width] = 0 if (count, width) == most else whole[first] - measured(first, budget)
        tables[kind] = table
    saved = {block: tables[block in found.blocks, found.widths.get(block, (units,))] for block, units in hidden.items()}
    heads = {
        task: {count: whole[task] - measured(task, Budget(heads={task: count})) for count in counts[:-1]}
        | {counts[-1]: 0.0}
        for task, counts in found.narrow_heads.items()
    }
    return Costs(name, unit, whole, saved, heads)


def _counts(found: Space, experts: bool) -> list[int]:
    return list(range(found.fewest, found.top_k + 1)) if experts else [0]


def macs_of(config: ModelConfig, found: Space, hidden: Mapping[int, int]) -> Costs:
    """Return the multiply-accumulates of an image of the size trained at, as `m3vit profile` counts them."""
    model = meta_model(config)

    def measure(task: str, budget: Budget) -> float:
        return total_macs(model, [task], budget)

    return costs_of("macs", "MACs", measure, found, hidden)
