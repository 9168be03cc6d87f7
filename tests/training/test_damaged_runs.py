"""No changed byte of a run folder passes in silence, and none ends in a stack trace: each file that is read back."""

import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from m3vit.cli import main
from m3vit.digests import UncheckedWarning, seal, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation import scoring
from m3vit.models.initialise import new_model
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.saved import read_saved
from m3vit.run_folder import load_run, save_model
from m3vit.training.checkpoint import MetricsLog, load_state, read_metrics, save_state
from m3vit.training.config import read_run_config
from tests.conftest import TINY

FLIPS = 200

# Each file that is read back, and what reads it.
READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": read_run_config,
    "model.json": lambda run: read_saved(run / "model.safetensors")[1],
    "model.safetensors": lambda run: read_saved(run / "model.safetensors")[0],
    "best/config.yaml": lambda run: read_run_config(run / "best"),
    "best/model.json": lambda run: read_saved(run / "best" / "model.safetensors")[1],
    "best/model.safetensors": lambda run: read_saved(run / "best" / "model.safetensors")[0],
    "last/state.pt": load_state,
    "metrics.jsonl": read_metrics,
    "eval.json": lambda run: scoring.read(run, "A"),
    "eval-A.npz": lambda run: scoring.read_evaluation(run, "A"),
}


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, to be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def flat(value: Any) -> bytes:
    """Return what a reader gave as bytes, to compare."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return b"{" + b",".join(repr(key).encode() + b":" + flat(one) for key, one in value.items()) + b"}"
    if isinstance(value, list | tuple):
        return b"[" + b",".join(flat(one) for one in value) + b"]"
    return flat(vars(value)) if hasattr(value, "__dict__") else repr(value).encode()


def flipped(content: bytes) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(FLIPS):
        copy = bytearray(content)
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        yield bytes(copy)


def outcome(read: Callable[[Path], Any], run: Path, whole: bytes) -> str:
    """Return "refused", "said" (a warning) or "same"; fail for anything else."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = flat(read(run))
        except InputError as error:
            assert "\n" not in str(error)
            return "refused"
    if any(issubclass(one.category, UncheckedWarning) for one in said):
        return "said"
    assert found == whole
    return "same"


@pytest.mark.parametrize("name", READERS)
def test_no_flipped_bit_passes(run: Path, name: str) -> None:
    read, path = READERS[name], run / name
    content, whole = path.read_bytes(), flat(read(run))
    counts = {"refused": 0, "said": 0, "same": 0}
    for copy in flipped(content):
        path.write_bytes(copy)
        counts[outcome(read, run, whole)] += 1
    assert counts["said"] == 0 and counts["refused"] >= 0.98 * FLIPS, counts  # the same: white space of JSON, say


@pytest.mark.parametrize("name", READERS)
def test_no_shorter_or_longer_file_passes(run: Path, name: str) -> None:
    read, path, rng = READERS[name], run / name, random.Random(1)
    content, whole = path.read_bytes(), flat(read(run))
    cuts = [content[: rng.randrange(1, len(content))] for _ in range(20)]
    longer = [content + b"\0\n", content + rng.randbytes(200) + b"\n", rng.randbytes(9) + content, content * 2]
    allowed = {"refused"}
    if path.suffix in (".json", ".jsonl"):
        allowed.add("same")  # without its last line's end
    if path.suffix == ".yaml":
        allowed.add("said")  # cut before the digest: what deleting the digest looks like
    for copy in [b"", content[:1], content[:-1], *cuts, *longer]:
        if name == "metrics.jsonl" and content.startswith(copy):
            continue  # what a kill leaves behind, see below
        path.write_bytes(copy)
        assert outcome(read, run, whole) in allowed


def test_a_log_cut_anywhere_has_the_lines_before(run: Path) -> None:
    content, lines = (run / "metrics.jsonl").read_bytes(), read_metrics(run)
    for end in range(0, len(content), 7):
        (run / "metrics.jsonl").write_bytes(content[:end])
        whole = content[: end + 1].count(b"\n")  # with its last end or without
        assert read_metrics(run) == lines[:whole]


