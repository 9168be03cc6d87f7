"""How fast samples are loaded at the published image sizes, and how much of a training step is spent waiting for them.

    python benchmarks/loading.py [--layouts nyud pascal] [--images 24] [--steps 4] [--device cpu] [--json FILE]

Renders a small data set of each layout at full size (NYUD_MT 480 x 640, PASCAL-Context 375 x 500) into a temporary
folder, then, for the two published pipelines: samples per second of reading alone, of reading and augmenting in the
training process, and with loader processes (as a ratio to the former); and real training steps of M3ViT-S (recipes
nyud-small and pascal-small), of which the share spent waiting for the loader is reported. Files come from the page
cache: what is measured is decoding and augmentation, not the disk.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from _bench import arguments, machine, save  # says how OpenMP's threads wait: before torch is imported

# isort: split
import torch

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader
from m3vit.data.opening import open_split
from m3vit.data.sample import Split
from m3vit.data.synthetic.dataset import synthesize
from m3vit.label_sets import LABEL_SETS
from m3vit.models.initialise import new_model
from m3vit.normalisation import IMAGENET
from m3vit.training.config import read_config, recipe_path
from m3vit.training.step import step_losses

IMAGE_SIZE = {"nyud": (480, 640), "pascal": (375, 500)}
PIPELINES = {"m3vit": "", "invpt": "-invpt"}  # suffix of the recipe


def rate(split: Split, size: tuple[int, int], pipeline: str, workers: int, passes: int) -> float:
    """Return samples per second of a loader, from its second pass on: the first starts the processes."""
    dataset = TrainingSet(split, size, 0, IMAGENET, pipeline)
    order = EpochBatches(len(dataset), 2, 0)
    loader = make_loader(dataset, order, workers)
    count, start = 0, time.perf_counter()
    for order.epoch in range(passes + (workers > 0)):
        if workers and order.epoch == 1:
            count, start = 0, time.perf_counter()
        for batch in loader:
            count += len(batch.images)
    return count / (time.perf_counter() - start)


def waiting(
    split: Split, layout: str, pipeline: str, workers: int, steps: int, batch: int, device: str
) -> dict[str, float]:
    """Return seconds a step, and the share of it spent waiting for the loader, of M3ViT-S on all tasks."""
    config = read_config(recipe_path(f"{layout}-small{PIPELINES[pipeline]}"))
    # Linear heads without distillation: the lightest step, which waits the most.
    config.model.pretrained, config.model.head, config.model.distillation = False, "linear", []
    size = (config.model.image_size[0], config.model.image_size[1])
    torch.manual_seed(0)
    model = new_model(config.model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    dataset = TrainingSet(split, size, 0, IMAGENET, pipeline)
    order = EpochBatches(len(dataset), batch, 0)
    loader = make_loader(dataset, order, workers, pin_memory=device != "cpu")
    waited = total = 0.0
    done = -1  # the first step warms up
    while done < steps:
        batches = iter(loader)
        while done < steps:
            start = time.perf_counter()
            found = next(batches, None)
            if found is None:
                break
            ready = time.perf_counter()
            images, labels = found.images.to(device), {task: label.to(device) for task, label in found.labels.items()}
            loss, _ = step_losses(config, model, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if device != "cpu":
                torch.cuda.synchronize()
            if done >= 0:
                waited, total = waited + ready - start, total + time.perf_counter() - start
            done += 1
        order.epoch += 1
    return {"s_per_step": total / steps, "waiting_percent": 100 * waited / total}


def measure(layout: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Render a data set of a layout and measure it."""
    size = IMAGE_SIZE[layout]
    root = folder / layout
    synthesize(root, layout=layout, train=args.images, val=1, size=size)
    split = open_split(layout, root, "train", LABEL_SETS[layout].tasks)
    start = time.perf_counter()
    for index in range(len(split)):
        split.load(index)
    result: dict[str, Any] = {
        "image_size": size,
        "reading": len(split) / (time.perf_counter() - start),
        "pipelines": {},
    }
    for pipeline in PIPELINES:
        config = read_config(recipe_path(f"{layout}-small{PIPELINES[pipeline]}"))
        target = (config.model.image_size[0], config.model.image_size[1])
        rates = {workers: rate(split, target, pipeline, workers, 1) for workers in (0, *args.workers)}
        found: dict[str, Any] = {"samples_per_s": rates}
        for workers in args.workers:
            found[f"ratio_{workers}_workers"] = rates[workers] / rates[0]
        if args.steps:
            found["step"] = waiting(split, layout, pipeline, args.workers[-1], args.steps, args.batch, args.device)
        result["pipelines"][pipeline] = found
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layouts", nargs="+", default=["nyud", "pascal"], choices=list(IMAGE_SIZE))
    parser.add_argument("--images", type=int, default=24, help="rendered images of each layout")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="loader processes")
    parser.add_argument("--steps", type=int, default=2, help="training steps; 0 leaves them out")
    parser.add_argument("--batch", type=int, default=2, help="images a training step")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(args.device)}
    with tempfile.TemporaryDirectory(prefix="m3vit-loading-") as folder:
        for layout in args.layouts:
            results[layout] = found = measure(layout, args, Path(folder))
            print(
                f"{layout} {found['image_size'][0]}x{found['image_size'][1]}: reading {found['reading']:.1f} samples/s"
            )
            for name, values in found["pipelines"].items():
                rates = values["samples_per_s"]
                line = f"  {name}: {rates[0]:.1f} samples/s in the training process"
                line += "".join(f", {rates[n]:.1f} with {n} workers (x{rates[n] / rates[0]:.2f})" for n in args.workers)
                print(line)
                if "step" in values:
                    step = values["step"]
                    print(
                        f"    M3ViT-S, batch {args.batch}, {args.device}, {args.workers[-1]} workers: "
                        f"{step['s_per_step']:.2f} s a step, {step['waiting_percent']:.1f} % of it waiting"
                    )
    save(args.json, results)


if __name__ == "__main__":
    main()
