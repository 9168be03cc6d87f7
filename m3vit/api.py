"""What a program calls: docs/api.md has an example of each. Nothing is imported before it is needed.

Every function raises `m3vit.InputError` for bad input, with one line that says what was given, what is allowed and what
to do. Plug-ins (docs/plugins.md) are loaded with `m3vit.plugins.load`; those of installed packages by `configure` and
`load_run`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from m3vit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from m3vit.export.runtime.package import Package
    from m3vit.models.multitask import MultiTaskModel
    from m3vit.run_folder import Run
    from m3vit.training.config import Config

Options = TypeVar("Options")


def configure(recipe: str, keys: Mapping[str, Any] | None = None) -> "Config":
    """Return the configuration of a recipe, some of its keys changed.

    keys: as on the command line, {"model.tasks": ["depth"], "train.epochs": 2, "model.trunk_args.depth": 4}; a key of a
    mapping changes that entry alone. `m3vit train RECIPE --help` explains every key.
    """
    import yaml

    from m3vit import plugins
    from m3vit.models.config import ModelConfig
    from m3vit.training.config import SECTIONS, Config, DataConfig, TrainConfig, recipe_path
    from m3vit.values import not_among

    plugins.load_installed()
    values = yaml.safe_load(recipe_path(recipe).read_text())
    sections: dict[str, Any] = dict(zip(SECTIONS, (ModelConfig, DataConfig, TrainConfig), strict=True))
    known = {f"{section}.{field.name}" for section, kind in sections.items() for field in fields(kind)}
    for key, value in (keys or {}).items():
        section, name, *entry = [*key.split(".", 2), ""][: max(2, key.count(".") + 1)]
        if f"{section}.{name}" not in known:
            raise InputError(not_among("a key", key, tuple(_near(key, known))))
        own = values.setdefault(section, {})
        if entry:
            own[name] = {**own.get(name, {}), entry[0]: value}
        else:
            own[name] = value
    model, data, settings = (kind(**values.get(section, {})) for section, kind in sections.items())
    config = Config(model, data, settings, plugins.loaded())
    config.check()
    return config


def build_model(config: "Config") -> "MultiTaskModel":
    """Return the model of a configuration, its weights drawn from train.seed and filled as model.init says."""
    from m3vit.training.starting import build

    return build(config)


def train(
    config: "Config", out: Path | str, *, resume: bool = False, say: Callable[[str], None] | None = None
) -> "Run":
    """Train into the run folder `out` and return the run. `say` gets lines about how it starts.

    Called in the main thread: Ctrl-C and SIGTERM end it with a checkpoint, and raise m3vit.training.stopping.Stopped.
    """
    from m3vit.training.loop import train

    train(config, Path(out), resume=resume, say=say)
    return load_run(out)


def load_run(folder: Path | str) -> "Run":
    """Open a run folder: its `config`, its `model` in evaluation mode on the CPU, and `info`, its model.json."""
    from m3vit import run_folder

    return run_folder.load_run(Path(folder))


def load_package(folder: Path | str, **options: Any) -> "Package":
    """Open an ONNX package, which predicts without torch; options are those of `m3vit.export.runtime.Package.load`."""
    from m3vit.export.runtime.package import Package

    return Package.load(folder, **options)


def evaluate(
    folder: Path | str,
    protocol: str = "A",
    *,
    data_root: str | None = None,
    device: str = "auto",
    batch: int = 1,
    precision: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    predictions: Path | None = None,
    budget: Path | str | None = None,
) -> dict[str, Any]:
    """Score a run, an ONNX package or an HLS project on the val split, add the result to its eval.json, return it.

    The scores are in result["tasks"][task]["torch" or "onnx" or ...], by metric; of a run "trivial" stands beside it.
    protocol: A or B (docs/datasets.md). device, batch: of a run. precision: of a package that holds several. workers:
    processes that match edges. predictions: a new folder for the files that the published code stores and scores.
    budget: of a run, a file of `m3vit search`; of a package or a project, the name of one that it holds. Its eval.json
    is then that of the folder FOLDER/budgets/NAME, unless it is the export's own (its first).
    Under torchrun, processes other than the first get {}.
    """
    from m3vit.evaluation.artefacts import choose_device, is_export, open_predictor, own_budget
    from m3vit.evaluation.scoring import score
    from m3vit.models.budget_file import BUDGETS, read_budget
    from m3vit.tasks import TASKS
    from m3vit.training.config import read_run_config

    folder = Path(folder)
    is_run = not is_export(folder)
    used = (read_budget(Path(budget)) if is_run else str(budget)) if budget is not None else None
    place = choose_device(device) if is_run else "cpu"
    predictor, info, root = open_predictor(folder, place, batch, precision, used)
    into = folder
    if budget is not None and (is_run or str(budget) != own_budget(folder)):
        into = folder / BUDGETS / (Path(budget).stem if is_run else str(budget))
    if workers and not any(TASKS[task].matches_edges for task in predictor.tasks):
        raise InputError(f"--workers are processes that match edges, which {folder} does not predict: leave it out")
    if not (data_root or root):
        raise InputError(f"{folder} does not say where its data are: give --data.root DIR")
    partial = is_run and read_run_config(folder).data.on_error == "skip"
    into.mkdir(parents=True, exist_ok=True)
    found = score(
        predictor,
        into,
        data_root or root,
        protocol,
        trivial=is_run,
        partial=partial,
        info=info,
        workers=workers,
        progress=progress,
        predictions=predictions,
    )
    return found or {}


def export_onnx(
    run: "Run | Path | str", out: Path | str, *, say: Callable[[str], None] | None = None, **options: Any
) -> "Package":
    """Write the ONNX package of a run to `out`, compared with torch, and open it.

    options: fields of m3vit.export.onnx.options.Content and Request, such as tasks, precisions, size, coverage, keep.
    """
    from m3vit.export.onnx.from_run import export_run
    from m3vit.export.onnx.options import Content, Request

    content, request = _options("export_onnx", options, Content, Request)
    export_run(_opened(run), Path(out), content, request, say=say or _silent)
    return load_package(out)


def export_hls(run: "Run | Path | str", out: Path | str, **options: Any) -> dict[str, Any]:
    """Write the hls4ml project of a run to `out`, and return its manifest.

    options: fields of m3vit.export.hls.options.Request, such as schedule, board, samples, weight_bits.
    """
    from m3vit.export.hls.from_run import export_run
    from m3vit.export.hls.options import Request

    (request,) = _options("export_hls", options, Request)
    return export_run(_opened(run), Path(out), request)


def routing_statistics(run: Path | str, **options: Any) -> dict[str, Any]:
    """Measure which experts a run's tasks use on a split, write it into the run's routing/, and return it.

    options: those of `m3vit routing`, such as split, limit, data_root, top_k, maps, out. docs/routing.md has the
    figures.
    """
    from inspect import signature

    from m3vit.report.routed import measure
    from m3vit.values import not_among

    known = tuple(signature(measure).parameters)[1:]
    for name in options:
        if name not in known:
            raise InputError(not_among("an option of routing_statistics", name, known))
    return measure(Path(run), **options)


def forward_intermediates(
    model: "MultiTaskModel",
    images: "Tensor | NDArray[np.uint8]",
    indices: int | Sequence[int] | None = None,
    tasks: Sequence[str] | None = None,
) -> "dict[str, list[Tensor]]":
    """Return the backbone's features of each task after some of its blocks, as maps [B, D, h, w], with gradients.

    As timm's forward_intermediates: indices None gives all blocks, a number so many of the last ones, a list those;
    negative ones count from the end. images: normalised [B, 3, H, W] float32, or RGB [B, H, W, 3] uint8, which the
    model's normalisation is applied to. Up to the first block with a router the features of all tasks are the same.
    """
    import numpy as np
    import torch

    from m3vit.data.network_input import normalise

    names = list(model.config.tasks if tasks is None else tasks)
    depth = len(model.backbone.trunk.blocks)
    asked = range(depth) if indices is None else range(depth - indices, depth) if isinstance(indices, int) else indices
    blocks = [index + depth if index < 0 else index for index in asked]
    if not blocks or any(not 0 <= block < depth for block in blocks) or isinstance(indices, bool):
        raise InputError(f"indices are {indices}: give block numbers of 0 to {depth - 1}, or how many of the last ones")
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise InputError(f"images are {images.dtype} {list(images.shape)}: give uint8 [B, H, W, 3], or a tensor")
        images = normalise(torch.from_numpy(images).permute(0, 3, 1, 2), model.normalisation)
    ids = tuple(model.task_id(name) for name in names)
    device = next(model.parameters()).device
    features, _ = model.backbone(images.to(device), ids, tuple(sorted(set(blocks))))
    maps = {block: features.of(block).mT.unflatten(3, features.grid) for block in features.tokens}
    return {name: [maps[block][place] for block in blocks] for place, name in enumerate(names)}


def _opened(run: "Run | Path | str") -> "Run":
    return load_run(run) if isinstance(run, str | Path) else run


def _options(caller: str, given: Mapping[str, Any], *kinds: type[Any]) -> list[Any]:
    """Return an instance of each dataclass, with those of the given values that are its own."""
    from m3vit.values import check_values, not_among

    names = [[field.name for field in fields(kind)] for kind in kinds]
    for name in given:
        if not any(name in own for own in names):
            raise InputError(not_among(f"an option of {caller}", name, tuple(one for own in names for one in own)))
    made = [
        replace(kind(), **{name: given[name] for name in own if name in given})
        for kind, own in zip(kinds, names, strict=True)
    ]
    for options in made:
        check_values(caller, options)
    return made


def _near(key: str, known: set[str]) -> list[str]:
    """Return the keys that a wrong one may have meant: those of its section."""
    from difflib import get_close_matches

    return get_close_matches(key, sorted(known), 5, 0.3) or sorted({one.split(".")[0] + ".*" for one in known})


def _silent(_: str) -> None:
    pass
