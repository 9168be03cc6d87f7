"""`m3vit demo`: the public commands in a row, on rendered scenes."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from m3vit.commands.terminal import say


def commands(out: Path, seed: int) -> list[list[str]]:
    """Return the commands of the demo, each as the words after `m3vit`."""
    names = ("data", "run", "onnx", "hls", "hls-multiplexed")
    data, trained, onnx, hls, multiplexed = (str(out / name) for name in names)
    images = [str(out / "data" / "images" / f"{index:04d}.jpg") for index in range(401, 405)]  # the first of val
    return [
        ["data", "synth", "--out", data, "--layout", "nyud", "--train", "400", "--val", "100", "--seed", str(seed)],
        # --resume: a demo that was interrupted goes on where it stopped.
        ["train", "synthetic-tiny", "--data.root", data, "--train.seed", str(seed), "--out", trained, "--resume"],
        ["eval", trained],
        ["routing", trained],
        ["export", "onnx", trained, "--out", onnx, "--precision", "fp32", "int8"],
        # --force: those of an earlier demo.
        ["predict", onnx, "--task", "all", *images, "--overlay", "--out", str(out / "predictions"), "--force"],
        ["export", "hls", trained, "--out", hls],
        ["hw", "csim", hls],
        ["export", "hls", trained, "--schedule", "multiplexed", "--out", multiplexed],
        ["hw", "csim", multiplexed, "--samples", "20"],
        ["report", trained, "--onnx", onnx, "--hls", hls, "--out", str(out / "report.html")],
    ]


def demo(out: Path, seed: int, run: Callable[[Sequence[str]], int]) -> None:
    """Run every command of the demo with `run` (m3vit.cli's); the last prints the table and the path of the report."""
    for words in commands(out, seed):
        say(f"\n$ m3vit {shlex.join(words)}")
        run(words)
