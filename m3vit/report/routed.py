"""`m3vit routing`: walk through a split, write which experts the tasks use, and draw it."""

from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from m3vit import __version__
from m3vit.data.opening import layout_for, open_split, origin
from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.evaluation.artefacts import choose_device
from m3vit.evaluation.protocols import PROTOCOLS
from m3vit.evaluation.routing import PROTOCOL, check_routed, choices, gather, spread
from m3vit.evaluation.routing_figures import figures
from m3vit.files import atomic_folder, require_replaceable
from m3vit.models.budget import FULL, Budget, in_all_layers, read_top_k
from m3vit.models.multitask import MultiTaskModel
from m3vit.report.charts import plt
from m3vit.report.routing import FILE, FORMAT, charts, map_chart
from m3vit.run_folder import git_commit, load_run

Progress = Callable[[int, int, str], None]
DPI = 130


def measure(
    folder: Path,
    *,
    split: str = "val",
    limit: int | None = None,
    data_root: str | None = None,
    top_k: str | None = None,
    maps: int = 2,
    overlay: bool = False,
    device: str = "auto",
    batch: int = 1,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the routing of a run over a split into the folder `out` (default: RUN/routing), and return its JSON.

    Arguments are those of `m3vit.commands.routing.Routing`. Raises InputError for a run without experts, data that do
    not fit, and a folder with files of others.
    """
    out = out or (folder / FILE).parent
    require_replaceable(out, "routing", FILE.name, partial(_own_files, out))
    run = load_run(folder)
    model, labels = run.model.to(choose_device(device)), run.config.model.label_set
    check_routed(model, folder)
    tasks = model.config.tasks
    budget = FULL
    if top_k is not None:
        budget = in_all_layers(read_top_k(top_k, tasks, model.config.num_experts), model.backbone.moe_indices)
    root = data_root or run.config.data.root
    data = open_split(layout_for(labels, root, tasks), root, split, tasks, label_set=labels)
    indices = spread(list(range(len(data))), limit or len(data))
    step = (lambda done, total: progress(done, total, "routing")) if progress else None
    sums = gather(model, data, indices, budget=budget, batch=batch, progress=step)
    found: dict[str, Any] = {
        "format": FORMAT,
        "m3vit": __version__,
        "commit": git_commit(),
        "run": {
            "folder": folder.name,
            "commit": run.info["commit"],
            "epochs_trained": run.info["epochs_trained"],
            "weights_sha256": run.info["weights_sha256"],
            "router": model.config.router,
        },
        "data": {
            "root": str(Path(root).resolve()),
            "release": data.release,
            "origin": origin(root),
            "label_set": labels,
            "split": split,
        },
        "input": PROTOCOLS[PROTOCOL],
        "budget": budget.to_json(),
        "tasks": list(tasks),
        **figures(sums),
    }
    drawn = spread(indices, maps) if maps else []
    with atomic_folder(out) as staging:
        names = [_save(figure, staging, chart) for chart, figure in charts(found)]
        for index in drawn:
            sample = data.load(index)
            firsts = patch_map(model, sample.image, budget)
            picture = sample.image if overlay else None
            figure = map_chart(firsts, model.backbone.moe_indices, tasks, model.config.num_experts, picture)
            names.append(_save(figure, staging, f"map-{sample.id}"))
        found["files"] = names
        write_sealed_json(staging / FILE.name, found)
    return found


def patch_map(model: MultiTaskModel, image: NDArray[np.uint8], budget: Budget = FULL) -> NDArray[np.int64]:
    """Return the first expert of each patch [L, R, h, w] of an RGB image uint8 [H, W, 3]."""
    (one,) = choices(model, [image], budget)
    height, width = model.config.image_size
    patch = model.backbone.patch_size
    return one.first_LRT.reshape(*one.first_LRT.shape[:2], height // patch, width // patch)


def _save(figure: Figure, folder: Path, name: str) -> str:
    """Save a figure, close it, and return the name of its file."""
    file = f"{name}.png"
    figure.savefig(folder / file, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file


def _own_files(out: Path, names: set[str], advice: str) -> Set[str]:
    """Return which files of `out` an earlier call wrote."""
    return {FILE.name, *read_sealed_json(out / FILE.name, advice).get("files", ())} & names
