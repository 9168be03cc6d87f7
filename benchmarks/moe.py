"""What mixtures of experts cost, as ratios in one run.

    python benchmarks/moe.py [--device cuda] [--precision 32-true bf16-mixed] [--size 256 384 512] [--json FILE]

Layer: a MoE layer (16 experts, top-4, ViT-S widths) against the dense MLP of equal FLOPs, forward and backward, 8
images of 1024 tokens, for each way of executing the experts.
Step: a whole training step of M3ViT-S on the five tasks of PASCAL-Context, linear heads, all tasks in one pass, against
M3ViT's way: the backbone once more for each task, a loop over the experts that gathers and scatters, and one backward
pass of the summed losses (its code: models/models.py, train/train_utils.py). That code trains in float32, without
autocast: "as published" compares with that. Also this project's step with less memory: the batch in two parts
(`train.accumulate`), or blocks computed again (`train.checkpoint_activations`).

Each way runs in processes of its own, which take turns, there and back (A B C C B A), so that a busy moment hits all
alike: step by step on CUDA, some steps at a time on the CPU. Times are medians. Memory is the peak beyond what was
there before the first step (weights, libraries): the process's on the CPU, the allocator's on CUDA.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from _bench import (  # says how OpenMP's threads wait: before torch is imported
    arguments,
    child,
    machine,
    medians,
    one_of_each,
    save,
    seconds,
)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.models.experts import EXECUTIONS, ExpertBank
from m3vit.models.initialise import new_model
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel, Output
from m3vit.models.of_timm import Mlp
from m3vit.models.router import Router
from m3vit.training.config import Config, read_config, recipe_path
from m3vit.training.launch import Fabric
from m3vit.training.step import Stepper
from m3vit.training.weighting import make_weighting

DIM, EXPERTS, TOP_K = 384, 16, 4
OURS, THEIRS = "all tasks in one pass", "M3ViT's way"
WAYS: dict[str, dict[str, Any]] = {  # changes to the training configuration
    OURS: {},
    THEIRS: {},
    f"{OURS}, batch in 2 parts": {"accumulate": 2},
    f"{OURS}, checkpoint_activations": {"checkpoint_activations": True},
}


def loop_and_scatter(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """The usual loop: for each expert find its tokens, gather, run, scatter-add (the alternative measured against)."""
    y = torch.zeros_like(x_ND)
    for expert in range(bank.w1.shape[0]):
        token, slot = (expert_ids_NK == expert).nonzero(as_tuple=True)
        hidden = F.gelu(F.linear(x_ND[token], bank.w1[expert], bank.b1[expert]))
        rows = F.linear(hidden, bank.w2[expert], bank.b2[expert]) * weights_NK[token, slot, None]
        y = y.index_add(0, token, rows.to(y.dtype))
    return y


class TaskByTask(nn.Module):
    """The same model, run once for each task from the pixels on, as M3ViT's models/models.py does."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tasks: list[str], **options: Any) -> Output:
        outputs = [self.model(images, [task], **options) for task in tasks]
        logits = {task: value for output in outputs for task, value in output.logits.items()}
        return Output(logits, [routing for output in outputs for routing in output.routings], {})


class Layer(nn.Module):
    """A MoE layer for one task, in the shape of a dense MLP."""

    def __init__(self, execution: str) -> None:
        super().__init__()
        self.moe = MoELayer(Router(DIM, EXPERTS, TOP_K, 1, "multi"), ExpertBank(EXPERTS, DIM, DIM), execution)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[None], (0,))[0][0]


