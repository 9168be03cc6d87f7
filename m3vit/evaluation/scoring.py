"""`m3vit eval`: score a run folder and write its eval.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3vit.data.loading import open_split
from m3vit.evaluation.evaluate import TrivialPredictor, evaluate, torch_predictor
from m3vit.evaluation.meters import PROTOCOL
from m3vit.files import write_json
from m3vit.training.checkpoint import Run


def score_run(
    run: Run, data_root: str | None, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Score the model and the trivial predictor on the val split; write and return eval.json's content."""
    data, tasks = run.config.data, run.config.model.tasks
    root = data_root or data.root
    train, val = (open_split(data.layout, root, split, tasks) for split in ("train", "val"))

    def stage(text: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(done, total, text)) if progress else None

    trivial = TrivialPredictor.fit(train, stage("reading training labels"))
    scores = {
        "trivial": evaluate(val, trivial, tasks, progress=stage("trivial predictor")),
        "torch": evaluate(val, torch_predictor(run.model), tasks, progress=stage("model")),
    }
    report = {
        "protocol": PROTOCOL,
        "split": "val",
        "images": len(val),
        "data": str(Path(root).resolve()),
        "trivial": trivial.constants,
        "tasks": {task: {name: values[task] for name, values in scores.items()} for task in tasks},
    }
    write_json(run.folder / "eval.json", report)
    return report
