"""Every recipe: a model can be built from it, and its header says where it is from."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from m3vit.commands.training import config_from
from m3vit.data.opening import LAYOUTS
from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model
from m3vit.models.multitask import MultiTaskModel
from m3vit.training.config import Config, DataConfig, TrainConfig, read_config, recipe_names, recipe_path
from m3vit.training.parts import frozen_epochs

OWN = (  # of no publication
    *("synthetic-tiny", "synthetic-pascal-tiny", "synthetic-taskexpert-tiny", "nyud-vits14", "nyud-taskexpert-vits14"),
)
PUBLISHED = [name for name in recipe_names() if name not in OWN]


def read(name: str) -> Config:
    values = yaml.safe_load(recipe_path(name).read_text())
    return Config(ModelConfig(**values["model"]), DataConfig(**values["data"]), TrainConfig(**values["train"]))


@pytest.mark.parametrize("name", recipe_names())
def test_model_can_be_built(name: str) -> None:
    config = read(name)
    config.check()
    assert config.data.layout in LAYOUTS
    with torch.device("meta"):
        model = MultiTaskModel(config.model)
    assert list(model.heads.tasks) == config.model.tasks
    wanted = {"none": 0, "odd": len(model.backbone.trunk.blocks) // 2}
    assert len(model.backbone.moe_indices) == wanted.get(str(config.model.moe_blocks), len(config.model.moe_blocks))
    assert 0 in frozen_epochs(config.train, model).values()


@pytest.mark.parametrize("router", ["single", "task_conditioned"])
@pytest.mark.parametrize("name", [name for name in PUBLISHED if read(name).model.moe_blocks != "none"])
def test_rows_of_the_router_ablation_can_be_built(name: str, router: str) -> None:
    with torch.device("meta"):
        MultiTaskModel(replace(read(name).model, router=router))


@pytest.mark.parametrize("name", PUBLISHED)
def test_single_task_baselines_can_be_built(name: str) -> None:
    config = read(name)
    for task in config.model.tasks:
        config.model = replace(config.model, tasks=[task], distillation=[])
        config.check()
        with torch.device("meta"):
            assert MultiTaskModel(config.model).heads.tasks == (task,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_cites_its_source(name: str) -> None:
    lines = recipe_path(name).read_text().splitlines()
    header = " ".join(line[2:] for line in lines if line.startswith("# "))
    for words in ("Not yet measured on the real data set.", "Sources:", "Evaluate with m3vit eval RUN --protocol"):
        assert words in header
    assert all(len(line) <= 120 for line in lines)


def test_missing_pretrained_weights_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        # What timm 1.0 and huggingface_hub raise without a network (after 50 s of retries).
        raise LocalEntryNotFoundError("cannot find the requested files in the local cache. Please check")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(InputError, match=r"weights of deit_small.*local cache\).*--model\.pretrained=false") as error:
        new_model(read("nyud-small").model)
    assert "\n" not in str(error.value)


def laughs(levels: int) -> str:
    """YAML of a few hundred bytes that stands for 10 ** levels words."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(rows)


def test_configurations_are_small_regular_files(tmp_path: Path) -> None:
    files: dict[str, tuple[str, str]] = {
        "laughs": (laughs(9), "unfolds to more than 100000 values by its aliases"),
        "itself": ("a: &a [*a, *a]", "unfolds to more than"),
        "large": ("# " + "x" * (1 << 20), "it has more than 1048576 bytes"),
    }
    for name, (text, words) in files.items():
        path = tmp_path / name / "config.yaml"
        path.parent.mkdir()
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_config(path)
        with pytest.raises(InputError, match=words):
            config_from("init", ["synthetic-tiny", f"--config={path}", "--out", str(tmp_path / "run")])
    os.mkfifo(tmp_path / "pipe.yaml")
    for option in (["--config", str(tmp_path / "pipe.yaml")], [f"--config={tmp_path / 'pipe.yaml'}"]):
        with pytest.raises(InputError, match="it is a pipe, not a regular file"):
            config_from("init", ["synthetic-tiny", *option, "--out", str(tmp_path / "run")])
    (tmp_path / "good.yaml").write_text("train: {epochs: &n 7, warmup_epochs: *n}\n")
    config, _ = config_from("init", ["synthetic-tiny", f"--config={tmp_path / 'good.yaml'}", "--out", str(tmp_path)])
    assert config.train.epochs == 7
