"""`m3vit report`: one self-contained HTML page, and the same numbers as JSON beside it.

Every column of the metric table is of the same images: the whole val split, or those the C-simulation ran on if the HLS
project was not evaluated. What `m3vit eval` measured of the same model and images is kept; the others are scored here.
"""

import base64
import io
import platform
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from m3vit import __version__
from m3vit.data.network_input import network_input
from m3vit.data.opening import open_split
from m3vit.data.sample import Sample, Split, no_label
from m3vit.errors import InputError
from m3vit.evaluation import scoring
from m3vit.evaluation.artefacts import onnx_predictor
from m3vit.evaluation.evaluate import Evaluation, Predictor, TrivialPredictor, evaluate, torch_predictor
from m3vit.evaluation.meters import TRAINED
from m3vit.evaluation.mixtures import check_mixed, gather_mixtures
from m3vit.evaluation.protocols import PROTOCOLS, network_image, prediction
from m3vit.evaluation.routing import spread
from m3vit.export.runtime.package import Package
from m3vit.files import atomic_path, require_ending, write_json
from m3vit.kinds.classes import NOT_LABELLED
from m3vit.kinds.pictures import Range, Scale, Swatches
from m3vit.label_sets import LABEL_SETS
from m3vit.models.router import expert_load
from m3vit.report import charts, errors
from m3vit.report.budgets import Budgets, front_chart, open_budgets, table_of_budgets, what_is_used
from m3vit.report.budgets import figures as budget_figures
from m3vit.report.hls import ProjectResults, check_same_weights, other_images, read_project
from m3vit.report.mixtures import mixture_charts
from m3vit.report.routing import page_charts, read_routing, sentence
from m3vit.report.stored import Stored
from m3vit.run_folder import Run
from m3vit.tasks import IGNORE, TASKS, kind_of, palette
from m3vit.training.checkpoint import read_metrics

Progress = Callable[[int, int, str], None]
WIDEST_PX = 400  # of a picture of a prediction: twice what a column of the page is wide
SMALL_PX = 220  # of one among the best and worst
ROUTED = 64  # images, at most, whose tokens are counted by expert: m3vit routing counts the whole split's
COLUMNS = ("trivial", "torch", "onnx", "csim", "emulator")


