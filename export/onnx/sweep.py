"""`m3vit export onnx RUN --sweep`: what size, time and accuracy each way of exporting a task would have.

Every combination of experts per token, experts kept and precision is lowered, scored on validation images and timed
against the graph as trained, in turn with it, on one thread.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from m3vit.errors import InputError
from m3vit.evaluation.evaluate import Predictor, normalised
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.finite import require_finite
from m3vit.export.onnx.from_run import (
    MEASURED_IMAGES,
    PROTOCOL,
    Request,
    calibration_batches,
    data_of,
    score,
)
from m3vit.export.onnx.graph import of_task, tracer
from m3vit.export.onnx.lower import lower_moe
from m3vit.export.onnx.pruning import decoder_mass, gate_mass, pruned, pruned_decoder
from m3vit.export.onnx.quantize import FLOAT, quantize
from m3vit.export.runtime.ort import onnxruntime, session_options
from m3vit.files import atomic_path, write_json
from m3vit.models.budget import Budget, in_all_layers
from m3vit.run_folder import Run
from m3vit.tasks import TASKS

COVERAGES = (None, 0.999, 0.99, 0.95)
SWEPT_PRECISIONS = (FLOAT, "int8", "int8-mixed", "int8-experts")
MAX_TOP_KS = 4  # values of experts per token, at most
ROUNDS = 15
SAME_TIME = 0.02  # times closer than this are taken as equal: the clock is not better
FILES = ("sweep.json", "sweep.png")

Progress = Callable[[int, int, str], None]


def sweep(
    run: Run,
    out: Path,
    request: Request,
    *,
    opset: int,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every way of exporting each task; write sweep.json and sweep.png into `out`, and return the former.

    Raises InputError for an `out` that holds anything else, and where the run's data are not to be found.
    """
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(FILES)):
        raise InputError(f"{out} holds something else: give a new folder for the sweep")
    count = MEASURED_IMAGES if request.measure is None else request.measure
    if not count:
        raise InputError("--measure 0 leaves nothing to compare: give the number of validation images, or leave it out")
    require_finite(run.model)
    val = data_of(run, "val", request.data_root, "no --sweep")
    train = data_of(run, "train", request.data_root, "no --sweep")
    config = run.config.model
    shape = size or (config.image_size[0], config.image_size[1])
    blocks = run.model.backbone.moe_indices
    top_ks = _spread(config.top_k) if blocks else [config.top_k]
    budgets = {k: in_all_layers(dict.fromkeys(config.tasks, k), blocks) for k in top_ks}
    mass = {
        k: gate_mass(run.model, calibration_batches(run, train, request.calibration), budget)
        for k, budget in budgets.items()
    }
    own = run.model.heads.experts
    coverages = COVERAGES if blocks or own else (None,)
    # Of all tasks, before any is scored: what a decoder keeps is traced.
    pruned_to: dict[tuple[float | None, int], Budget] = {(None, k): budget for k, budget in budgets.items()}
    for share, k in itertools.product([one for one in coverages if one is not None], top_ks):
        budget, _ = pruned(run.model, mass[k], budgets[k], coverage=share) if blocks else (budgets[k], None)
        if own:
            images = calibration_batches(run, train, request.calibration)
            budget, _ = pruned_decoder(run.model, decoder_mass(run.model, images, budget), budget, share)
        pruned_to[share, k] = budget
    grid = [point for point in itertools.product(SWEPT_PRECISIONS, coverages, top_ks) if blocks or "-" not in point[0]]
    everything = {block: tuple(range(config.num_experts)) for block in blocks}
    total, done = len(config.tasks) * len(grid), 0
    tasks: dict[str, list[dict[str, Any]]] = {}
    traced = tracer(run.model, config.tasks, opset=opset, size=size)
    for task in config.tasks:
        reference = _session(lower_moe(of_task(traced(), run.model, task), attention="fused"))
        points: list[dict[str, Any]] = []
        tried: set[Any] = set()
        for precision, coverage, k in grid:
            if progress:
                progress(done, total, f"{task} {precision} top-{k}")
            budget = pruned_to[coverage, k]
            done += 1
            kept, decodes = everything | dict(budget.kept.get(task, {})), dict(budget.decoder.get(task, {}))
            same = (precision, k, tuple(kept.values()), tuple(decodes.items()))
            if same in tried:  # a smaller coverage that the same experts are needed for
                continue
            tried.add(same)
            found = of_task(traced(budget), run.model, task)
            graph = quantize(lower_moe(found, budget.layers(task, blocks), attention="fused"), precision)
            session = _session(graph)
            points.append(
                {
                    "precision": precision,
                    "coverage": coverage,
                    "top_k": k,
                    "experts": statistics.mean(map(len, kept.values())) if kept else 0.0,
                    **({"decoder_experts": statistics.mean(left.values())} if (left := _left(own, decodes)) else {}),
                    "bytes": graph.ByteSize(),
                    "time": _ratio(session, reference, task, shape),
                    "metric": score(val, _predictor(session, task, run, shape), count)[task],
                }
            )
        _mark(points, TASKS[task].higher_is_better)
        tasks[task] = points
    result = {
        "protocol": PROTOCOL,
        "images": min(count, len(val)),
        "size": list(shape),
        "threads": 1,
        "onnxruntime": onnxruntime.__version__,
        "run": run.info,
        "tasks": tasks,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sweep.json", result)
    with atomic_path(out / "sweep.png") as path:
        draw(result, path)
    return result


def _left(own: Mapping[int, int], kept: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Return how many experts a task keeps of the decoder, by block."""
    return {block: len(kept.get(block, range(count))) for block, count in own.items()}


def _spread(top_k: int) -> list[int]:
    """Return the experts per token to try: as trained, 1, and values between, most first."""
    values = np.unique(np.linspace(1, top_k, min(top_k, MAX_TOP_KS)).round().astype(int))
    return [int(value) for value in values[::-1]]


def _session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session on one thread. Graphs above protobuf's 2 GiB cannot be made from memory."""
    if graph.ByteSize() >= 2**31:
        raise InputError(
            "the graph is above 2 GiB, which a sweep cannot hold in memory: export packages and score them"
        )
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )


def _predictor(session: onnxruntime.InferenceSession, task: str, run: Run, shape: tuple[int, int]) -> Predictor:
    def predict(images: list[NetworkImage]) -> dict[str, torch.Tensor]:
        (logits,) = session.run([task], {"image": normalised(images, run.model.normalisation).numpy()})
        return {task: torch.from_numpy(np.asarray(logits))}

    return Predictor("onnx", [task], run.config.model.label_set, shape, predict)


def _ratio(
    session: onnxruntime.InferenceSession, reference: onnxruntime.InferenceSession, task: str, shape: tuple[int, int]
) -> float:
    """Return the time of one image relative to the reference's: the median over rounds that run both, in turn."""
    image = np.random.default_rng(0).standard_normal((1, 3, *shape)).astype(np.float32)

    def timed(one: onnxruntime.InferenceSession) -> float:
        start = time.thread_time()  # on one thread, this one: time that others take from it does not count
        one.run([task], {"image": image})
        return time.thread_time() - start

    for one in (session, reference):
        one.run([task], {"image": image})
    ratios = []
    for number in range(ROUNDS):
        first, second = (session, reference) if number % 2 else (reference, session)
        times = {id(first): timed(first)}
        times[id(second)] = timed(second)
        ratios.append(times[id(session)] / times[id(reference)])
    return statistics.median(ratios)


def _mark(points: list[dict[str, Any]], higher_is_better: bool) -> None:
    """Set `pareto` of each point: no other one is at least as good in size, time and metric, and better in one."""

    def beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
        sign = -1 if higher_is_better else 1
        slower = point["time"] / other["time"] - 1
        differences = (
            point["bytes"] - other["bytes"],
            slower if abs(slower) > SAME_TIME else 0,
            sign * (point["metric"] - other["metric"]),
        )
        return min(differences) >= 0 and max(differences) > 0

    for point in points:
        point["pareto"] = not any(beats(other, point) for other in points)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw metric against size and against time, a column for each task; points that nothing beats are filled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = result["tasks"]
    colours = dict(zip(SWEPT_PRECISIONS, ("#1f4e79", "#c0504d", "#e0a030", "#6a994e"), strict=True))
    markers = "osD^"
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4 * len(tasks), 7), squeeze=False, layout="constrained")
    top_ks = sorted({point["top_k"] for points in tasks.values() for point in points}, reverse=True)
    for column, (task, points) in enumerate(tasks.items()):
        row = TASKS[task]
        for line, (key, label) in enumerate((("bytes", "MB of one task"), ("time", "time, fp32 as trained = 1"))):
            axis = axes[line][column]
            for point in points:
                colour = colours[point["precision"]]
                axis.scatter(
                    point[key] / 1e6 if key == "bytes" else point[key],
                    point["metric"],
                    marker=markers[top_ks.index(point["top_k"])],
                    edgecolors=colour,
                    facecolors=colour if point["pareto"] else "none",
                )
            axis.set_xlabel(label)
            axis.set_ylabel(f"{row.metric} ({row.unit}), {'higher' if row.higher_is_better else 'lower'} is better")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(task)
    handles = [
        pyplot.Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in colours.items()
    ]
    handles += [
        pyplot.Line2D([], [], color="black", marker=markers[n], linestyle="", fillstyle="none", label=f"top-{k}")
        for n, k in enumerate(top_ks)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
