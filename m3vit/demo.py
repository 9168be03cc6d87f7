"""`m3vit demo`: the public commands in a row, on rendered scenes."""

import shlex
from pathlib import Path

from m3vit.cli import run
from m3vit.commands.terminal import say
from m3vit.tasks import LABEL_SETS


def commands(out: Path, seed: int) -> list[list[str]]:
    """Return the commands of the demo, each as the words after `m3vit`."""
    data, trained, onnx, hls = (str(out / name) for name in ("data", "run", "onnx", "hls"))
    tasks = LABEL_SETS["nyud"].tasks
    images = [str(out / "data" / "images" / f"{index:04d}.jpg") for index in range(401, 405)]  # the first of val
    return [
        ["data", "synth", "--out", data, "--layout", "nyud", "--train", "400", "--val", "100", "--seed", str(seed)],
        # --resume: a demo that was interrupted goes on where it stopped.
        ["train", "synthetic-tiny", "--data.root", data, "--train.seed", str(seed), "--out", trained, "--resume"],
        ["eval", trained],
        ["export", "onnx", trained, "--out", onnx],
        # --force: of an earlier demo.
        *(["predict", onnx, "--task", task, *images, "--out", str(out / "predictions"), "--force"] for task in tasks),
        ["export", "hls", trained, "--out", hls],
        ["hw", "csim", hls],
        ["report", trained, "--onnx", onnx, "--hls", hls, "--out", str(out / "report.html")],
    ]


def demo(out: Path, seed: int) -> None:
    """Run every command of the demo; the last prints the table and the path of the report."""
    for words in commands(out, seed):
        say(f"\n$ m3vit {shlex.join(words)}")
        run(words)
