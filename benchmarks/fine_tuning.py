"""Where the time of a CPU training step of nyud-vits14 goes, and what other settings cost: processor seconds an image.

    python benchmarks/fine_tuning.py --data ROOT --weights FILE [--rows ...] [--json FILE]

ROOT has at least eight training images in NYUD_MT's layout. Each row is a process of its own with one thread; of three
steps on one batch the least processor time is taken (user and system), which other processes disturb less than time on
the clock. `no gradient` is the part of the trunk before the first block with experts, run by itself.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _bench import arguments, child, machine, save

ROWS: dict[str, list[str]] = {
    "nyud-vits14": [],
    "head linear": ["--model.head=linear", "--model.head_args={}"],
    "head_stride 2": ["--model.head_stride=2"],
    "moe_blocks [9, 11]": ["--model.moe_blocks=[9,11]"],
    "moe_blocks [11]": ["--model.moe_blocks=[11]"],
    "moe_blocks [11], 32-true": ["--model.moe_blocks=[11]", "--train.precision=32-true"],
    "dense": ["--model.moe_blocks=none"],
    "dense, semseg": ["--model.moe_blocks=none", "--model.tasks=[semseg]"],
}


def measure(words: list[str]) -> dict[str, float]:
    """Take steps in this process."""
    import torch

    from m3vit.commands.training import config_from
    from m3vit.training.launch import launch
    from m3vit.training.loop import Training
    from m3vit.training.parts import freeze

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fixed = ["--data.workers=0", "--train.threads=1", "--train.accelerator=cpu", "--train.log_steps=1000000"]
        config, _ = config_from("train", ["nyud-vits14", *words, *fixed, "--out", str(out)])
        run = Training(launch(config.train), config, out, resume=False, progress=None)
        start = time.process_time()
        batch = next(iter(run.loader))
        loading = time.process_time() - start
        assert batch.images is not None, batch.errors
        run.wrapped.train()
        freeze(run.model, run.frozen, 0)
        backbone, images = run.model.backbone, batch.images
        first = min(backbone.moe_indices, default=len(backbone.trunk.blocks))

        def before_experts() -> None:
            with torch.no_grad(), run.fabric.autocast():
                tokens, _ = backbone.place(backbone.trunk.patch_embed(images))
                for block in backbone.trunk.blocks[:first]:
                    tokens = block(tokens)

        found = {"loading": loading, "no gradient": least(before_experts), "step": least(lambda: run.take_step(batch))}
        return {name: value / len(images) for name, value in found.items()}


def least(function: Callable[[], Any]) -> float:
    """Return the least processor seconds of three calls, after one more."""
    function()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--one", default="", help="be the process of this row")
    args = parser.parse_args()
    given = [f"--data.root={args.data}", f"--model.weights={args.weights}"]
    if args.one:
        import json

        print(json.dumps(measure([*ROWS[args.one], *given])))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {"machine": machine(), "rows": {}}
    print("| | " + " | ".join(("loading", "no gradient", "step")) + " |\n|---|---:|---:|---:|")
    for row in args.rows:
        figures = child(["--data", args.data, "--weights", args.weights, "--one", row])
        found["rows"][row] = figures
        print(f"| {row} | " + " | ".join(f"{value:.3f}" for value in figures.values()) + " |", flush=True)
    save(args.json, found)


if __name__ == "__main__":
    main()
