"""How far are a pretrained ViT's tokens from the whole's with fewer hidden units, as they are and put in order?

    python benchmarks/unit_order.py --data DATA --weights FILE [--recipe nyud-vits14] [--json FILE]

The recipe's model begins as a training for budgets would (train.budgets), on photographs in the layout of the recipe.
Units are ordered by their importance on some training images; the distance is that of `train.budget_tokens`, on others,
of val: 0 is the same, 2 has nothing to do with it. Nothing is trained.
"""

import copy
from dataclasses import replace

import torch
from _bench import arguments, machine, save

from m3vit.data.loading import unlabelled
from m3vit.data.opening import open_split
from m3vit.models.budget import Budget
from m3vit.models.initialise import new_model
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.order import carry_out
from m3vit.training.budgets import Whole, token_distance
from m3vit.training.config import read_config, recipe_path
from m3vit.training.ordering import ORDER_IMAGES, importance, unit_moves

SHARES = (0.9, 0.75, 0.5, 0.25)


@torch.no_grad()
def distances(model: MultiTaskModel, images: torch.Tensor) -> dict[str, float]:
    """Return the distance at each share of all blocks' units."""
    task, hidden = model.config.tasks[:1], model.hidden_widths()
    whole = Whole.of(model(images, task, keep_tokens=True))
    found = {}
    for share in SHARES:
        budget = Budget(width={block: max(1, int(units * share)) for block, units in hidden.items()})
        found[str(share)] = float(token_distance(model(images, task, budget=budget, keep_tokens=True), whole).mean())
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="folder in the recipe's layout")
    parser.add_argument("--weights", required=True, help="of the trunk, as model.weights")
    parser.add_argument("--recipe", default="nyud-vits14")
    parser.add_argument("--images", type=int, default=8, help="val images that distances are of")
    args = parser.parse_args()
    found = machine()
    config = read_config(recipe_path(args.recipe))
    config.data.root = args.data
    label_set = config._layout().label_set_of(args.data)
    settings = replace(config.model, pretrained=False, weights=args.weights, label_set=label_set)
    torch.manual_seed(0)
    model = new_model(settings).eval()
    size = (settings.image_size[0], settings.image_size[1])
    train, val = (
        open_split(config.data.layout, args.data, part, settings.tasks, label_set=label_set)
        for part in ("train", "val")
    )
    seen = next(unlabelled(train, size, model.normalisation, ORDER_IMAGES, 0))
    others = next(unlabelled(val, size, model.normalisation, args.images, 0))
    ordered = copy.deepcopy(model)
    carry_out(unit_moves(ordered, importance(ordered, seen)))
    ways = {"as they are": distances(model, others), "in order": distances(ordered, others)}
    print("| units | " + " | ".join(f"{100 * share:g} %" for share in SHARES) + " |\n|---|" + "---:|" * len(SHARES))
    for way, values in ways.items():
        print(f"| {way} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    save(args.json, {"machine": found, "ways": ways})


if __name__ == "__main__":
    main()
