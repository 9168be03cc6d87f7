"""Sharded training (FSDP): the same training, with a share of the model in each process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from m3vit.errors import InputError
from m3vit.models.multitask import MultiTaskModel
from m3vit.training import sharding
from m3vit.training.config import Config, read_config
from m3vit.training.sharding import gathered, load_weights, shard, unsharded
from tests.conftest import PUP, TASKEXPERT, TINY
from tests.training.launching import Run, environments, run, run_each
from tests.training.runs import assert_close, lines, same_bits

pytestmark = pytest.mark.process

SHARDED = "--train.strategy=fsdp"


def recipe(data: Path, *more: str) -> list[str]:
    return ["train", "synthetic-tiny", *TINY, f"--data.root={data}", "--train.epochs=4", *more]


# Three processes: some weights have fewer rows than that, and a process then has none of them.
@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_processes_train_what_one_does(make_data: Callable[..., Path], tmp_path: Path, processes: int) -> None:
    data = make_data(tmp_path / "data", train=12, val=5)
    words = recipe(data, "--train.batch_size=6", "--train.optimizer=sgd", "--train.lr=0.01", "--train.ema=0.5")
    words += ["--train.eval_epochs=2", "--train.tasks_per_step=3", "--train.grad_clip=0.5", "--train.z_weight=0.01"]
    words += ["--train.weighting=uncertainty", "--train.checkpoint_activations=true"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    run([*words, SHARDED, "--out", tmp_path / "more"], tmp_path, processes)
    assert_close(tmp_path / "one", tmp_path / "more", weights_atol=1e-6)


def test_parts_of_a_batch_and_pup_heads(uneven_data: Path, tmp_path: Path) -> None:
    words = recipe(uneven_data, "--train.accumulate=2", "--train.optimizer=sgd", "--train.lr=0.001")
    words += [*PUP, "--model.distillation=[0]", "--model.tasks=[depth,normals]", "--train.epochs=1"]
    # On the CPU each process normalises over its own images, with either strategy the same ones.
    run([*words, "--out", tmp_path / "ddp"], tmp_path, 2)
    run([*words, SHARDED, "--out", tmp_path / "fsdp"], tmp_path, 2)
    assert_close(tmp_path / "ddp", tmp_path / "fsdp", weights_atol=1e-6)


def test_a_decoder_of_several_blocks_where_labels_are_missing(make_data: Callable[..., Path], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=6, val=2)
    for number in (0, 1, 3, 5):  # some process has none of a step's labels
        (data / "depth" / f"{number:04}.npy").unlink()
    words = recipe(data, *TASKEXPERT, "--train.optimizer=sgd", "--train.lr=0.01", "--train.tasks_per_step=3")
    words += ["--train.batch_size=2", "--data.on_error=skip", "--train.checkpoint_activations=true"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    for name, more in (("ddp", []), ("fsdp", [SHARDED])):
        run([*words, *more, "--out", tmp_path / name], tmp_path, 2)
        assert_close(tmp_path / "one", tmp_path / name, weights_atol=1e-6)


@pytest.mark.parametrize("head", [[], TASKEXPERT], ids=["conv", "taskexpert"])
def test_mixed_precision(uneven_data: Path, tmp_path: Path, head: list[str]) -> None:
    words = recipe(uneven_data, *head, "--train.precision=bf16-mixed", "--train.optimizer=sgd", "--train.lr=0.001")
    run([*words, "--out", tmp_path / "ddp"], tmp_path, 2)
    run([*words, SHARDED, "--out", tmp_path / "fsdp"], tmp_path, 2)
    assert_close(tmp_path / "ddp", tmp_path / "fsdp", weights_atol=1e-5)


def test_killed_and_resumed_to_the_same_bits(uneven_data: Path, tmp_path: Path) -> None:
    words = recipe(uneven_data, SHARDED, *TASKEXPERT, "--train.checkpoint_steps=1", "--train.ema=0.9")
    words += ["--train.eval_epochs=2"]
    run([*words, "--out", tmp_path / "unbroken"], tmp_path, 2)
    out = tmp_path / "broken"
    for wanted in (3, 8):
        started = Run([*words, "--out", out, *(["--resume"] if out.exists() else [])], tmp_path, 2)
        started.wait_for_lines(out / "metrics.jsonl", wanted)
        started.kill()
    run([*words, "--out", out, "--resume"], tmp_path, 2)
    same_bits(tmp_path / "unbroken", out)


def test_a_run_goes_on_sharded_or_not(uneven_data: Path, tmp_path: Path) -> None:
    words = recipe(uneven_data, "--train.ema=0.5", "--train.checkpoint_steps=1", "--train.lr=1e-4")
    run([*words, "--out", tmp_path / "whole"], tmp_path)
    out, text = tmp_path / "changing", ""
    for processes, more in ((1, []), (2, [SHARDED, "--resume"]), (1, ["--resume"])):
        last = more == ["--resume"]
        started = Run([*words, *more, "--out", out], tmp_path, processes)
        if not last:
            started.wait_for_lines(out / "metrics.jsonl", 3 * processes)
            started.kill()
        else:
            assert started.wait() == [0], started.text
        text += started.text
    assert "Traceback" not in text
    # AdamW turns the rounding of tiny gradients into whole steps of 1e-4: some of the eight may go another way.
    expected, found = load_file(tmp_path / "whole" / "model.safetensors"), load_file(out / "model.safetensors")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=4e-4)
        assert (found[name] - expected[name]).abs().mean() < 2e-5, name
    steps = [line["step"] for line in lines(out) if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def check_shares(run_folder: Path, variables: dict[str, str]) -> None:
    """Be one of two processes: each keeps its half, and runs the model without the other where weights are whole."""
    os.environ.update(variables)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = read_config(run_folder / "config.yaml")
    plain, model = MultiTaskModel(config.model), MultiTaskModel(config.model)
    weights = load_file(run_folder / "model.safetensors")
    plain.load_state_dict(weights)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(model, mesh)
    load_weights(model, weights)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    mine: Any = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    everything = sum(parameter.numel() for parameter in plain.parameters())
    assert abs(mine - everything / 2) < 0.01 * everything

    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = plain.eval()(images).logits
        found = model.eval()(images).logits  # together
        with unsharded(model):
            if dist.get_rank():  # alone
                alone = model(images, ["depth"]).logits
                torch.testing.assert_close(alone["depth"], expected["depth"], rtol=0, atol=0)
    for task, logits in expected.items():
        torch.testing.assert_close(found[task], logits, rtol=0, atol=0)
    kept = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    assert kept == mine, "the other half was dropped"
    state = {"weights": model.state_dict(), "numbers": [1, model.state_dict()]}
    for bucket in (sharding.BUCKET_BYTES, 10_000, 1):  # all at once, some, one by one
        sharding.BUCKET_BYTES = bucket
        back = gathered(state)
        assert back["numbers"][0] == 1
        for name, value in weights.items():
            for one in (back["weights"][name], back["numbers"][1][name]):
                assert one is None if dist.get_rank() else torch.equal(one, value)
    for shape, dim in (((5, 3, 2), 0), ((2, 7, 3), 1), ((1, 4), 0)):  # uneven shares, and an empty one
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        tensor = distribute_tensor(whole, mesh["data_parallel"], [Shard(dim)], src_data_rank=None)
        (found,) = gathered([tensor])
        assert found is None if dist.get_rank() else torch.equal(found, whole)
    dist.destroy_process_group()


def test_each_process_keeps_its_share(tiny_run: Path) -> None:
    run_each(check_shares, [tiny_run] * 2, environments(2))


@pytest.mark.parametrize(("key", "value"), [("weighting", "pcgrad"), ("precision", "16-mixed")])
def test_what_needs_whole_gradients_is_refused(key: str, value: str) -> None:
    config = Config()
    config.train.strategy = "fsdp"
    config.check()
    setattr(config.train, key, value)
    with pytest.raises(InputError, match=f"fsdp does not go with .*{value}"):
        config.check()
