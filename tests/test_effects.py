"""An option that cannot act is refused: of every command, and every key of the configuration."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.cli import main
from m3vit.errors import InputError
from m3vit.training.config import Config, recipe_names, recipe_path
from m3vit.training.effects import OF_EXPERTS, check_given, given_keys, without_effect


def refused(capsys: pytest.CaptureFixture[str], words: list[Any], message: str) -> None:
    """Check that a command refuses its words on one line with exit code 2 (in this process: torch is loaded once)."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error, error


# --- keys of the configuration ----------------------------------------------------------------------------------------


def make(**keys: Any) -> Config:
    config = Config()
    for key, value in keys.items():
        section, _, name = key.partition("_")
        assert name in {field.name for field in fields(getattr(config, section))}
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("config", "word", "reason"),
    [
        ({"model_head": "pup"}, "--model.head_stride=8", "pup heads have a stride of their own"),
        ({}, "--model.upcycle_gates=0.1", "model.init is random, not upcycle"),
        ({"model_merge_coefficients": [1.0]}, "--model.merge_coefficients=[1]", "model.init is random, not merge:"),
        (
            {"model_init": "merge:[a, b]", "model_weights": "a.pth"},
            "--model.weights=a.pth",
            "which all weights come from",
        ),
        ({}, "--train.momentum=0.5", "train.optimizer is adamw, not sgd"),
        ({"model_tasks": ["depth"]}, "--train.edge_positive_weight=0.9", "edge is not among model.tasks"),
        ({"model_tasks": ["depth"], "train_weighting": "dwa"}, "--train.weighting=dwa", "model.tasks has one"),
        ({"model_tasks": ["depth"], "train_weighting": "mgda"}, "--train.weighting=mgda", "model.tasks has one"),
        ({"train_best": "depth"}, "--train.best=depth", "only the last epoch is evaluated"),
        ({"train_epochs": 5, "train_eval_epochs": 5}, "--train.best=mean", "only the last epoch is evaluated"),
        (
            {"model_tasks": ["depth"], "train_task_weights": {"semseg": 2.0, "depth": 1.0}},
            "--train.task_weights.semseg=2",
            "semseg is not among model.tasks",
        ),
        (
            {"model_tasks": ["depth"], "train_task_weights": {"semseg": 2.0}},
            "--train.task_weights={semseg: 2}",
            "semseg is not among model.tasks",
        ),
        (
            {"model_tasks": ["depth"], "train_native_losses": ["edge"]},
            "--train.native_losses=[edge]",
            "edge is not among model.tasks",
        ),
        *(
            (
                {"model_moe_blocks": none, "model_router_noise": 1.0, "model_experts_per_task": {"depth": [1]}},
                word,
                "no block",
            )
            for none in ("none", [])
            for word in ("--model.num_experts=8", "--model.router_noise 1", "--model.experts_per_task.depth=[1]")
        ),
        ({"model_moe_blocks": "none"}, "--train.balance_weight=0.1", "no block with experts"),
    ],
)
def test_keys_without_effect_are_refused(config: dict[str, Any], word: str, reason: str) -> None:
    words = ["synthetic-tiny", "--out", "run", *word.split(" ", 1)] if "{" not in word else [word]
    with pytest.raises(InputError, match=r"^--(model|train)\.\w+.* would have no effect") as error:
        check_given(make(**config), words)
    assert reason in str(error.value)


def test_what_acts_or_is_switched_off_may_be_given() -> None:
    check_given(make(train_optimizer="sgd"), ["--train.momentum=0.5", "--model.head_stride=8"])
    check_given(make(model_moe_blocks="none", train_balance_weight=0.0), ["--train.balance_weight=0"])
    check_given(make(train_optimizer="adamw"), ["--train.optimizer", "adamw", "--config", "train.momentum.yaml"])
    check_given(make(train_task_weights={"depth": 2.0}), ["--train.task_weights.depth=2"])
    check_given(make(train_epochs=5, train_eval_epochs=2), ["--train.best=depth"])


def test_a_recipes_values_survive_what_makes_them_idle() -> None:
    for name in recipe_names():
        assert recipe_path(name).is_file()
    check_given(make(model_head="pup", train_optimizer="adamw"), ["nyud-small", "--train.optimizer=adamw"])


def test_keys_that_are_named_exist() -> None:
    config = make(model_head="pup", model_moe_blocks="none", model_tasks=["depth"], train_weighting="dwa")
    for key in (*OF_EXPERTS, *without_effect(config)):
        section, name, *_ = key.split(".")
        assert hasattr(getattr(config, section), name), key


def test_given_keys() -> None:
    words = [
        "synthetic-tiny",
        "--out",
        "train.lr",
        "--train.lr",
        "1",
        "--model.tasks+=edge",
        "--data.root=--train.x",
        "-h",
    ]
    assert given_keys(words) == ["train.lr", "model.tasks", "data.root"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "synthetic-tiny", "--out", "run", "--train.momentum", "0.5"],
            "--train.momentum would have no effect",
        ),
        (
            ["init", "synthetic-tiny", "--out", "run", "--model.upcycle_gates=0.5"],
            "--model.upcycle_gates would have no",
        ),
        (["profile", "synthetic-tiny", "--train.epochs=3"], "--train.epochs changes nothing that is counted"),
        (["profile", "synthetic-tiny", "--model.weights=w.pth"], "--model.weights changes nothing that is counted"),
        (["data", "check", "nowhere", "--quick", "--workers", "2"], "--quick opens no file"),
    ],
)
def test_commands_that_take_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, words, message)
    assert not list(tmp_path.iterdir())


