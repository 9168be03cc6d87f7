"""What `m3vit eval` measured of a run or a package, which a report shows as it is instead of measuring it again."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m3vit.data.sample import Split
from m3vit.digests import changed
from m3vit.evaluation import scoring
from m3vit.evaluation.compare import weights_sha256
from m3vit.evaluation.evaluate import Evaluation, Predictor, Scores, fingerprint, label_print
from m3vit.files import sha256_file


class Stored:
    """Evaluations under a protocol of all images of a split, with the labels that they have now."""

    def __init__(self, split: Split, protocol: str) -> None:
        self.split, self.protocol = split, protocol
        self.prints: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}  # by tasks, once they are asked for

    def evaluation(self, folder: Path, predictor: Predictor, precision: str | None = None) -> Evaluation | None:
        """Return a folder's evaluation, with its breakdown, or None if it is not of this predictor.

        That is one of the folder's present weights, the predictor's name, its tasks and precision (of a package), and
        of this split's images and labels. Raises InputError if its files are damaged.
        """
        if not (folder / "eval.json").exists() or self.protocol not in scoring.stored(folder):
            return None
        _, result = scoring.read(folder, self.protocol)
        told, noted = folder / f"breakdown-{self.protocol}.json", result.get("breakdown_sha256")
        if (
            (result["predictor"], result.get("precision")) != (predictor.name, precision)
            or result["label_set"] != self.split.label_set
            or result.get("weights_sha256") != weights_sha256(folder)
            or noted is None  # of a version before
            or not told.is_file()
        ):
            return None
        if sha256_file(told) != noted:
            raise changed(told, f"evaluate again with m3vit eval {folder} --protocol {self.protocol}")
        found = scoring.read_evaluation(folder, self.protocol)
        if set(found.statistics) != set(predictor.tasks) or found.ids != list(self.split.ids):
            return None
        if (found.fingerprints, found.label_prints) != self.images(predictor.tasks):
            return None
        return replace(found, told=json.loads(told.read_text())["tasks"])

    def images(self, tasks: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the fingerprints of the split's images, and of their labels of some tasks."""
        key = tuple(sorted(tasks))
        if key not in self.prints:
            images, labels = [], []
            for place in range(len(self.split)):
                sample = self.split.load(place)
                images.append(fingerprint(sample.image))
                labels.append(label_print(sample, key))
            self.prints[key] = images, labels
        return self.prints[key]

    def trivial(self, folder: Path, tasks: Sequence[str]) -> Scores | None:
        """Return what the trivial predictor scored beside a folder's evaluation, None if it was not asked."""
        _, result = scoring.read(folder, self.protocol)
        found = {task: result["tasks"].get(task, {}).get("trivial") for task in tasks}
        return None if None in found.values() else found