def measure_layer(device: str, precision: str, repeats: int, images: int) -> dict[str, float]:
    """Return the median seconds of the dense MLP and of each execution of the experts."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"dense MLP": Mlp(DIM, 4 * DIM)}
    layers |= {name: Layer(name) for name in EXECUTIONS if name != "reference"}
    if device == "cpu":
        layers.pop("grouped")  # torch's is a loop on the CPU, for tests
    x = torch.randn(images, 1024, DIM, device=device, requires_grad=True)

    def run(layer: nn.Module) -> Callable[[], None]:
        layer.to(device).train()

        def function() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
                y = layer(x)
            y.float().square().mean().backward()

        return function

    ways: dict[str, Callable[[], float]] = {
        name: partial(seconds, run(layer), device) for name, layer in layers.items()
    }
    shuffle = random.Random(0)
    return medians([one_of_each(ways, shuffle) for _ in range(repeats + 1)][1:])  # the first warms up


def pascal(size: int, batch: int) -> tuple[Config, Tensor, dict[str, Tensor]]:
    """Return the configuration of M3ViT-S with linear heads, and noise images with labels."""
    config = read_config(recipe_path("pascal-small"))
    config.model.pretrained, config.model.head, config.model.image_size = False, "linear", (size, size)
    config.model.distillation = []
    torch.manual_seed(0)
    shape = (batch, size, size)
    labels = {
        "semseg": torch.randint(0, 21, shape),
        "human_parts": torch.randint(0, 7, shape),
        "saliency": torch.randint(0, 2, shape, dtype=torch.uint8),
        "normals": F.normalize(torch.randn(batch, 3, size, size), dim=1),
        "edge": torch.randint(0, 2, shape, dtype=torch.uint8),
    }
    return config, torch.randn(batch, 3, size, size), labels


def run_steps(way: str, device: str, precision: str, size: int, batch: int) -> None:
    """Be the process of one way: a step and its seconds for each line that arrives, then the peak of the memory."""
    config, images, labels = pascal(size, batch)
    for key, value in WAYS[way].items():
        setattr(config.train, key, value)
    fabric = Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
    model = new_model(config.model).train()
    model.backbone.checkpoint_activations = config.train.checkpoint_activations
    if way == THEIRS:
        EXECUTIONS["sorted"] = EXECUTIONS["grouped"] = loop_and_scatter
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    wrapped, optimizer = fabric.setup(TaskByTask(model) if way == THEIRS else model, optimizer)
    stepper = Stepper(fabric, config, wrapped, optimizer, make_weighting(config, fabric.device))
    images, labels = fabric.to_device((images, labels))

    def memory() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def step() -> None:
        stepper.gradients(0, images, labels)
        stepper.optimizer.step()

    before = memory()
    for _ in sys.stdin:
        print(seconds(step, device), flush=True)
    print(memory() - before, flush=True)


def measure_steps(args: argparse.Namespace, size: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the median seconds and the peak GiB of a step, {precision: {way: ...}}."""
    keys = [(precision, way) for precision in args.precision for way in args.ways]
    # On CUDA all processes stay, a step a visit. On the CPU together they would fill the memory: two visits of some.
    stay = args.device == "cuda"
    visits, steps = (args.repeats + 1, 1) if stay else (2, 1 + (args.repeats + 1) // 2)
    workers = {key: start(args, size, *key) for key in keys} if stay else {}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    peaks = dict.fromkeys(keys, 0.0)
    for visit in range(visits):
        for key in keys[:: -1 if visit % 2 else 1]:
            process = workers.pop(key, None) or start(args, size, *key)
            assert process.stdin
            for step in range(steps):
                print(file=process.stdin, flush=True)
                taken = float(read(process))
                if visit if stay else step:  # the first of a process warms up
                    times[key].append(taken)
            if stay and visit < visits - 1:
                workers[key] = process
                continue
            process.stdin.close()
            peaks[key] = max(peaks[key], float(read(process)))
            process.wait()
    found: dict[str, dict[str, dict[str, float]]] = {precision: {} for precision in args.precision}
    for (precision, way), values in times.items():
        found[precision][way] = {"seconds": statistics.median(values), "peak_gib": peaks[precision, way]}
    return found


def start(args: argparse.Namespace, size: int, precision: str, way: str) -> subprocess.Popen:
    """Start the process of a way."""
    command = [sys.executable, __file__, "--worker", way, "--device", args.device, "--threads", str(args.threads)]
    command += ["--precision", precision, "--size", str(size), "--batch", str(args.batch)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read(process: subprocess.Popen) -> str:
    """Return a process's next line."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        sys.exit(f"a process ended with {process.wait()}: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
    return line


def print_steps(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the ways, and what this project's step gains over M3ViT's way: at equal precision, and as published."""
    for precision, ways in found.items():
        for way, values in ways.items():
            line = f"  {precision:<10} {way}: {values['seconds']:.3f} s, peak {values['peak_gib']:.2f} GiB"
            for name, base in (("equal precision", precision), ("as published", "32-true")):
                theirs = found.get(base, {}).get(THEIRS)
                if theirs and way != THEIRS and (name == "equal precision" or base != precision):
                    faster, memory = theirs["seconds"] / values["seconds"], values["peak_gib"] / theirs["peak_gib"]
                    line += f"; {faster:.2f} x as fast, {memory:.2f} x the memory ({name})"
            print(line, flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"], choices=["32-true", "bf16-mixed"])
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: its choice")
    parser.add_argument("--repeats", type=int, default=6, help="steps of each way, without those that warm up")
    parser.add_argument("--images", type=int, default=8, help="images of 1024 tokens through the layer")
    parser.add_argument("--size", type=int, nargs="*", default=[512], help="image sides of the step; none: the layer")
    parser.add_argument("--batch", type=int, default=2, help="images of the step")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="of the step")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker == "layer":
        print(json.dumps(measure_layer(args.device, args.precision[0], args.repeats, args.images)))
        return
    if args.worker:
        run_steps(args.worker, args.device, args.precision[0], args.size[0], args.batch)
        return
    result: dict[str, Any] = {"machine": machine(args.device)}
    result |= {"batch": args.batch, "images": args.images, "layer": {}, "step": {}}
    print(f"layer, {args.images} x 1024 tokens, forward and backward")
    for precision in args.precision:
        words = ["--worker", "layer", "--device", args.device, "--precision", precision, "--threads", args.threads]
        layer = child([*words, "--images", args.images, "--repeats", 3 * args.repeats])
        result["layer"][precision], dense = layer, layer["dense MLP"]
        for name, taken in layer.items():
            print(f"  {precision:<10} {name}: {1000 * taken:.2f} ms, {taken / dense:.2f} x the dense MLP", flush=True)
    for size in args.size:
        print(f"step, M3ViT-S, five tasks, {args.batch} images of {size} x {size}")
        result["step"][str(size)] = found = measure_steps(args, size)
        print_steps(found)
        save(args.json, result)  # after each size: a run that is stopped keeps what it has


if __name__ == "__main__":
    main()