# --- commands on a run, a package, a project --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hls", "--board", "zcu104"], "--board zcu104: the spatial schedule is for no board"),
        (["hls", "--weight-bits", "4"], "weight_bits is 4: the spatial schedule has 6 to 24"),
        (["hls", "--act-bits", "4"], "act_bits is 4: the spatial schedule has 8 to 24"),
        (["hls", "--schedule", "multiplexed", "--weight-bits", "4"], "the multiplexed schedule has 8, 12, 16"),
        (["hls", "--schedule", "multiplexed", "--act-bits", "20"], "the multiplexed schedule has 8, 10, 12, 14, 16"),
        (["onnx", "--calibrate", "3"], "--calibrate is of --prune, --keep and --sweep"),
        (["onnx", "--calibrate", "3", "--precision", "int8"], "--calibrate is of --prune, --keep and --sweep"),
        (["onnx", "--sweep", "--check-images", "3"], "leave out --tasks"),
        (["onnx", "--sweep", "--precision", "fp32"], "leave out --tasks"),
        (["onnx", "--tasks", "depth", "--top-k", "edge=1"], "--top-k names edge, not among the tasks exported (depth)"),
        (["onnx", "--top-k", "depth=1,depth=2"], "which says twice how many depth gets"),
        (["onnx", "--top-k", "depth=1,2"], "which says twice"),
        (["onnx", "--keep", "1"], "--keep is 1, but each token of semseg goes to 2 experts"),
        (["onnx", "--keep", "2", "--top-k", "depth=3"], "--keep is 2, but each token of depth goes to 3 experts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exports(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    refused(capsys, ["export", words[0], tiny_run, "--out", tmp_path / "out", *words[1:]], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "depth", "--fps", "5"], "--fps is of videos and streams, and the inputs are images alone"),
        (["--task", "edge", "--depth-range", "1:5"], "--depth-range is of depth, and edge has none"),
    ],
)
def test_predictions(
    capsys: pytest.CaptureFixture[str], onnx_package: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "a.png")
    refused(capsys, ["predict", onnx_package, tmp_path / "a.png", "--out", tmp_path / "out", *words], message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_evaluations(capsys: pytest.CaptureFixture[str], onnx_package: Path, tiny_run: Path, tiny_data: Path) -> None:
    for words in (["--device", "cpu"], ["--batch", "2"], ["--batch", "1"]):
        refused(capsys, ["eval", onnx_package, "--data.root", tiny_data, *words], "--device and --batch are of a run")
        refused(capsys, ["eval", tiny_run, tiny_run, "--compare", *words], "leave out --data.root, --workers")


def test_workers_without_edges(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    from tests.conftest import TINY

    words = [
        "init",
        "synthetic-tiny",
        *TINY,
        "--model.tasks=[depth]",
        f"--data.root={tiny_data}",
        "--out",
        tmp_path / "run",
    ]
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    refused(capsys, ["eval", tmp_path / "run", "--workers", 2], "--workers are processes that match edges")


# --- multiply-accumulates of a package --------------------------------------------------------------------------------


@pytest.mark.slow
def test_macs_are_those_of_the_graph(tiny_run: Path, tmp_path: Path) -> None:
    from m3vit.export.onnx.package import Content, export_package
    from m3vit.models.budget import Budget
    from m3vit.profiling import graph_macs, profile
    from m3vit.run_folder import load_run

    model = load_run(tiny_run).model
    tokens, width, hidden = 4 * 6, 32, 32
    expert = tokens * (2 * width * hidden + width)
    three, one = {"depth": {1: (1, 2, 3)}}, {"depth": {1: 1}}

    def macs(size: tuple[int, int] = (32, 48), every_expert: bool = False, **budget: Any) -> int:
        return graph_macs(model.config, "depth", size, Budget(**budget), every_expert=every_expert)

    trained = macs()  # 2 of 4 experts, in one block
    assert trained == profile(model.config)["tasks"]["depth"]["macs"]["total"]
    assert trained - macs(top_k=one) == expert
    assert macs(kept=three) == trained  # fewer to choose from, as many used
    assert macs(every_expert=True) - trained == 2 * expert
    assert macs(every_expert=True, kept=three, top_k=one) - trained == expert
    # Twice the side: four times the tokens, of which attention alone takes the square.
    scores = 2 * 2 * width  # of two blocks, a pair of tokens
    assert macs((64, 96)) == 4 * (trained - scores * tokens**2) + scores * (4 * tokens) ** 2
    content = Content(("depth",), static=True, size=(64, 96), budget=Budget(one, three))
    manifest = export_package(model, tmp_path / "package", content, info={})
    assert manifest["macs"] == manifest["tasks"]["depth"]["macs"] == macs((64, 96), True, kept=three)
