"""What only a GPU shows, for one of them: `pytest tests/cuda`; benchmarks/gpu.sh runs it beside the benchmarks.

M3VIT_TEST_DEVICE=cpu runs what can run without one: to see that the tests themselves work.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from m3vit.collectives import gather, total
from m3vit.models.config import ModelConfig
from m3vit.models.experts import ExpertBank, choose_execution, run_grouped, run_reference, run_sorted
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import Router
from m3vit.training.config import Config
from m3vit.training.losses import BatchCounts
from m3vit.training.step import step_losses
from tests.conftest import TINY, Cli
from tests.models.banks import ROUTINGS, E, assert_close, outputs_and_gradients, part_of
from tests.training.launching import Run, run

DEVICE = os.environ.get("M3VIT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA GPU")
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="of a CUDA GPU alone")
has_grouped = pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has F.grouped_mm from 2.10")


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Switch TF32 off: float32 is compared with float64 here."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def dirty_memory() -> None:
    """Leave memory full of NaN to be handed out again: what is not written to shows."""
    for size in (64, 1024, 4096, 65536, 1 << 20):
        blocks = [torch.full((size,), torch.nan, device=DEVICE) for _ in range(20)]
        del blocks


# --- experts ----------------------------------------------------------------------------------------------------------


@has_grouped
@pytest.mark.parametrize("name", ROUTINGS)
def test_grouped_equals_reference_in_bfloat16(name: str) -> None:
    expected = outputs_and_gradients(run_reference, name, torch.float64, 64, 48)
    dirty_memory()
    found = outputs_and_gradients(run_grouped, name, torch.bfloat16, 64, 48, DEVICE)
    # bfloat16 keeps 8 bits, eps 0.8 %: over operands, two products and a sum of K.
    assert_close(found, expected, 0.03)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_sorted_equals_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    expected = outputs_and_gradients(run_reference, name, torch.float64, 64, 48)
    dirty_memory()
    found = outputs_and_gradients(run_sorted, name, dtype, 64, 48, DEVICE)
    assert_close(found, expected, tolerance)  # float32: sums of 64 terms of eps 1e-7


@has_grouped
@pytest.mark.parametrize("name", ROUTINGS)
def test_a_part_of_a_bank_equals_the_reference_of_it(name: str) -> None:
    expected = outputs_and_gradients(part_of(run_reference, 16), name, torch.float64, 64, 48)
    dirty_memory()
    assert_close(outputs_and_gradients(part_of(run_grouped, 16), name, torch.bfloat16, 64, 48, DEVICE), expected, 0.05)
    found = outputs_and_gradients(part_of(run_sorted, 16), name, torch.float32, 64, 48, DEVICE)
    assert_close(found, expected, 1e-5)


@has_grouped
def test_grouped_repeats_bit_for_bit() -> None:
    once, again = (outputs_and_gradients(run_grouped, "random", torch.bfloat16, 64, 48, DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@on_gpu
@has_grouped
def test_grouped_is_chosen_for_bfloat16() -> None:
    x, bank = torch.zeros(2, 64, device=DEVICE), ExpertBank(E, 64, 48).to(DEVICE)
    fast = "grouped" if torch.cuda.get_device_capability()[0] in (9, 10) else "sorted"
    assert choose_execution("auto", bank, x) == "sorted"
    assert choose_execution("auto", bank, x.bfloat16()) == fast
    with torch.autocast("cuda", torch.bfloat16):
        assert choose_execution("auto", bank, x) == fast
    assert choose_execution("auto", ExpertBank(E, 64, 44).to(DEVICE), x.bfloat16()) == "sorted"  # 88 bytes


def layer_results(execution: str, x: Tensor) -> list[Tensor]:
    """Return output and gradients of a MoE layer for two tasks under bfloat16 autocast."""
    torch.manual_seed(0)
    router, bank = Router(64, 8, 2, 2, "multi", noise=1.0), ExpertBank(8, 64, 64)
    layer = MoELayer(router, bank, execution).to(DEVICE).train()
    torch.manual_seed(1)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, _ = layer(x, (0, 1))
    gradients = torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()])
    return [y, *gradients]


@pytest.mark.parametrize("execution", ["auto", "sorted", pytest.param("grouped", marks=has_grouped)])
def test_layer_under_autocast(execution: str) -> None:
    x = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    expected = [value.cpu().double() for value in layer_results("reference", x)]
    assert_close(layer_results(execution, x), expected, 0.03)


@on_gpu
@has_grouped
def test_grouped_never_waits_for_the_gpu() -> None:
    x = torch.randn(1, 2, 50, 64, device=DEVICE, requires_grad=True)
    layer = MoELayer(Router(64, 8, 2, 2, "multi"), ExpertBank(8, 64, 64), "grouped").to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = layer(x, (0, 1))
        y.float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_pcgrad_leaves_the_random_state_of_the_gpu() -> None:
    pytest.importorskip("torchjd")
    from m3vit.training.weighting import GradientMethod

    before = torch.cuda.get_rng_state()
    GradientMethod({"depth": 1.0, "edge": 1.0}, "pcgrad").combine(torch.eye(2, device=DEVICE), seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# --- process groups ---------------------------------------------------------------------------------------------------


def small_model() -> tuple[Config, MultiTaskModel, Tensor, dict[str, Tensor]]:
    """Return a model with pup heads, a batch and its labels, the same every time."""
    config = Config(
        ModelConfig(
            trunk="vit_tiny_patch16_224",
            trunk_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
            image_size=(32, 32),
            tasks=["semseg", "depth"],
            num_experts=4,
            top_k=2,
            head="pup",
        )
    )
    torch.manual_seed(0)
    images, depth = torch.randn(2, 3, 32, 32), torch.rand(2, 32, 32)
    labels = {"semseg": torch.randint(0, 40, (2, 32, 32)).to(DEVICE), "depth": depth.to(DEVICE)}
    return config, MultiTaskModel(config.model).to(DEVICE).train(), images.to(DEVICE), labels


def losses_and_gradients(convert: bool) -> dict[str, Tensor]:
    """Return the losses and gradients of a step, with synchronised batch normalisation or not."""
    config, model, images, labels = small_model()
    names = set(model.state_dict())
    if convert:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert set(model.state_dict()) == names
    loss, losses = step_losses(config, model, images, labels, counts=BatchCounts(labels))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach().cpu() for name, value in (losses | gradients).items()}


def alone_in_a_group(rendezvous: str) -> None:
    """Be the only process of a group: exchange what training exchanges, from where it lies."""
    torch.backends.cudnn.allow_tf32 = False
    alone = losses_and_gradients(convert=False)
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"  # m3vit.training.launch
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    for device in ("cpu", DEVICE):
        assert total(torch.tensor([3, 4], device=device)).tolist() == [3, 4]
    state = {"cuda": torch.cuda.get_rng_state() if DEVICE == "cuda" else None}
    assert gather(state)[0].keys() == state.keys()
    found = losses_and_gradients(convert=DEVICE == "cuda")  # gloo has no synchronised batch normalisation
    dist.destroy_process_group()
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)  # float32 sum order


def test_a_group_of_one_computes_the_same(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=alone_in_a_group, args=(str(tmp_path / "meet"),))
    process.start()
    process.join(120)
    assert process.exitcode == 0


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tiny_data: Path) -> list[object]:
    """The arguments of a training run on the device."""
    pytest.importorskip("jsonargparse")
    return ["train", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", f"--train.accelerator={DEVICE}"]


OPTIONS = ["--train.ema=0.9", "--train.checkpoint_activations=true", "--model.router_noise=1.0"]


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed"])
def trained(request: pytest.FixtureRequest, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped, resumed, and trained to its end."""
    folder = tmp_path_factory.mktemp("run")
    out = folder / "run"
    line = [*words, *OPTIONS, f"--train.precision={request.param}", "--train.epochs=40", "--out", out]
    line += ["--train.checkpoint_steps=1"]
    started = Run(line, folder)
    started.wait_for_lines(out / "metrics.jsonl", 3)
    started.signal(signal.SIGTERM)
    assert started.wait() == [143], started.text
    state = torch.load(out / "last" / "state.pt", weights_only=True)
    assert (state["random"][0]["cuda"] is not None) == (DEVICE == "cuda")
    run([*line, "--resume"], folder)
    return out


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "digest"} for line in found if line["kind"] == kind]


