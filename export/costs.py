"""What budgets cost where they run: measured with onnxruntime on this machine, or modelled for a board's engines."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from m3vit.errors import InputError
from m3vit.evaluation.costs import Costs, costs_of, macs_of
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.space import Space

NAMES = ("macs", "latency", "cycles:BOARD")  # what --cost takes
RUNS, WARM = 9, 2  # of a graph: the median of so many counts, after these
Progress = Callable[[int, int, str], None]


def find_costs(name: str, model: MultiTaskModel, found: Space, progress: Progress | None = None) -> Costs:
    """Return the costs of a model's budgets by a name as --cost takes it.

    Raises InputError for another name, a model that has no graphs or programs, and a board that is not known.
    """
    hidden = model.hidden_widths()
    if name == "macs":
        return macs_of(model.config, found, hidden)
    if name == "latency":
        return _latency(model, found, hidden, progress)
    if name.startswith("cycles:"):
        return _cycles(model, found, hidden, name.removeprefix("cycles:"), progress)
    raise InputError(f"--cost is {name!r}: give one of {', '.join(NAMES)}")


def _latency(model: MultiTaskModel, found: Space, hidden: Mapping[int, int], progress: Progress | None) -> Costs:
    """Return milliseconds of an image in onnxruntime: float32, batch 1, the size trained at, a package's threads."""
    from m3vit.export.finite import require_finite
    from m3vit.export.onnx.graph import of_task, require_onnx, tracer
    from m3vit.export.onnx.lower import lower_moe
    from m3vit.export.onnx.widths import narrow_mlps
    from m3vit.export.runtime.ort import onnxruntime, session_options
    from m3vit.export.runtime.package import default_threads
    from m3vit.profiling import graph_macs

    require_onnx(model)
    require_finite(model)
    config = model.config
    size = (config.image_size[0], config.image_size[1])
    traced = tracer(model, found.tasks, size=size)
    image = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
    options = session_options(default_threads({"macs": graph_macs(config, found.tasks[0], size)}))

    def measure(task: str, budget: Budget) -> float:
        graph = of_task(traced(budget), model, task)
        narrow_mlps(graph, model, budget.width)
        lower_moe(graph, budget.layers(task, model.backbone.moe_indices), attention="fused")
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        times = []
        for _ in range(WARM + RUNS):
            start = time.perf_counter()
            session.run(None, {"image": image})
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[WARM:])

    return replace(costs_of("latency", "ms", measure, found, hidden, progress), measure=measure)


def _cycles(
    model: MultiTaskModel, found: Space, hidden: Mapping[int, int], board: str, progress: Progress | None
) -> Costs:
    """Return modelled cycles of an image on the engines that `m3vit hw cost` fits to a board for the whole model."""
    from m3vit.export.hls.multiplexed.costing import sizes_of_model
    from m3vit.export.hls.schedules import choose_options
    from m3vit.hw.boards import BOARDS
    from m3vit.hw.cost import cost
    from m3vit.hw.fit import fit
    from m3vit.hw.network import program_of

    if board not in BOARDS:
        raise InputError(f"--cost is 'cycles:{board}': give cycles: and one of {', '.join(BOARDS)}")
    options = choose_options("multiplexed", None, None, board)
    assert options.design is not None
    chosen, bits = options.design.target, (options.weight_bits, options.act_bits)
    network = sizes_of_model(model.config)
    hardware = fit(program_of(network, *bits, chosen.port_bits), *bits, chosen, options.design.sizes)

    def measure(task: str, budget: Budget) -> float:
        kept = [block for block in range(len(network.mlps)) if block not in budget.left_out]
        widths = [budget.width.get(block, network.mlps[block]) for block in kept]
        counts = [
            network.top_ks[block] and (budget.layer(task, block).top_k or network.top_ks[block]) for block in kept
        ]
        program = program_of(replace(network, mlps=widths, top_ks=counts), *bits, chosen.port_bits)
        found_cost = cost(program, hardware, chosen, model.config.tasks.index(task))
        return round(found_cost["ms"] * chosen.clock_mhz * 1000)

    return costs_of(f"cycles:{chosen.name}", "modelled cycles", measure, found, hidden, progress)