def write_report(
    run: Run,
    onnx: Path,
    hls: Path,
    out: Path,
    num_images: int,
    data_root: str | None = None,
    protocol: str | None = None,
    progress: Progress | None = None,
    budgets: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the page `out` and `out` with suffix .json; return the latter's content.

    Figures are of `protocol`, by default the one the run was last evaluated under. A missing ONNX package or simulation
    leaves its column out and is said on the page; a damaged one is an error. `budgets`: files of `m3vit search`, under
    which the model is scored and shown too.
    """
    used = open_budgets(run, budgets) if budgets else None
    require_ending(out, "page", ".html")
    if out.resolve().parent == run.folder.resolve() and out.stem in ("eval", "model"):
        raise InputError(f"--out {out}: its numbers would overwrite the run's {out.stem}.json; choose another name")
    protocol, evaluated = scoring.read(run.folder, protocol)
    tasks = run.config.model.tasks
    model_size = (run.config.model.image_size[0], run.config.model.image_size[1])
    root, label_set = data_root or evaluated["data"], run.config.model.label_set
    split = open_split(run.config.data.layout, root, "val", tasks, label_set=label_set)
    predictors: dict[str, Predictor] = {
        "trivial": TrivialPredictor(evaluated["trivial"], evaluated["label_set"]).predictor(model_size),
        "torch": torch_predictor(run.model),
    }
    notes = [f"The data are not a published release: {evaluated['origin']}."] if evaluated.get("origin") else []
    if (onnx / "manifest.json").exists():
        package = Package.load(onnx)
        check_same_weights(run, onnx, package.manifest)
        check_same_tasks(run, package)
        predictors["onnx"] = onnx_predictor(package)
    else:
        notes.append(f"No ONNX package at {onnx}: made with m3vit export onnx.")
    project = read_project(run, hls, split, protocol)
    notes += project.notes
    predictors |= project.scored
    indices = project.indices

    scores: dict[str, dict[str, dict[str, float]]] = {}
    evaluations: dict[str, Evaluation] = {}
    if len(indices) == len(split):
        stored = Stored(split, protocol)
        precisions = {"onnx": package.precision} if "onnx" in predictors else {}
        for name, folder in (("torch", run.folder), ("onnx", onnx)):
            if name in predictors and (kept := stored.evaluation(folder, predictors[name], precisions.get(name))):
                evaluations[name], scores[name] = kept, kept.scores()
        if "torch" in scores and (constant := stored.trivial(run.folder, tasks)):
            scores["trivial"] = constant
    for name, predictor in predictors.items():
        if name in scores:
            continue
        step = (lambda done, total, name=name: progress(done, total, f"scoring {name}")) if progress else None
        found = evaluate(split, predictor, protocol, indices=indices, workers=scoring.default_workers(), progress=step)
        scores[name], evaluations[name] = found.scores(), found
    if any(one.fingerprints != evaluations["torch"].fingerprints for one in project.stored.values()):
        raise other_images(hls, split)
    scores = {name: scores[name] for name in predictors}
    scores |= {name: one.scores() for name, one in project.stored.items()}
    if bare := [task for task in tasks if task not in evaluated["tasks"]]:
        notes.append(f"No val image is labelled for {', '.join(bare)}: no figure of it.")
        scores = {name: {task: one[task] for task in one if task not in bare} for name, one in scores.items()}
    untrained = evaluated.get("untrained")
    scores = {name: scoring.with_trained(one, label_set, untrained) for name, one in scores.items()}
    for task, words in scoring.without_untrained(untrained).items():
        figures = ", ".join(f"{name} {one[task][TRAINED]:.3f}" for name, one in scores.items() if TRAINED in one[task])
        notes += [f"{words}: {figures}."] if figures else []
    report = {
        "protocol": PROTOCOLS[protocol],
        "images": len(indices),
        "commit": run.info["commit"],
        "tasks": {
            task: {
                "metric": TASKS[task].metric,
                "unit": TASKS[task].unit,
                "higher_is_better": TASKS[task].higher_is_better,
                **{name: values[task][TASKS[task].metric] for name, values in scores.items()},
            }
            for task in tasks
            if task not in bare
        },
        "all_metrics": scores,
        "breakdown": evaluations["torch"].explained(),
        "images_by_error": errors.ranked(evaluations["torch"], tasks),
        "notes": notes,
    }
    if project.hardware and not project.hardware["note"]:
        report["hardware"] = project.hardware["json"]
    if used:
        report["budgets"] = budget_figures(run, split, used, protocol, indices, progress)
    routing, unrouted = read_routing(run.folder, run.info["weights_sha256"])
    if routing and routing["apart"]:
        report["routing"] = {"images": routing["images"], **routing["apart"]["all"]}
    routed = whole_split(routing) if routing else {"note": unrouted}
    mixed = []
    if check_mixed(run.model):
        mixtures = gather_mixtures(run.model, (split.load(index) for index in indices), label_set)
        report["decoder"] = mixtures.to_json()
        mixed = [(caption, charts.svg(figure)) for caption, figure in mixture_charts(mixtures)]
    wrong = where_wrong(split, predictors["torch"], evaluations["torch"], indices)
    shown = spread(project.drawable, num_images)
    drawn = budget_part(run, split, used, protocol, shown, report) if used else None
    page = render(run, split, predictors, project, protocol, shown, report, routed, wrong, drawn, mixed)
    with atomic_path(out) as path:
        path.write_text(page, encoding="utf-8")
    write_json(out.with_suffix(".json"), report)
    return report


def check_same_tasks(run: Run, package: Package) -> None:
    """Raise InputError if a package lacks a task of the run."""
    missing = set(run.config.model.tasks) - set(package.tasks)
    if missing:
        raise InputError(
            f"{package.folder} has no {', '.join(sorted(missing))}: export the package from this run again"
        )


def columns_of(report: dict[str, Any]) -> list[str]:
    """Return the columns of the metric table: those that any run can have, and the emulator's where it was scored."""
    return [name for name in COLUMNS if name != "emulator" or name in report["all_metrics"]]


# --- drawing --------------------------------------------------------------------------------------------------------


def photo_url(image: NDArray[np.uint8]) -> str:
    """Return a photograph [H, W, 3] as a JPEG data URL: as a PNG it would be seven times as long."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def data_url(picture: NDArray[np.uint8], enlarge: int = 1) -> str:
    """Return a picture [H, W, 3] as a PNG data URL, each pixel `enlarge` times as large."""
    buffer = io.BytesIO()
    Image.fromarray(picture.repeat(enlarge, axis=0).repeat(enlarge, axis=1)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(task: str, label_set: str, array: NDArray[Any], limits: Range | None, widest_px: int = WIDEST_PX) -> str:
    """Draw a prediction with the runtime's colours, values over a range; reduced to about what the page shows."""
    classes = LABEL_SETS[label_set].classes.get(task)
    drawn = Image.fromarray(kind_of(task).paint(array, palette(classes) if classes else (), limits))
    how = Image.Resampling.NEAREST if kind_of(task).nearest else Image.Resampling.BOX  # no colours between classes
    factor = -(-drawn.width // widest_px)
    return data_url(np.asarray(drawn.resize((drawn.width // factor, drawn.height // factor), how)))


def colours_of(task: str, label_set: str, array: NDArray[Any], limits: Range | None) -> Scale | Swatches:
    """Return what the colours of a task's pictures mean, as the legends of m3vit predict say it."""
    kind, row = kind_of(task), TASKS[task]
    described = {"decode": kind.name, "unit": kind.described_as or row.value_unit}
    return kind.legend(
        array, task, {**described, **kind.entry(LABEL_SETS[label_set].classes.get(task, ()))}, limits, plain=True
    )


def scale_bar(scale: Scale) -> dict[str, str]:
    """Return a continuous scale as CSS colours from left to right, and the values at its ends."""
    stops = scale.colours[np.linspace(0, len(scale.colours) - 1, 9).round().astype(int)].tolist()
    unit = scale.title.rpartition(", ")[2]
    return {
        "colours": ", ".join(f"rgb({red},{green},{blue})" for red, green, blue in stops),
        "low": f"{scale.low:.3g}",
        "high": f"{scale.high:.3g}" + (f" {unit}" if len(unit) < 4 else ""),
    }


def example(
    sample: Sample,
    predictors: dict[str, Predictor],
    columns: Sequence[str],
    protocol: str,
    label_set: str,
    seen: dict[str, set[int]],
) -> dict[str, Any]:
    """Draw one image: the input, and a row for each task, a column for the truth and each predictor.

    Adds to `seen` the ids of the classes in the pictures, by task with classes. None: not labelled, no picture.
    """
    shown = {task: [kind_of(task).drawable(truth)] for task, truth in sample.labels.items()}
    for name in columns[1:]:
        image = network_image(protocol, sample.id, sample.image, predictors[name].size)
        logits = predictors[name].run([image])
        for task, arrays in shown.items():
            arrays.append(prediction(protocol, task, logits[task][0], image, sample.image.shape[:2]))
    rows = []
    for task, arrays in shown.items():
        # Distances in one row share one range: that of the truth, or of the first prediction where there is none.
        limits = next((found for one in arrays if (found := kind_of(task).limits(one))), (0.0, 1.0))
        meaning = colours_of(task, label_set, arrays[0], limits)
        bare = int(task in sample.unlabelled)  # how many of the arrays stand for nothing
        rows.append(
            {
                "task": task,
                "scale": scale_bar(meaning) if isinstance(meaning, Scale) else None,
                "pictures": [None] * bare + [picture(task, label_set, one, limits) for one in arrays[bare:]],
            }
        )
        if task in seen:
            seen[task].update(*(np.unique(one).tolist() for one in arrays[bare:]))
    return {"id": sample.id, "input": photo_url(sample.image), "rows": rows}


@torch.inference_mode()
def routing_of(run: Run, sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each expert's count of choices [layers, tasks, E] and each patch's first expert [layers, tasks, h, w]."""
    size = (run.config.model.image_size[0], run.config.model.image_size[1])
    images = network_input(sample.image, size, run.model.normalisation)[None]
    grid = run.model.backbone.grid(images)
    loads, firsts = [], []
    for routing in run.model(images).routings:
        loads.append(expert_load(routing.expert_ids_RNK, run.config.model.num_experts).numpy())
        patches = routing.expert_ids_RNK[:, -grid[0] * grid[1] :, 0]  # without prefix tokens
        firsts.append(patches.reshape(-1, *grid).numpy())
    return np.stack(loads), np.stack(firsts)


def expert_map(experts: NDArray[np.int64]) -> str:
    """Draw which expert each patch [h, w] went to."""
    colours = np.array([charts.expert_colour(expert) for expert in range(int(experts.max()) + 1)], np.uint8)
    return data_url(colours[experts], enlarge=8)


def whole_split(routing: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of the routing over a split: its charts with their captions."""
    data = routing["data"]
    made = f" ({data['origin']})" if data["origin"] else ""
    return {
        "note": "",
        "data": f"{routing['images']} images of {data['release']}{made}, {data['split']}",
        "less": any(routing["budget"].values()),
        "commit": routing["commit"],
        "sentence": sentence(routing),
        "charts": [(caption, charts.svg(figure)) for caption, figure in page_charts(routing)],
    }


def where_wrong(split: Split, predictor: Predictor, evaluation: Evaluation, indices: Sequence[int]) -> dict[str, Any]:
    """Return what the page shows of the model's errors: breakdowns, and the worst and best images of each task.

    indices: places in the split of the evaluated images.
    """
    protocol, label_set, tasks = evaluation.protocol, evaluation.label_set, list(evaluation.statistics)
    loaded: dict[int, tuple[Sample, dict[str, NDArray[Any]]]] = {}

    def draw(place: int, task: str) -> dict[str, str]:
        if place not in loaded:
            sample = split.load(indices[place])
            image = network_image(protocol, sample.id, sample.image, predictor.size)
            logits, size = predictor.run([image]), sample.image.shape[:2]
            loaded[place] = sample, {name: prediction(protocol, name, logits[name][0], image, size) for name in tasks}
        sample, guesses = loaded[place]
        truth = sample.labels[task]
        limits = kind_of(task).limits(truth) or (0.0, 1.0)
        painted = {"ground truth": kind_of(task).drawable(truth), "torch": guesses[task]}
        pictures = {name: picture(task, label_set, array, limits, SMALL_PX) for name, array in painted.items()}
        return {"input": photo_url(small(sample.image)), **pictures}

    return {
        "breakdowns": [errors.breakdown_parts(found, task) for task, found in evaluation.explained().items()],
        "tasks": errors.cards(evaluation, tasks, draw),
    }


def small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a photograph [H, W, 3] at most about SMALL_PX wide."""
    factor = -(-image.shape[1] // SMALL_PX)
    return np.asarray(Image.fromarray(image).resize((image.shape[1] // factor, image.shape[0] // factor)))


def swatch(name: str, colour: Sequence[int]) -> tuple[str, str, str]:
    """Return (name, CSS colour, CSS colour of readable text on it)."""
    red, green, blue = colour
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    return name, f"rgb({red},{green},{blue})", ink


def render(
    run: Run,
    split: Split,
    predictors: dict[str, Predictor],
    project: ProjectResults,
    protocol: str,
    shown: list[int],
    report: dict[str, Any],
    routed: dict[str, Any],
    wrong: dict[str, Any],
    budgets: dict[str, Any] | None,
    mixed: Sequence[tuple[str, str]],
) -> str:
    """Return the page's HTML.

    `routed`: of `whole_split`, or the `note` in its place; `wrong`: of `where_wrong`; `budgets`: of `budget_part`;
    `mixed`: charts of the decoder's mixtures with their captions.
    """
    tasks, layers = run.config.model.tasks, run.model.backbone.moe_indices
    named = {"torch": predictors.get("torch"), "ONNX": predictors.get("onnx"), project.drawn_as: project.drawn}
    by_column = {column: predictor for column, predictor in named.items() if predictor is not None}
    columns = ["ground truth", *by_column]
    label_set = run.config.model.label_set
    examples: list[dict[str, Any]] = []
    seen: dict[str, set[int]] = {task: set() for task in LABEL_SETS[label_set].classes if task in tasks}
    total_load = None
    counted = sorted({*spread(project.indices, ROUTED), *shown})
    for index in counted if layers else shown:
        sample = split.load(index)
        if layers:
            load, firsts = routing_of(run, sample)
            total_load = load if total_load is None else total_load + load
        if index in shown:
            drawn = example(sample, by_column, columns, protocol, label_set, seen)
            drawn["routes"] = (
                [
                    {"block": block, "pictures": [expert_map(grid) for grid in per_task]}
                    for block, per_task in zip(layers, firsts, strict=True)
                ]
                if layers
                else []
            )
            examples.append(drawn)
    score_columns = columns_of(report)
    rows = []
    for task, values in report["tasks"].items():
        arrow = "↑" if values["higher_is_better"] else "↓"
        cells = [f"{values[name]:.3f}" if name in values else "-" for name in score_columns]
        rows.append({"task": task, "metric": f"{values['metric']} ({values['unit']}) {arrow}", "cells": cells})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m3vit.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    legends = []
    for task, ids in seen.items():
        names = LABEL_SETS[label_set].classes[task]
        colours = palette(names)
        known = [swatch(names[index].replace("_", " "), colours[index]) for index in sorted(ids - {IGNORE})]
        legends.append((task, known + ([swatch("not labelled", NOT_LABELLED)] if IGNORE in ids else [])))
    for task in tasks:  # directions
        if task not in seen and not isinstance(
            meaning := colours_of(task, label_set, no_label(task, (1, 1)), None), Scale
        ):
            legends.append((task, [swatch(*item) for item in meaning.items]))
    return environment.get_template("page.html.j2").render(
        run=run.folder.name,
        version=__version__,
        commit=report["commit"],
        parameters=f"{sum(p.numel() for p in run.model.parameters()):,}",
        epochs=run.info["epochs_trained"],
        date=date.today().isoformat(),
        machine=f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
        tasks=tasks,
        protocol=report["protocol"],
        images=report["images"],
        notes=report["notes"],
        score_columns=score_columns,
        scores=rows,
        columns=columns,
        examples=examples,
        legends=legends,
        curves=charts.loss_curves(read_metrics(run.folder), tasks),
        usage=charts.expert_usage(total_load.astype(float), layers, tasks) if total_load is not None else "",
        experts=[swatch(f"expert {e}", charts.expert_colour(e)) for e in range(run.config.model.num_experts)],
        top_k=run.config.model.top_k,
        counted=len(counted),
        routed=routed,
        wrong=wrong,
        budgets=budgets,
        hardware=project.hardware,
        mixed=mixed,
    )


def budget_part(
    run: Run, split: Split, used: Budgets, protocol: str, shown: list[int], report: dict[str, Any]
) -> dict[str, Any]:
    """Return what the page shows of budgets: their figures, the front, and pictures of the images under each."""
    predictors, label_set = used.predictors(run), run.config.model.label_set
    columns = ["ground truth", *predictors]
    return {
        "names": list(predictors),
        "columns": columns,
        "heads": [f"{task} {TASKS[task].metric} ({TASKS[task].unit})" for task in report["tasks"]],
        "rows": table_of_budgets(report["budgets"], list(report["tasks"])),
        "used": what_is_used(run.model, used.budgets),
        "chart": front_chart(used, report["budgets"]),
        "examples": [example(split.load(index), predictors, columns, protocol, label_set, {}) for index in shown],
    }
