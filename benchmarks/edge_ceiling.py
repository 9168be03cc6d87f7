"""What odsF the stored edge labels themselves reach: the ceiling of a model that learns them perfectly.

    python benchmarks/edge_ceiling.py ROOT [ROOT ...]

Each ROOT is a data set (m3vit data synth writes one); its val split is scored with its own labels as the prediction.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from m3vit.data.opening import open_split, recognise
from m3vit.evaluation.evaluate import Predictor, evaluate
from m3vit.evaluation.protocols import NetworkImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", metavar="ROOT")
    for root in parser.parse_args().roots:
        layout, release = recognise(root)
        split = open_split(layout, root, "val", ("edge",))
        index_of = {name: index for index, name in enumerate(split.ids)}
        size = split.read(0, "image").shape[:2]

        def labels(images: list[NetworkImage], split=split, index_of=index_of) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
            maps = [np.where(split.read(index_of[image.id], "edge") == 1, 20.0, -20.0) for image in images]
            return {"edge": torch.stack([torch.from_numpy(one).float()[None] for one in maps])}

        found = evaluate(split, Predictor("labels", ("edge",), layout, size, labels)).scores()["edge"]
        figures = ", ".join(f"{name} {value:.1f}" for name, value in found.items() if name.startswith("odsF"))
        print(f"{root}: {release}, {len(split)} images: {figures}")


if __name__ == "__main__":
    main()
