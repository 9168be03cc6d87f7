"""Up-cycling: at step 0 the model is the dense ViT; then its copies part."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.export.onnx.graph import export_task
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.run_folder import load_run
from m3vit.training.config import Config
from m3vit.training.routing_losses import routing_losses, sums_for
from m3vit.training.starting import initialise

SIZE = (32, 48)
ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}  # the MLP is 4 * 32 wide
TRUNKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {"mlp_ratio": 2},
    "deit3_small_patch16_224": {"init_values": 0.3},  # LayerScale
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.3},  # registers too
    "vit_small_patch16_dinov3": {"init_values": 0.3},  # rotary positions, Eva's blocks
    "vit_base_patch16_clip_224": {"proj_bias": False},  # norm before the blocks, Linears without bias
}
# (E, K, expert_ratio): parts of the MLP, one or two copies of it a token; whole MLPs. Its width is 4 or 2 times D.
GRANULAR = {"E 16, K 4, quarters": (16, 4, 1.0), "E 24, K 8, quarters": (24, 8, 1.0), "E 6, K 2, halves": (6, 2, 2.0)}
WHOLE = {"E 3, K 1, whole": (3, 1, 4.0), "E 5, K 3, whole": (5, 3, 4.0)}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make(trunk: str = "vit_tiny_patch16_224", weights: str = "", **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "trunk": trunk,
        "trunk_args": ARGS | TRUNKS[trunk] | changes.pop("args", {}),
        "image_size": SIZE,
        "tasks": ["depth", "edge", "normals"],
        "weights": weights,
        "init": "upcycle",
    }
    return new_model(ModelConfig(**defaults | changes))


@torch.no_grad()
def make_dense(tmp_path: Path, trunk: str, **changes: Any) -> MultiTaskModel:
    """A dense model all whose parameters matter, its trunk's weights in a file."""
    model = make(trunk, moe_blocks="none", **changes)
    for name, parameter in model.named_parameters():
        if "token" in name or "pos_embed" in name:
            parameter.normal_()
        elif name.startswith("backbone.trunk.blocks"):  # timm's are 0.02 and biases zero: too little to notice
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_file(model.backbone.trunk.state_dict(), tmp_path / "dense.safetensors")
    return model.eval()


