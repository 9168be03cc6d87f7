"""The command line as a user meets it: help at once, one clear line and exit code 2 for a mistake."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m3vit.cli import COMMANDS, _one_line_each
from m3vit.digests import UncheckedWarning
from tests.conftest import TINY

Cli = Callable[..., subprocess.CompletedProcess]


def refused(result: subprocess.CompletedProcess, *patterns: str) -> None:
    """The command failed as for a user's mistake: exit code 2, and its last line says what is wrong."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, result.stderr
    for pattern in patterns:
        assert re.search(pattern, errors[0]), errors[0]


def test_the_start_loads_little() -> None:
    """Every command pays for what the command line imports: multiprocessing and hashlib together doubled it."""
    words = "import sys, m3vit.cli; print(*{'torch', 'numpy', 'multiprocessing', 'hashlib', 'random'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout == "\n"


@pytest.mark.process
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete_and_needs_no_torch(command: str) -> None:
    program = "import sys; sys.modules['torch'] = None; from m3vit.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, *command.split(), "--help"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    if command:
        assert COMMANDS[command][0].split(".")[0].split()[0] in result.stdout
    else:
        assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name, (_, add_arguments, _) in COMMANDS.items() if add_arguments])
def test_help_tells_every_default_and_what_each_value_is(command: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments = COMMANDS[command][1]
    assert add_arguments is not None
    add_arguments(parser)
    for action in parser._actions:
        name, words = "/".join(action.option_strings) or action.dest, action.help or ""
        assert len(words.split()) > 1 or "." in words, name
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "(default: " in words, name
        assert action.default in (None, argparse.SUPPRESS), "add_options tells the defaults: they are the dataclass's"


def test_training_help_explains_every_key(cli: Cli) -> None:
    text = " ".join(cli("train", "synthetic-tiny", "--help").stdout.split())
    for key, words in (
        ("--train.lr", "peak learning rate"),
        ("--model.top_k", "experts per token"),
        ("--data.root", "gt_sets"),
    ):
        assert key in text and words in text
    assert "default: 0.003" in text, "the recipe's values are shown"


def test_unknown_things(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    root, out = f"--data.root={tiny_data}", tmp_path / "run"
    refused(cli("fly"), "unknown command 'fly'", "data synth")
    refused(cli("export"), "m3vit export onnx or m3vit export hls")
    refused(cli("train", "synthetic-huge", "--out", out), "unknown recipe 'synthetic-huge'", "synthetic-tiny")
    refused(cli("train", "--out", out), "give a recipe first", "synthetic-tiny")
    refused(cli("train", "synthetic-tiny", root), "required: --out")
    refused(cli("train", "synthetic-tiny", root, "--train.epocs=1", "--out", out), "train.epocs")
    refused(cli("train", "synthetic-tiny", root, "--train.epochs=many", "--out", out), "train.epochs", "many")
    refused(cli("train", "synthetic-tiny", root, "--train.epoch=1", "--out", out), "train.epoch")
    refused(cli("train", "synthetic-tiny", root, "--train.lr=.inf", "--out", out), "train.lr is inf")
    refused(
        cli("train", "synthetic-tiny", root, "--train.precision=half", "--out", out), "train.precision", "bf16-mixed"
    )
    refused(cli("train", "synthetic-tiny", root, "--train.seed=-1", "--out", out), "train.seed is -1")
    refused(
        cli(*"train synthetic-tiny --train.precision=16-mixed --train.accelerator=cpu --out".split(), out, root),
        "16-mixed needs a GPU",
    )
    refused(cli("train", "synthetic-tiny", root, "--model.tasks=[flow]", "--out", out), "unknown task flow", "semseg")
    refused(cli("train", "synthetic-tiny"), "required: --out")
    config = tmp_path / "c.yaml"
    config.write_text("train: {epocs: 3}\n")
    refused(cli("train", "synthetic-tiny", root, "--config", config, "--out", out), "epocs")
    assert not out.exists(), "a refused command leaves nothing behind"


def test_a_warning_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, opened by two steps of a command at two places of the code, or by the processes of a torchrun."""
    for _ in range(2):
        formatted = _one_line_each()
        assert formatted(UserWarning("a  file\nchanged"), UserWarning, "x.py", 1) == "m3vit: warning: a file changed\n"
        assert formatted("a file changed", UserWarning, "y.py", 2, None) == ""
        assert formatted(UserWarning("another"), UserWarning, "x.py", 1) == "m3vit: warning: another\n"
    for rank, text in (("0", "m3vit: warning: no digest\n"), ("1", "")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert _one_line_each()(UncheckedWarning("no digest"), UncheckedWarning, "x.py", 1) == text


def test_one_process_of_a_torchrun_speaks_for_all(process: Cli, tmp_path: Path) -> None:
    for rank, lines in ((0, 1), (1, 0)):
        words = {"WORLD_SIZE": "2", "RANK": str(rank)}
        found = process("train", "synthetic-tiny", "--train.lr=-1", "--out", tmp_path / "run", env=os.environ | words)
        assert found.returncode == 2
        assert len(found.stderr.splitlines()) == lines


def test_missing_or_damaged_data(cli: Cli, make_data: Callable[..., Path], tmp_path: Path) -> None:
    words = ["train", "synthetic-tiny", *TINY, "--train.epochs=1", "--out"]
    refused(cli(*words, tmp_path / "a"), "no data root", "--data.root")
    refused(cli(*words, tmp_path / "a", "--data.root", tmp_path / "none"), "data root .*none not found")
    root = make_data(tmp_path / "data", train=4, val=1)
    (root / "depth" / "0001.npy").unlink()
    refused(cli(*words, tmp_path / "b", "--data.root", root), r"depth/0001\.npy not found")
    (root / "depth" / "0001.npy").write_bytes(b"broken")
    refused(cli(*words, tmp_path / "b", "--data.root", root, "--resume"), r"depth/0001\.npy cannot be read")


def test_run_folders_that_are_not_whole(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    refused(cli("eval", tmp_path), "not a run folder")
    broken = tmp_path / "run"
    shutil.copytree(tiny_run, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(cli("eval", broken), "model.safetensors cannot be loaded")
    weights.unlink()
    for words in (
        ("eval", broken),
        ("export", "onnx", broken, "--out", tmp_path / "o"),
        ("export", "hls", broken, "--out", tmp_path / "h"),
    ):
        refused(cli(*words), "no weights", "train it first")


def test_init_writes_a_run_folder_that_evaluates(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("init", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--out", run).returncode == 0
    assert json.loads((run / "model.json").read_text())["epochs_trained"] == 0
    assert cli("eval", run).returncode == 0


def test_trained_run_folder_holds_what_design_says(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    assert {
        "config.yaml",
        "model.safetensors",
        "model.json",
        "last",
        "metrics.jsonl",
        "eval.json",
        "tensorboard",
    } <= names
    info = json.loads((tiny_run / "model.json").read_text())
    assert info["tasks"] == ["semseg", "depth", "normals", "edge"]
    assert info["architecture"]["num_experts"] == 4
    assert len(info["classes"]["semseg"]) == 40
    scores = json.loads((tiny_run / "eval.json").read_text())
    assert list(scores["protocols"]) == ["A"]
    result = scores["protocols"]["A"]
    assert result["protocol"].startswith("A (Vandenhende") and result["release"] == "NYUD_MT"
    assert result["tasks"]["depth"].keys() == {"trivial", "torch"}
    with np.load(tiny_run / "eval-A.npz") as statistics:
        assert len(statistics["ids"]) == len(statistics["edge"]) == result["images"] == 3
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    events = EventAccumulator(str(tiny_run / "tensorboard")).Reload()
    for name in ("train/loss", "train/lr", "train/gradient_norm", "val/depth/rmse", "speed/images_per_s"):
        assert all(event.value > 0 for event in events.Scalars(name)), name
    assert [event.step for event in events.Scalars("train/gradient_norm")] == [1, 2, 3, 4]


def test_config_file_and_dotted_keys_override_the_recipe_in_that_order(
    cli: Cli, tiny_data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("train: {lr: 0.5, epochs: 7}\n")
    # Whichever comes first on the command line, and however the file is given.
    for number, given in enumerate((["--config", config], [f"--config={config}"])):
        words = ["init", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=9", *given]
        assert cli(*words, "--out", tmp_path / f"run{number}").returncode == 0
        text = (tmp_path / f"run{number}" / "config.yaml").read_text()
        assert "lr: 0.5" in text and "epochs: 9" in text and "optimizer: adamw" in text


def test_the_demo_is_made_of_commands_on_what_it_trains() -> None:
    from m3vit.demo import commands

    lines = commands(Path("out"), 0)
    assert all(" ".join(line[:2]) in COMMANDS or line[0] in COMMANDS for line in lines)
    (trained,) = [line[line.index("--out") + 1] for line in lines if line[0] == "train"]
    assert all(trained in line for line in lines if line[0] in ("eval", "export", "report"))
    made = {line[line.index("--out") + 1] for line in lines if "--out" in line}
    assert all(line[2] in made for line in lines if line[:2] == ["hw", "csim"])