def test_a_stopped_run_goes_on(trained: Path) -> None:
    train = lines(trained, "train")
    assert [line["step"] for line in train] == list(range(1, 81))
    first, last = (sum(line["loss"] for line in part) for part in (train[:10], train[-10:]))
    assert last < 0.8 * first, "it did not learn"
    weights = load_file(trained / "model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


def test_evaluation_equals_that_of_the_cpu(trained: Path, cli: Cli) -> None:
    scores = []
    for device in (DEVICE, "cpu"):
        result = cli("eval", trained, "--device", device)
        assert result.returncode == 0, result.stderr
        scores.append(json.loads((trained / "eval.json").read_text())["protocols"]["A"]["tasks"])
    for task, metric, tolerance in (
        ("depth", "rmse", 1e-3),  # TF32 convolutions (cuDNN's default): 10 bits
        ("normals", "mErr", 1e-2),
        ("semseg", "mIoU", 1.0),  # a few pixels near a decision
        ("edge", "odsF", 1.0),
    ):
        found, expected = (score[task]["torch"][metric] for score in scores)
        assert found == pytest.approx(expected, rel=1e-3, abs=tolerance), task


def test_a_run_of_the_device_is_exported(trained: Path, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    result = cli("export", "onnx", trained, "--out", tmp_path / "onnx")
    assert result.returncode == 0, result.stderr


def torchrun(processes: int, line: list[object]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run([*command, "-m", "m3vit", *map(str, line)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def test_torchrun_with_one_process(words: list[object], tmp_path: Path) -> None:
    torchrun(1, [*words, "--train.epochs=1", "--out", tmp_path / "run"])
    assert len(lines(tmp_path / "run", "train")) == 2


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
@pytest.mark.parametrize("head", ["linear", "pup"])
def test_two_processes_train_what_one_does(words: list[object], head: str, tmp_path: Path) -> None:
    if head == "pup" and DEVICE != "cuda":
        pytest.skip("batch normalisation is not synchronised on the CPU")
    line = [*words, "--train.optimizer=sgd", "--train.lr=0.01", "--train.epochs=4", f"--model.head={head}"]
    line += ["--train.native_losses=[]"]
    run([*line, "--out", tmp_path / "one"], tmp_path)
    torchrun(2, [*line, "--out", tmp_path / "two"])
    close: Callable[[dict[str, Any]], Any] = lambda values: pytest.approx(values, rel=1e-3)  # noqa: E731
    for one, two in zip(lines(tmp_path / "one", "train"), lines(tmp_path / "two", "train"), strict=True):
        assert one.pop("kind") == two.pop("kind") and two == close(one)
