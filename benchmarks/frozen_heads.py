"""Which head learns fastest from the tokens of a frozen trunk: minutes for each, as the trunk runs once an image.

    python benchmarks/frozen_heads.py --data ROOT --weights FILE --out runs/heads [--epochs 4] [--rows ...]

ROOT is NYUD-v2 in NYUD_MT's layout, FILE weights of timm's vit_small_patch14_dinov2. Rows are trained with the recipe
nyud-vits14 but for a dense trunk that never moves, semseg and depth alone and no change of colours, so that an image or
its mirror image is the same each time: its tokens are kept, in bfloat16 (3 GB). Each is then scored as by m3vit eval,
protocol A, on the whole val split. What is trained and scored is not done again.
"""

import zlib
from pathlib import Path
from typing import Any

from _bench import arguments, machine, save  # says how OpenMP's threads wait: before torch is imported

# isort: split
import torch
from photographs import METRICS, figures, folder_of  # beside this file
from torch import Tensor

from m3vit.cli import main as m3vit
from m3vit.models.backbone import Backbone
from m3vit.models.decoders.base import Features

BLOCKS = "blocks: [3, 5, 7, 9, 11]"  # as the recipe's
ROWS = {
    "conv": ["--model.head=conv", f"--model.head_args={{width: 128, {BLOCKS}}}"],
    "conv, half unrectified": ["--model.head=conv", f"--model.head_args={{width: 128, unrectified: 64, {BLOCKS}}}"],
    "conv, all unrectified": ["--model.head=conv", f"--model.head_args={{width: 128, unrectified: 128, {BLOCKS}}}"],
    "linear": ["--model.head=linear", "--model.head_args={}"],  # of the last block
}
FIXED = ["--model.moe_blocks=none", "--model.tasks=[semseg,depth]", "--train.freeze=[embed,trunk]"]
FIXED += ["--train.freeze_epochs={}", "--train.lr_scale={}", "--data.colour=0", "--train.eval_epochs=0"]
SHOWN = [(task, metric) for task in ("semseg", "depth") for metric in METRICS[task]]


def remember_tokens() -> None:
    """Have every backbone of this process return the tokens of an image that one has seen before."""
    forward, kept = Backbone.forward, dict[tuple[Any, ...], Tensor]()

    def remembered(self: Any, images: Tensor, task_ids: Any, blocks: Any = (), uses: Any = None) -> Any:
        if images.is_meta:  # tried out, before it is built
            return forward(self, images, task_ids, blocks, uses)
        numbers = tuple(blocks) or (len(self.trunk.blocks) - 1,)
        names = [zlib.crc32(image.float().numpy().tobytes()) for image in images]
        new = [place for place, name in enumerate(names) if any((name, number) not in kept for number in numbers)]
        if new:
            features, _ = forward(self, images[new], task_ids, numbers, uses)
            for number in numbers:
                for place, tokens in zip(new, features.tokens[number][0], strict=True):
                    kept[names[place], number] = tokens.detach().bfloat16()
        tokens = {number: torch.stack([kept[name, number] for name in names])[None].float() for number in numbers}
        return Features(tokens, len(task_ids), self.grid(images), self.patch_size), []

    Backbone.forward = remembered  # type: ignore[method-assign]


def do(*words: object) -> None:
    """Run an m3vit command in this process, or stop."""
    if code := m3vit([str(word) for word in words]):
        raise SystemExit(code)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "rows": {}}
    remember_tokens()
    for row in args.rows:
        folder = folder_of(args.out, row)
        if not (folder / "eval.json").exists():
            given = [f"--data.root={args.data}", f"--model.weights={args.weights}", f"--train.epochs={args.epochs}"]
            do("train", "nyud-vits14", *ROWS[row], *FIXED, *given, "--out", folder, "--resume")
            do("eval", folder)
        found["rows"][row] = figures(folder)
    print("| | " + " | ".join(f"{task} {metric}" for task, metric in SHOWN) + " |\n|---|" + "---:|" * len(SHOWN))
    for row, scores in found["rows"].items():
        print(f"| {row} | " + " | ".join(f"{scores[task][metric]:.3f}" for task, metric in SHOWN) + " |")
    save(args.json, found)


if __name__ == "__main__":
    main()