def resume(run: Path, data: Path) -> int:
    """Go on with a copy of the tiny run, in this process; return the exit code."""
    words = [f"--data.root={data}", "--train.epochs=2", f"--out={run}", "--resume"]
    return main(["train", "synthetic-tiny", *TINY, *words])


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def without_digests(run: Path) -> None:
    """Make a run folder what it was before digests."""
    for path in (run / "model.json", run / "best" / "model.json", run / "eval.json"):
        content = json.loads(path.read_text())
        content.pop("sha256"), content.pop("weights_sha256", None)
        for result in content.get("protocols", {}).values():
            result.pop("statistics_sha256")
        path.write_text(json.dumps(content))
    for name in ("config.yaml", "best/config.yaml", "last/state.pt", "eval-A.npz"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: content.rindex(b"\n# m3vit sha256")])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "digest"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_runs_without_digests_are_read_and_go_on_with_a_warning(run: Path, tiny_run: Path, tiny_data: Path) -> None:
    without_digests(run)
    for name, read in READERS.items():
        with pytest.warns(UncheckedWarning, match="carries no digest"):
            found = flat(read(run))
        if not name.endswith(".json"):  # which had digests of other files
            assert found == flat(read(tiny_run)), name
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.warns(UncheckedWarning, match=r"state\.pt carries no digest"):
        assert resume(run, tiny_data) == 0
    assert (run / "metrics.jsonl").read_bytes() == log and same_weights(run, tiny_run)


def test_an_edited_configuration_is_taken_once_its_digest_is_deleted(run: Path, capsys: Any) -> None:
    text = (run / "config.yaml").read_text()
    edited = text.replace("log_steps: 1\n", "log_steps: 2\n")
    (run / "config.yaml").write_text(edited)
    with pytest.raises(InputError, match=r"config\.yaml is not as it was written .* delete its last line"):
        load_run(run)
    assert main(["profile", str(run)]) == 2
    assert "delete its last line" in capsys.readouterr().err
    (run / "config.yaml").write_text("".join(edited.splitlines(keepends=True)[:-1]))
    with pytest.warns(UncheckedWarning, match=r"config\.yaml carries no digest"):
        assert load_run(run).config.train.log_steps == 2


