"""What `m3vit eval` measured of a run or a package, which a report shows as it is instead of measuring it again."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m3vit.data.sample import Split
from m3vit.evaluation import scoring
from m3vit.evaluation.compare import weights_sha256
from m3vit.evaluation.evaluate import Evaluation, Predictor, Scores, fingerprint


class Stored:
    """Evaluations under a protocol of all images of a split, as they are now."""

    def __init__(self, split: Split, protocol: str) -> None:
        self.split, self.protocol = split, protocol
        self.fingerprints: list[int] = []  # of the split's images, once they are asked for

    def evaluation(self, folder: Path, predictor: Predictor) -> Evaluation | None:
        """Return a folder's evaluation, with its breakdown, or None if it is not of this predictor.

        That is one of the folder's present weights, the predictor's name and tasks, and this split's images. Raises
        InputError if its files are damaged.
        """
        if not (folder / "eval.json").exists() or self.protocol not in scoring.stored(folder):
            return None
        _, result = scoring.read(folder, self.protocol)
        told = folder / f"breakdown-{self.protocol}.json"
        if (
            result["predictor"] != predictor.name
            or result.get("weights_sha256") != weights_sha256(folder)
            or not told.is_file()
        ):
            return None
        found = scoring.read_evaluation(folder, self.protocol)
        if set(found.statistics) != set(predictor.tasks) or found.ids != list(self.split.ids):
            return None
        if found.fingerprints != self.images():
            return None
        return replace(found, told=json.loads(told.read_text())["tasks"])

    def images(self) -> list[int]:
        """Return the fingerprints of the split's images."""
        if not self.fingerprints:
            self.fingerprints = [fingerprint(self.split.read(place, "image")) for place in range(len(self.split))]
        return self.fingerprints

    def trivial(self, folder: Path, tasks: Sequence[str]) -> Scores | None:
        """Return what the trivial predictor scored beside a folder's evaluation, None if it was not asked."""
        _, result = scoring.read(folder, self.protocol)
        found = {task: result["tasks"].get(task, {}).get("trivial") for task in tasks}
        return None if None in found.values() else found
