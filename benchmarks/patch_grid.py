"""How much of the grid of patches predictions show: steps across the borders of patches, over those within patches.

    python benchmarks/patch_grid.py RUN [RUN ...] [--images 20] [--data.root DIR] [--json FILE]

For each run and task, the mean |difference| of neighbouring logits, at the head's own resolution, where the two are of
different patches, over the same where they are of one: 1 where patches leave no trace, and 3 where a border is three
times as steep as what is beside it. Images: the first of val.
"""

from pathlib import Path

import torch
from _bench import arguments, save
from torch import Tensor

from m3vit.data.network_input import network_input
from m3vit.data.opening import open_split
from m3vit.run_folder import load_run


def steepness(logits: Tensor, columns: int) -> float:
    """Return the measure of logits [B, C, H, W] of `columns` patches side by side."""
    side = logits.shape[-1] // columns
    across = torch.arange(1, logits.shape[-1]) % side == 0
    down = torch.arange(1, logits.shape[-2]) % side == 0
    steps = (logits.diff(dim=-1).abs().mean((0, 1, 2)), logits.diff(dim=-2).abs().mean((0, 1, 3)))
    border = steps[0][across].mean() + steps[1][down].mean()
    return float(border / (steps[0][~across].mean() + steps[1][~down].mean()))


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--data.root", dest="root", help="default: the data that a run was trained on")
    args = parser.parse_args()
    figures = {}
    for folder in args.runs:
        run = load_run(folder)
        model, config = run.model.eval(), run.config
        tasks, size = config.model.tasks, config.model.image_size
        root = args.root or config.data.root
        split = open_split(config.data.layout, root, "val", tasks, label_set=config.model.label_set)
        pixels = [split.load(index).image for index in range(min(args.images, len(split)))]
        images = torch.stack([network_input(image, (size[0], size[1]), model.normalisation) for image in pixels])
        columns = size[1] // model.backbone.patch_size
        found = {task: steepness(value, columns) for task, value in model(images, native=tasks).logits.items()}
        print(f"{folder}, {config.model.head}: " + ", ".join(f"{task} {value:.2f}" for task, value in found.items()))
        figures[str(folder)] = found
    save(args.json, figures)


if __name__ == "__main__":
    main()