def test_a_configuration_given_by_hand_needs_no_digest(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A run's config.yaml, edited, as --config."""
    text = (run / "config.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("  epochs: 2\n", "  epochs: 3\n"))
    words = ["init", "synthetic-tiny", "--config", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "new")]
    assert main(words) == 0
    assert load_run(tmp_path / "new").config.train.epochs == 3


def test_files_of_two_runs_are_not_one(run: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["tasks"] = values["model"]["tasks"][::-1]
    (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    seal(run / "config.yaml")
    with pytest.raises(InputError, match=r"config\.yaml and model\.json differ in model\.tasks"):
        load_run(run)


def test_a_run_that_does_not_say_how_long_it_was_trained_is_refused(run: Path) -> None:
    info = json.loads((run / "model.json").read_text())
    del info["epochs_trained"]
    write_sealed_json(run / "model.json", info)
    with pytest.raises(InputError, match=r"model\.json lacks epochs_trained"):
        load_run(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_when_opened(run: Path, capsys: Any, value: float) -> None:
    model = load_run(run).model
    with torch.no_grad():
        next(model.heads.parameters())[0] = value
    save_model(run, model, epoch=2)
    for words in (["eval"], ["export", "onnx", "--out", str(run / "x")], ["export", "hls", "--out", str(run / "x")]):
        assert main([*words, str(run)]) == 2
        assert "holds NaN or Inf in 1 of" in capsys.readouterr().err
    assert not (run / "x").exists()


@pytest.mark.parametrize(("folder", "saves"), [(".", 2), ("best", 3)])
def test_killed_between_weights_and_what_they_are(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, saves: int
) -> None:
    """Neither is mixed with the other: refused until the run was resumed, which ends in the same bits."""
    calls = []

    def killed(path: Path, value: Any) -> None:
        calls.append(path)
        if len(calls) == saves:
            raise KeyboardInterrupt
        write_sealed_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("m3vit.run_folder.write_sealed_json", killed)
        assert resume(tmp_path / "killed", tiny_data) == 130
    run = Path(shutil.copytree(tmp_path / "killed", tmp_path / "run"))
    with pytest.raises(InputError, match="a run killed while it saved is mended by m3vit train with --resume"):
        load_run(run / folder)
    assert resume(run, tiny_data) == 0
    for name in (".", "best"):
        load_run(run / name)
        assert same_weights(run / name, tiny_run / name)
    assert (run / "metrics.jsonl").read_text() == (tiny_run / "metrics.jsonl").read_text()


LINES = [
    (lambda text: text.replace(b",", b";", 9), 1),
    (lambda text: text.replace(b"\n", b"\n\n", 1), 2),
    (lambda text: text.replace(b"}\n{", b"}{", 1), 1),
    (lambda text: text.replace(b'{"kind": "train", "step": 2', b'{"kind": "train", "stex": 2'), 2),
    (lambda text: text.replace(b'"step": 3', b'"step": 2'), 3),
    (lambda text: text + b"\xff\n", 6),
    (lambda text: text + b"[1]\n", 6),
    (lambda text: text + b'{"kind": "train", "step": 9, "epoch": 1}\n', 6),
    (lambda text: text[:-1] + b"J", 5),
    (lambda text: text * 2, 6),
    (lambda text: text + text.splitlines(keepends=True)[-1], 6),
]


@pytest.mark.parametrize(("edit", "number"), LINES)
def test_a_log_with_a_damaged_line_is_refused_and_kept(
    run: Path, tiny_data: Path, capsys: Any, edit: Callable[[bytes], bytes], number: int
) -> None:
    log = run / "metrics.jsonl"
    assert log.read_bytes().count(b"\n") == 5
    damaged = edit(log.read_bytes())
    log.write_bytes(damaged)
    assert resume(run, tiny_data) == 2
    assert f"line {number} of {log} is " in capsys.readouterr().err
    assert log.read_bytes() == damaged


def test_lines_of_logs_without_digests_are_checked_too(run: Path) -> None:
    line = {"kind": "train", "step": 1, "epoch": 0.5}
    for wrong in ({"step": "1"}, {"step": None}, {"epoch": True}, {"kind": 3}, {"loss": "low"}):
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | wrong) + "\n")
        with warnings.catch_warnings(), pytest.raises(InputError, match=f"line 2 of .* has no {next(iter(wrong))}"):
            warnings.simplefilter("ignore")
            read_metrics(run)


def test_only_a_torn_line_and_steps_done_again_leave_the_log(run: Path) -> None:
    log = run / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:30])
    MetricsLog(run, step=4)
    assert log.read_bytes() == whole
    log.write_bytes(whole[:-1])  # all but the end of the line: nothing is lost
    MetricsLog(run, step=4).write({"kind": "train", "step": 5, "epoch": 2.5})
    assert log.read_bytes().startswith(whole) and len(read_metrics(run)) == 6
    MetricsLog(run, step=2)
    assert log.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_lines_that_the_checkpoint_knew_are_missed(run: Path, tiny_run: Path, tiny_data: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], *lines[2:4]]))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has 3 of the 4 lines that it had at the checkpoint"):
        assert resume(run, tiny_data) == 0
    assert same_weights(run, tiny_run)


def state_of(run: Path) -> dict[str, Any]:
    state = load_state(run)
    assert state is not None
    return state


def other_model(state: dict[str, Any]) -> None:
    name = next(iter(state["model"]))
    state["model"][name] = torch.zeros(3, 3)


def other_moments(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def diverged(state: dict[str, Any]) -> None:
    next(iter(state["model"].values())).view(-1)[0] = float("nan")


STATES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (dict.clear, "holds no checkpoint, it was emptied"),
    (lambda state: state.pop("optimizer"), "does not fit this run"),
    (lambda state: state.pop("random"), "does not fit this run"),
    (lambda state: state.update(step=10**6), "does not fit this run"),
    (lambda state: state.update(model=[]), "does not fit this run"),
    (lambda state: state.update(format=1), "is of another version"),
    (other_model, r"does not fit this run (Error(s) in loading state_dict for MultiTaskModel: size mismatch"),
    (other_moments, "does not fit this run (the optimiser's [7] for weights"),
    (diverged, "holds NaN or Inf in 1 of"),
]


