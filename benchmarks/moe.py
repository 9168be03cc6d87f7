"""What mixtures of experts cost, as ratios in one run.

    python benchmarks/moe.py [--device cuda] [--threads 2] [--repeats 5] [--quick] [--json FILE]

Layer: a MoE layer (16 experts, top-4, ViT-S widths) against the dense MLP of equal FLOPs, forward and backward, 8
images of 1024 tokens, for each way of executing the experts.
Step: a whole training step of M3ViT-S on the five tasks of PASCAL-Context, linear heads, all tasks in one pass, against
the way of M3ViT's code: the backbone once more for each task, and a loop over the experts that gathers and scatters.
On a GPU in bf16, else in float32. Peak memory is the allocator's on a GPU, the process's on the CPU, each measured in a
process of its own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as m3vit does, before torch is imported
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from m3vit.models.experts import EXECUTIONS, ExpertBank
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import Router
from m3vit.training.config import Config, read_config, recipe_path
from m3vit.training.step import step_losses

DIM, EXPERTS, TOP_K = 384, 16, 4


def loop_and_scatter(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """The usual loop: for each expert find its tokens, gather, run, scatter-add (the alternative measured against)."""
    y = torch.zeros_like(x_ND)
    for expert in range(bank.w1.shape[0]):
        token, slot = (expert_ids_NK == expert).nonzero(as_tuple=True)
        hidden = F.gelu(F.linear(x_ND[token], bank.w1[expert], bank.b1[expert]))
        rows = F.linear(hidden, bank.w2[expert], bank.b2[expert]) * weights_NK[token, slot, None]
        y = y.index_add(0, token, rows.to(y.dtype))
    return y


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Return the median seconds of each function; they take turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):  # the first warms up
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Layer(nn.Module):
    """A MoE layer for one task, in the shape of a dense MLP."""

    def __init__(self, execution: str) -> None:
        super().__init__()
        self.moe = MoELayer(Router(DIM, EXPERTS, TOP_K, 1, "multi"), ExpertBank(EXPERTS, DIM, DIM), execution)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[None], (0,))[0][0]


def measure_layer(device: str, repeats: int, images: int) -> dict[str, float]:
    """Time the layer's executions and the dense MLP."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"dense MLP": Mlp(DIM, 4 * DIM)}
    layers |= {name: Layer(name) for name in EXECUTIONS if name != "reference"}
    x = torch.randn(images, 1024, DIM, device=device, requires_grad=True)

    def run(layer: nn.Module) -> Callable[[], None]:
        layer.to(device).train()

        def function() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                y = layer(x)
            y.float().square().mean().backward()

        return function

    return interleaved({name: run(layer) for name, layer in layers.items()}, repeats, device)


def pascal(device: str, size: int) -> tuple[Config, MultiTaskModel, Tensor, dict[str, Tensor]]:
    """Return M3ViT-S with linear heads, and noise images with labels."""
    config = read_config(recipe_path("pascal-small"))
    config.model.pretrained, config.model.head, config.model.image_size = False, "linear", (size, size)
    config.model.trunk_args, config.model.distillation = {"num_heads": 12}, []
    torch.manual_seed(0)
    model = MultiTaskModel(config.model).to(device).train()
    batch = 2
    images = torch.randn(batch, 3, size, size, device=device)
    labels = {
        "semseg": torch.randint(0, 21, (batch, size, size), device=device),
        "human_parts": torch.randint(0, 7, (batch, size, size), device=device),
        "saliency": torch.randint(0, 2, (batch, size, size), device=device, dtype=torch.uint8),
        "normals": F.normalize(torch.randn(batch, 3, size, size, device=device), dim=1),
        "edge": torch.randint(0, 2, (batch, size, size), device=device, dtype=torch.uint8),
    }
    return config, model, images, labels


class TaskByTask(nn.Module):
    """The same model, run once for each task from the pixels on, as M3ViT's models/models.py does."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tasks: None = None, **options: Any) -> Any:
        outputs = [self.model(images, [task], **options) for task in self.model.config.tasks]
        logits = {task: value for output in outputs for task, value in output.logits.items()}
        return outputs[0]._replace(
            logits=logits, routings=[routing for output in outputs for routing in output.routings]
        )


def measure_step(way: str, device: str, repeats: int, size: int) -> dict[str, float]:
    """Time training steps of one way, and report its peak memory; meant for a process of its own."""
    config, model, images, labels = pascal(device, size)
    runner: nn.Module = model
    if way == "M3ViT's way":
        runner = TaskByTask(model)
        EXECUTIONS["sorted"] = EXECUTIONS["grouped"] = loop_and_scatter
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss, _ = step_losses(config, runner, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = interleaved({way: step}, repeats, device)[way]
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "peak_gib": peak / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: its choice")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=8, help="images of 1024 tokens through the layer")
    parser.add_argument("--size", type=int, default=512, help="image side of the step")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--way", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(measure_step(args.way, args.device, args.repeats, args.size)))
        return
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    layer = measure_layer(args.device, args.repeats, args.images)
    dense = layer["dense MLP"]
    print(f"layer, {args.images} x 1024 tokens, forward and backward; dense MLP {1000 * dense:.1f} ms")
    for name, seconds in layer.items():
        if name != "dense MLP":
            print(f"  {name}: {1000 * seconds:.1f} ms, {seconds / dense:.2f} x the dense MLP of equal FLOPs")
    steps = {}
    for way in ("all tasks in one pass", "M3ViT's way"):
        command = [sys.executable, __file__, "--way", way, "--device", args.device, "--repeats", str(args.repeats)]
        command += ["--threads", str(args.threads), "--size", str(args.size)]
        steps[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ours, theirs = steps.values()
    print(f"step, M3ViT-S, five tasks, 2 images of {args.size} x {args.size}")
    for way, found in steps.items():
        print(f"  {way}: {found['seconds']:.2f} s, peak {found['peak_gib']:.2f} GiB")
    faster, memory = theirs["seconds"] / ours["seconds"], ours["peak_gib"] / theirs["peak_gib"]
    print(f"  {faster:.2f} x as fast, {memory:.2f} x its memory")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "layer": layer, "step": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
