"""Memory and time of training steps: parts, recomputed blocks, budgets, gradient methods, against the plain step.

    python benchmarks/training.py [--recipe nyud-small] [--size 240x320] [--head linear] [--batch 4] [--json FILE]

Each way runs in a process of its own (or in two), on random images and labels; on the CPU, memory is the process's peak
beyond what it held before the model was built (the libraries), on CUDA what torch allocated at most. All with the same
weights and images, and with one thread a core. Two processes have half of the batch each, and the memory is one's.
"""

import argparse
import json
import resource
import sys
import time
from typing import Any

from _bench import arguments, child, machine, save

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate 2": {"accumulate": 2},
    "accumulate 4": {"accumulate": 4},
    "checkpoint_activations": {"checkpoint_activations": True},
    "tasks_per_step 1": {"tasks_per_step": 1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "budgets 1": {"budgets": 1},
    "budgets 1, blocks left out": {"budgets": 1, "budget_skip": [2, 4, 6, 8, 10]},
    "budgets 1, fewer channels": {"budgets": 1, "budget_heads": 0.25},  # of pup heads
    "budgets 2": {"budgets": 2},
    "pcgrad": {"weighting": "pcgrad"},
    "pcgrad, checkpoint_activations": {"weighting": "pcgrad", "checkpoint_activations": True},
    "2 processes": {},
    "2 processes, fsdp": {"strategy": "fsdp"},
    "2 processes, fsdp, checkpoint_activations": {"strategy": "fsdp", "checkpoint_activations": True},
}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Run steps of one way in this process."""
    import torch

    from m3vit.collectives import leave_group, world_size
    from m3vit.label_sets import LABEL_SETS
    from m3vit.models.initialise import new_model
    from m3vit.training.config import read_config, recipe_path
    from m3vit.training.launch import launch
    from m3vit.training.optim import make_optimizer
    from m3vit.training.step import Stepper
    from m3vit.training.weighting import make_weighting

    config = read_config(recipe_path(args.recipe))
    height, width = (int(part) for part in args.size.split("x"))
    config.model.pretrained, config.model.image_size = False, (height, width)
    if args.head != "pup":
        config.model.head, config.model.distillation = args.head, []
    for key, value in WAYS[args.way].items():
        setattr(config.train, key, value)
    config.train.accelerator = args.device
    config.check()
    torch.manual_seed(0)
    fabric = launch(config.train)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = new_model(config.model).train()
    model.backbone.checkpoint_activations = config.train.checkpoint_activations
    weighting = make_weighting(config, fabric.device)
    wrapped = fabric.setup(model)
    optimizer = fabric.setup_optimizers(make_optimizer(config.train, model, weighting.parameters()))
    stepper = Stepper(fabric, config, wrapped, optimizer, weighting)
    batch = args.batch // world_size()
    shape = (batch, height, width)
    labels = {}
    for task in config.model.tasks:
        channels = LABEL_SETS[config.model.label_set].channels(task)
        classes = torch.randint(0, max(channels, 2), shape)
        normals = torch.nn.functional.normalize(torch.randn(batch, 3, height, width), dim=1)
        labels[task] = {"depth": torch.rand(shape) + 1, "normals": normals}.get(task, classes)
    images, labels = fabric.to_device((torch.randn(batch, 3, height, width), labels))
    times, processor = [], 0.0
    for step in range(args.steps + 1):  # the first warms up
        start, begin = time.perf_counter(), time.process_time()
        stepper.gradients(step, images, labels)
        stepper.clip()
        stepper.optimizer.step()
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        processor += (time.process_time() - begin) * bool(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if fabric.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    leave_group()
    return {"peak_mib": peak, "s_per_step": sum(times[1:]) / args.steps, "cpu_s_per_step": processor / args.steps}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="nyud-small")
    parser.add_argument("--size", default="240x320", help="HEIGHTxWIDTH; the recipe's own is 4 times as many pixels")
    parser.add_argument("--head", default="linear", choices=["linear", "conv", "pup"], help="pup: the recipe's own")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--way", default=None, choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    results: dict[str, Any] = {"machine": machine(args.device), "ways": {}}
    for way in args.ways:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "2 proc" in way else []
        found = results["ways"][way] = child([*sys.argv[1:], "--way", way], torchrun)
        plain = results["ways"].get("plain", found)
        found["memory_ratio"], found["time_ratio"], found["cpu_ratio"] = (
            found[key] / plain[key] for key in ("peak_mib", "s_per_step", "cpu_s_per_step")
        )
        cpu = f"{found['cpu_s_per_step']:.2f} s of the processor (x{found['cpu_ratio']:.2f})"
        print(
            f"{way}: {found['peak_mib']:.0f} MiB (x{found['memory_ratio']:.2f}), {found['s_per_step']:.2f} s a step "
            f"(x{found['time_ratio']:.2f}), {cpu}",
            flush=True,
        )
    save(args.json, results)


if __name__ == "__main__":
    main()