@pytest.mark.parametrize(("change", "words"), STATES)
def test_a_checkpoint_of_something_else_is_refused(
    run: Path, tiny_data: Path, capsys: Any, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    state = state_of(run)
    change(state)
    save_state(run, state)
    before = (run / "metrics.jsonl").read_bytes()
    assert resume(run, tiny_data) == 2
    error = capsys.readouterr().err
    assert words in error and str(run / "last" / "state.pt") in error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_is_gone_is_not_started_over(run: Path, tiny_data: Path, capsys: Any) -> None:
    (run / "last" / "state.pt").write_bytes(b"")
    assert resume(run, tiny_data) == 2
    assert "state.pt cannot be loaded" in capsys.readouterr().err
    (run / "last" / "state.pt").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    assert resume(run, tiny_data) == 2
    assert "state.pt is missing, though training went on to step 4" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_started_over_before_the_first_checkpoint_is_said(run: Path, tiny_run: Path, tiny_data: Path) -> None:
    shutil.rmtree(run / "last"), shutil.rmtree(run / "best")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    with pytest.warns(UserWarning, match="was stopped before its first checkpoint: training starts over"):
        assert resume(run, tiny_data) == 0
    assert same_weights(run, tiny_run)
    assert (run / "metrics.jsonl").read_text() == "".join(lines)


def test_a_damaged_evaluation_is_refused_before_the_next_one(run: Path, capsys: Any) -> None:
    text = (run / "eval.json").read_text()
    (run / "eval.json").write_text(text.replace('"images": 3', '"images": 4'))
    assert main(["eval", str(run)]) == 2
    printed = capsys.readouterr()
    assert "eval.json is not as it was written" in printed.err and "│" not in printed.out
    assert (run / "eval.json").read_text() != text


def test_statistics_of_another_evaluation_are_refused(run: Path, tmp_path: Path) -> None:
    _, result = scoring.read(run, "A")
    evaluation = scoring.read_evaluation(run, "A")
    other = {task: values + 1 for task, values in evaluation.statistics.items()}
    scoring.write(tmp_path, "A", result, replace(evaluation, statistics=other))
    shutil.copy(tmp_path / "eval-A.npz", run)
    with pytest.raises(InputError, match=r"eval-A\.npz is not as it was written .* evaluate again with m3vit eval"):
        scoring.read_evaluation(run, "A")


def test_an_evaluation_killed_while_written_is_done_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New statistics beside the result of old ones would be a mixture."""
    _, result = scoring.read(run, "A")
    evaluation, calls = scoring.read_evaluation(run, "A"), []

    def killed(path: Path, value: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_sealed_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "write_sealed_json", killed)
        scoring.write(run, "A", result, evaluation)
    with pytest.raises(InputError, match=r"eval\.json has no evaluation .* evaluate it first"):
        scoring.read_evaluation(run, "A")
    scoring.write(run, "A", result, evaluation)
    assert flat(scoring.read_evaluation(run, "A")) == flat(evaluation)


@pytest.mark.parametrize(
    ("change", "words"), [(1.0, "model.safetensors is not as it was written"), (float("nan"), "holds NaN or Inf in")]
)
def test_weights_of_a_damaged_run_start_no_other(run: Path, change: float, words: str) -> None:
    """As model.weights: what is beside the file is checked with it."""
    model = MultiTaskModel(replace(load_run(run).model.config, moe_blocks="none"))
    save_model(run, model, epoch=2)
    config = replace(model.config, weights=str(run / "model.safetensors"))
    new_model(config)
    with torch.no_grad():
        model.backbone.trunk.pos_embed += change
    if math.isnan(change):
        save_model(run, model, epoch=2)
    else:
        save_file(model.state_dict(), run / "model.safetensors")
    with pytest.raises(InputError, match=words):
        new_model(config)
