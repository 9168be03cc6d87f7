"""The models that benchmarks/onnx.py compares, and their packages."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

EXPERTS, TOP_K = 16, 4
TASKS = ("edge", "normals", "saliency", "human_parts", "semseg")
TASK = "edge"  # one channel: the head that adds least to what is compared
PRECISIONS = ("fp32", "int8")
SMALLEST = "int4-experts"  # of the sparse package alone


def config(moe: bool, size: int = 224) -> Any:
    """Return the configuration of the sparse or the dense model."""
    from m3vit.models.config import ModelConfig

    return ModelConfig(
        trunk="vit_small_patch16_224",
        image_size=(size, size),
        label_set="pascal",
        tasks=list(TASKS) if moe else [TASK],
        moe_blocks="odd" if moe else "none",
        num_experts=EXPERTS,
        top_k=TOP_K,
    )


def build(moe: bool) -> Any:
    """Return the model with random weights, in evaluation mode."""
    import torch

    from m3vit.models.initialise import new_model

    torch.manual_seed(0)
    return new_model(config(moe)).eval()


def contents(sizes: Sequence[int]) -> dict[str, Any]:
    """Return what each package holds, by its name."""
    from m3vit.export.onnx.package import Content
    from m3vit.models.budget import Budget

    both, plain = Content(precisions=PRECISIONS), Content(attention="standard")
    kept = dict.fromkeys(range(1, 12, 2), tuple(range(EXPERTS // 2)))
    sparse = replace(both, precisions=(*PRECISIONS, SMALLEST), all_tasks=True)
    every = {"sparse": sparse, "dense": both, "kept": replace(both, budget=Budget(kept={TASK: kept}))}
    every |= {"sparse-standard": plain, "dense-standard": plain}
    return every | {f"all-{size}": replace(both, size=(size, size), static=True) for size in sizes}


def export(folder: Path, sizes: Sequence[int]) -> float:
    """Write the packages that are not in `folder` yet; return the seconds that a task of the sparse model took."""
    from m3vit.export.onnx.package import export_package
    from m3vit.models.initialise import new_model

    seconds = 0.0
    for name, content in contents(sizes).items():
        if (folder / name / "manifest.json").is_file():
            continue
        print(f"exporting {name}", file=sys.stderr, flush=True)
        model = build(not name.startswith("dense"))
        if name != "sparse" and model.config.tasks != [TASK]:  # one task is enough
            only = new_model(replace(model.config, tasks=[TASK]))
            only.load_state_dict({key: value for key, value in model.state_dict().items() if key in only.state_dict()})
            model = only.eval()
        start = time.perf_counter()
        export_package(model, folder / name, content, info={})
        if name == "sparse":
            seconds = (time.perf_counter() - start) / (len(TASKS) + 1)  # the graph of all at once is one more
    return seconds


def packages(size: int) -> dict[str, str]:
    """Return the package of each kind of graph."""
    return {"dense": "dense", "sparse": "sparse", "sparse, 8 kept": "kept", "all experts": f"all-{size}"}


def macs(size: int) -> dict[str, int]:
    """Return the MACs of one image of a task, head included, and of all tasks at once."""
    from m3vit.profiling import graph_macs, profile

    configs = {
        "dense": config(False, size),
        "sparse": config(True, size),
        "all experts": replace(config(True, size), top_k=EXPERTS),
    }
    found = {name: profile(each, TASK)["tasks"][TASK]["macs"]["total"] for name, each in configs.items()}
    return found | {"all tasks": graph_macs(config(True, size), TASKS, (size, size))}