def errors(model: MultiTaskModel, dense: MultiTaskModel) -> list[float]:
    """Return, for each task, the largest difference of the tokens over the largest token. Heads are not compared."""
    images = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        expected, tokens = dense.backbone(images, (0,))[0].last[0], model.backbone(images, (0, 1, 2))[0].last
        return [float((y - expected).abs().max() / expected.abs().max()) for y in tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_first_output_is_the_dense_one(trunk: str, dtype: torch.dtype, tmp_path: Path) -> None:
    mlp_ratio = TRUNKS[trunk].get("mlp_ratio", 4)
    with default_dtype(dtype):
        dense = make_dense(tmp_path, trunk)
        for num_experts, top_k, ratio in (GRANULAR | WHOLE).values():
            if ratio > mlp_ratio:
                continue
            model = make(
                trunk,
                str(tmp_path / "dense.safetensors"),
                num_experts=num_experts,
                top_k=top_k,
                expert_ratio=ratio,
                upcycle_gates=1e-12 if dtype == torch.float64 else 1e-6,
            ).eval()
            # float32: the order of sums, and scores rounded to 6e-8, through four blocks. float64: to 1e-10, where
            # gates of 1e-12 still change the scores by a part in 1e12.
            assert max(errors(model, dense)) < (1e-10 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("router", ["multi", "task_conditioned", "single"])
def test_every_router_and_all_blocks(router: str, tmp_path: Path) -> None:
    dense = make_dense(tmp_path, "vit_tiny_patch16_224")
    model = make(weights=str(tmp_path / "dense.safetensors"), router=router, moe_blocks=[0, 1, 2, 3]).eval()
    assert max(errors(model, dense)) < 5e-6  # as above
    # The tasks of `multi` route differently from the start, and tokens go to every copy.
    _, routings = model.backbone(torch.randn(8, 3, *SIZE), (0, 1))
    for routing in routings:
        assert len(routing.expert_ids_RNK.unique()) == 16
        same = torch.equal(routing.expert_ids_RNK[0].sort().values, routing.expert_ids_RNK[1].sort().values)
        assert same == (router == "single") or router == "task_conditioned"


@pytest.mark.parametrize("autocast", [False, True])
def test_each_token_gets_every_part_of_the_mlp_once(autocast: bool) -> None:
    model = make(num_experts=24, top_k=8, expert_ratio=1.0).eval()  # parts: expert id modulo 4; two copies a token
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, routings = model.backbone(torch.randn(2, 3, *SIZE), (0, 1, 2))
    for routing in routings:
        ids = routing.expert_ids_RNK
        assert (count(ids % 4, 4) == 2).all() and (count(ids // 4, 6) % 4 == 0).all()


def count(ids_RNK: Tensor, kinds: int) -> Tensor:
    return nn.functional.one_hot(ids_RNK, kinds).sum(dim=2)


def test_hand_worked() -> None:
    # D 1, MLP of 2 units, experts of 1: G 2. E 4, K 2: C 2 copies, m 1. Scores are 1/4, so W2 is times E / m = 4.
    mlp = Mlp(1, 2)
    with torch.no_grad():
        for parameter, value in zip(mlp.parameters(), ([[1.0], [2.0]], [0.1, 0.2], [[3.0, 5.0]], [7.0]), strict=True):
            parameter.copy_(torch.tensor(value))
    from m3vit.models.experts import ExpertBank
    from m3vit.models.router import Router
    from m3vit.models.upcycling import upcycle

    layer = MoELayer(Router(1, 4, 2, 1, "multi"), ExpertBank(4, 1, 1), "reference")
    upcycle(layer, mlp, 1e-6, "here")
    bank = layer.experts
    assert bank.w1.flatten().tolist() == [1, 2, 1, 2]
    torch.testing.assert_close(bank.b1.flatten(), torch.tensor([0.1, 0.2, 0.1, 0.2]))
    assert bank.w2.flatten().tolist() == [12, 20, 12, 20]
    assert bank.b2.flatten().tolist() == [14, 14, 14, 14]  # two experts of weight 1/4 add 14 each: 7
    gate = layer.router.gates[0].flatten()
    assert gate[0] == gate[1] != gate[2] == gate[3]
    x = torch.linspace(-2, 2, 9).view(1, 1, 9, 1)
    torch.testing.assert_close(layer(x, (0,))[0][0], mlp(x[0]), rtol=1e-5, atol=1e-5)  # gates are not quite zero


def test_without_weights_it_upcycles_timms_own_initialisation() -> None:
    assert max(errors(make().eval(), make(moe_blocks="none").eval())) < 5e-6


@pytest.mark.parametrize("changes", [{}, {"num_experts": 3, "top_k": 1, "expert_ratio": 4.0}], ids=["parts", "whole"])
def test_copies_part_in_training(changes: dict[str, Any], tmp_path: Path) -> None:
    make_dense(tmp_path, "vit_tiny_patch16_224")
    model = make(weights=str(tmp_path / "dense.safetensors"), **changes).train()
    bank = model.backbone.trunk.blocks[1].mlp.experts
    parts = 4 * 32 // bank.w1.shape[1]

    def copies() -> Tensor:
        return bank.w1.detach().unflatten(0, (-1, parts))  # [copies, parts, H, D]

    assert (copies() == copies()[:1]).all()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(4, 3, *SIZE)
    losses = []
    for _ in range(3):
        logits = model(images).logits.values()
        loss = torch.stack([(value - 1).square().mean() for value in logits]).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    distance = (copies()[:, None] - copies()[None]).abs().amax(dim=(2, 3, 4))
    assert (distance + torch.eye(len(distance)) > 1e-4).all(), "each copy differs from each other one"


@pytest.mark.parametrize("router", ["multi", "task_conditioned", "single"])
def test_balance_loss_has_a_gradient_at_the_first_step(router: str) -> None:
    model = make(router=router).train()
    sums = sums_for(model(torch.randn(2, 3, *SIZE)).routings, ["balance"])
    routing_losses(sums, ["balance"])["balance"].backward()
    for block in model.backbone.moe_indices:
        for gate in model.backbone.trunk.blocks[block].mlp.router.gates:
            assert gate.grad is not None and gate.grad.abs().max() > 1e-4


def test_the_price_of_larger_gates(tmp_path: Path) -> None:
    dense = make_dense(tmp_path, "vit_tiny_patch16_224")
    file = str(tmp_path / "dense.safetensors")
    small, large = (max(errors(make(weights=file, upcycle_gates=gates).eval(), dense)) for gates in (1e-3, 1e-1))
    assert 1e-5 < small < 5e-3 < large  # in proportion to the gates
    # K = E: every copy is chosen, and the scores add up to 1 whatever the gates.
    every = make(weights=file, num_experts=8, top_k=8, upcycle_gates=1.0).eval()
    assert max(errors(every, dense)) < 5e-6


@pytest.mark.slow
def test_exported_graph_computes_the_dense_output(tmp_path: Path) -> None:
    # In the graph TopK sees scores, all equal for gates this small, and takes the first experts: a whole copy.
    dense = make_dense(tmp_path, "vit_tiny_patch16_224")
    model = make(weights=str(tmp_path / "dense.safetensors"), upcycle_gates=1e-12)
    model.heads.load_state_dict(dense.heads.state_dict())
    graph = export_task(model, "depth", size=SIZE).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        expected = dense(images, ["depth"]).logits["depth"].numpy()
    (actual,) = session.run(["depth"], {"image": images.numpy()})
    assert abs(actual - expected).max() < 5e-6 * abs(expected).max()


@pytest.mark.parametrize(
    ("trunk", "changes", "message"),
    [
        ("vit_tiny_patch16_224", {"expert_ratio": 1.5}, r"128 wide and an expert 48.*2.66667 experts"),
        ("vit_tiny_patch16_224", {"expert_ratio": 8.0}, r"0.5 experts make up"),
        ("vit_tiny_patch16_224", {"top_k": 2}, r"4 experts .* model.top_k \(2\)"),
        ("vit_tiny_patch16_224", {"num_experts": 18}, r"4 experts .* model.num_experts \(18\)"),
        ("vit_tiny_patch16_224", {"router_noise": 1.0}, r"router_noise 1.0 .*\(model.expert_ratio 4\)"),
        ("vit_tiny_patch16_224", {"args": {"act_layer": "gelu_tanh"}}, "block 1 of .* Mlp with GELUTanh"),
        ("vit_tiny_patch16_224", {"args": {"scale_mlp_norm": True}}, "Mlp with GELU and LayerNorm"),
        ("vit_small_patch16_dinov3", {"args": {"swiglu_mlp": True}}, "a GluMlp with SiLU"),
        ("vit_tiny_patch16_224", {"init": "copy"}, "model.init is 'copy': choose from random, upcycle"),
        ("vit_tiny_patch16_224", {"upcycle_gates": 0.0}, "model.upcycle_gates is 0.0"),
    ],
)
def test_refusals(trunk: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(trunk, **changes)
    if changes.get("router_noise"):
        make(trunk, **changes, num_experts=3, top_k=1, expert_ratio=4.0)


def test_run_folder_needs_the_dense_weights_no_more(tmp_path: Path) -> None:
    dense = make_dense(tmp_path, "vit_tiny_patch16_224")
    config = Config(model=copy.deepcopy(make(weights=str(tmp_path / "dense.safetensors")).config))
    initialise(config, tmp_path / "run")
    (tmp_path / "dense.safetensors").unlink()
    run = load_run(tmp_path / "run")
    assert run.info["architecture"]["weights"] == "dense.safetensors"  # no path: it goes into exported packages
    assert max(errors(run.model, dense)) < 5e-6


@pytest.mark.slow
def test_compiled_model_computes_the_same() -> None:
    # aot_eager: what dynamo and autograd make of the model, without the minute that C++ takes.
    images = torch.randn(2, 3, *SIZE)
    for execution, whole in (("reference", True), ("sorted", False)):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = make(experts=execution, moe_blocks=[1], args={"depth": 2}, num_experts=4, tasks=["depth", "edge"])
        results = []
        for function in (model, torch.compile(model, backend="aot_eager", fullgraph=whole)):
            model.zero_grad()
            output = function(images)
            torch.stack([value.square().mean() for value in output.logits.values()]).sum().backward()
            results.append([*output.logits.values(), *(parameter.grad for parameter in model.parameters())])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)  # float32 sum order
        breaks = torch._dynamo.utils.counters["graph_break"]  # reason: how often
        assert bool(breaks) != whole
        assert whole or any("run_sorted" in reason for reason in breaks)
    torch.compiler.reset()
