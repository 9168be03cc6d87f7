"""What training starts from on two processes: the same tensors in both, those of one process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3vit.api import configure
from m3vit.training.config import Config
from m3vit.training.launch import launch
from m3vit.training.loop import Training
from m3vit.training.starting import initialise
from tests.training.launching import environments, run_each

pytestmark = pytest.mark.process
ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def begin(config: Config, out: Path, saved: Path, variables: dict[str, str]) -> None:
    """Be one of the processes up to the first step, and write the weights that it would begin with, put together."""
    os.environ.update(variables)
    training = Training(launch(config.train), config, out, False, None)
    state: dict[str, Any] = dict(training.model.state_dict())
    whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in whole.items()}, saved)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("start", "strategy"), [("run", "fsdp"), ("merge", "fsdp"), ("entropy", "fsdp"), ("entropy", "ddp")]
)
def test_two_processes_start_as_one(start: str, strategy: str, make_data: Callable[..., Path], tmp_path: Path) -> None:
    """fsdp keeps a share of each process's own weights; ddp would make up for a difference."""
    data = make_data(tmp_path / "data", train=8)
    keys = {"data.root": str(data), "model.trunk_args": ARGS, "model.image_size": [32, 48], "model.num_experts": 4}
    keys |= {"train.batch_size": 4, "train.threads": 1, "train.strategy": strategy, "model.tasks": ["semseg", "edge"]}
    keys |= {"train.accelerator": "cpu"}
    dense = {"model.moe_blocks": "none", "train.seed": 1}
    if start == "run":
        initialise(configure("synthetic-tiny", keys | {"train.seed": 1}), tmp_path / "from")
        more: dict[str, Any] = {"model.init": f"run:{tmp_path / 'from'}"}
        more |= {"model.num_experts": 7}  # 3 copied, with noise
    else:
        for seed, task in enumerate(("semseg", "edge")):
            own = dense | {"model.tasks": [task], "train.seed": seed}
            initialise(configure("synthetic-tiny", keys | own), tmp_path / task)
        more = {"model.init": f"merge:[{tmp_path / 'semseg'}, {tmp_path / 'edge'}]"}
    if start == "entropy":
        initialise(configure("synthetic-tiny", keys | dense), tmp_path / "base")
        more |= {"model.weights": str(tmp_path / "base" / "model.safetensors"), "model.merge_coefficients": "entropy"}
        more |= {"model.merge_steps": 5, "model.merge_images": 2}
    config = configure("synthetic-tiny", keys | more)
    initialise(config, tmp_path / "alone")
    saved = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    run_each(begin, [config] * 2, [tmp_path / "run"] * 2, saved, environments(2))
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    for path in saved:
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), path.name
