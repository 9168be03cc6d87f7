"""Checkpoints of M3ViT's released code: files in its layout, and its layers written out as its code computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model, not_taken
from m3vit.models.multitask import MultiTaskModel

D, H, E, K, CODE, HIDDEN = 16, 16, 6, 3, 5, 7
SIZE = (32, 48)  # 2 x 3 patches of 16
TASKS = {"semseg": 40, "normals": 3, "edge": 1, "depth": 1}  # in the order of its configurations


def released(kind: str, tasks: dict[str, int] = TASKS, blocks: int = 2) -> dict[str, Tensor]:
    """Return a state_dict as train_fastmoe.py saves it, of random values; kind: multi, single or one-hot gates."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 1 + 6, D),
        "patch_embed.proj.weight": (D, 3, 16, 16),
        "patch_embed.proj.bias": (D,),
    }
    for block in range(blocks):
        at = f"blocks.{block}"
        shapes |= {f"{at}.{norm}.{part}": (D,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {f"{at}.attn.qkv.weight": (3 * D, D), f"{at}.attn.qkv.bias": (3 * D,)}
        shapes |= {f"{at}.attn.proj.weight": (D, D), f"{at}.attn.proj.bias": (D,)}
        if block % 2:
            shapes |= {f"{at}.mlp.experts.htoh4.weight": (E, H, D), f"{at}.mlp.experts.htoh4.bias": (E, H)}
            shapes |= {f"{at}.mlp.experts.h4toh.weight": (E, D, H), f"{at}.mlp.experts.h4toh.bias": (E, D)}
            gates = {f"gate.{task}": D for task in range(len(tasks))} if kind == "multi" else {"gate": D}
            gates = {"gate": D + CODE} if kind == "one-hot" else gates
            shapes |= {f"{at}.mlp.{gate}.w_gate": (width, E) for gate, width in gates.items()}
        else:
            shapes |= {f"{at}.mlp.fc1.weight": (4 * D, D), f"{at}.mlp.fc1.bias": (4 * D,)}
            shapes |= {f"{at}.mlp.fc2.weight": (D, 4 * D), f"{at}.mlp.fc2.bias": (D,)}
    if kind == "one-hot":
        represent = {"fc1.weight": (HIDDEN, len(tasks)), "fc1.bias": (HIDDEN,), "fc2.weight": (CODE, HIDDEN)}
        represent |= {"fc2.bias": (CODE,), "norm.weight": (CODE,), "norm.bias": (CODE,)}
        shapes |= {f"gate_task_represent.{name}": shape for name, shape in represent.items()}
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()}
    for task, channels in tasks.items():
        at = f"decoders.{task}"
        shapes |= {f"{at}.norm.weight": (D,), f"{at}.norm.bias": (D,)}
        for stage, width in enumerate((D, 256, 256, 256)):
            shapes |= {f"{at}.conv_{stage}.weight": (256, width, 3, 3), f"{at}.conv_{stage}.bias": (256,)}
            shapes |= {f"{at}.syncbn_fc_{stage}.{part}": (256,) for part in ("weight", "bias", "running_mean")}
            shapes |= {f"{at}.syncbn_fc_{stage}.running_var": (256,), f"{at}.syncbn_fc_{stage}.num_batches_tracked": ()}
        shapes |= {f"{at}.conv_4.weight": (channels, 256, 1, 1), f"{at}.conv_4.bias": (channels,)}
    torch.manual_seed(4)
    values = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    for name in values:
        if name.endswith("running_var"):
            values[name] = values[name].abs() + 0.5
        if name.endswith("num_batches_tracked"):
            values[name] = torch.tensor(7)
    return values


def write(path: Path, state: dict[str, Tensor]) -> Path:
    """Write it with what is saved beside it, under the names that DistributedDataParallel gives."""
    state = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "backbone": "VisionTransformer_moe", "state_dict": state, "best_result": 0.1}, path)
    return path


def model_of(path: Path, kind: str, **changes: Any) -> MultiTaskModel:
    router = {"multi": "multi", "single": "single", "one-hot": "task_conditioned"}[kind]
    trunk = {"embed_dim": D, "depth": 2, "num_heads": 2}
    defaults: dict[str, Any] = {"trunk": "vit_tiny_patch16_224", "trunk_args": trunk, "image_size": SIZE}
    defaults |= {"tasks": ["depth", "semseg", "edge", "normals"], "num_experts": E, "top_k": K, "router": router}
    torch.manual_seed(0)
    return new_model(ModelConfig(**defaults | {"head": "pup", "init": f"m3vit:{path}"} | changes)).eval()


def layer(state: dict[str, Tensor], kind: str, place: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen experts [N, K], in order, and the output [N, D] of block 1's layer for a task, as published.

    Softmax over all experts, then the K best, whose scores weigh them as they are; a loop over tokens.
    """
    at, gate_input = "backbone.blocks.1.mlp", x_ND
    if kind == "one-hot":
        part = {
            name: state[f"backbone.gate_task_represent.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight")
        }
        code = F.gelu(part["fc1.weight"][:, place] + part["fc1.bias"])
        code = part["fc2.weight"] @ code + state["backbone.gate_task_represent.fc2.bias"]
        norm = (state[f"backbone.gate_task_represent.norm.{name}"] for name in ("weight", "bias"))
        gate_input = torch.cat([x_ND, F.layer_norm(code, (CODE,), *norm, 1e-6).expand(len(x_ND), -1)], dim=1)
    name = f"{at}.gate.{place}.w_gate" if kind == "multi" else f"{at}.gate.w_gate"
    scores, ids = (gate_input @ state[name]).softmax(dim=1).topk(K, dim=1)
    outputs = []
    for x, weights, experts in zip(x_ND, scores, ids, strict=True):
        y = torch.zeros(D)
        for weight, e in zip(weights, experts, strict=True):
            hidden = F.gelu(state[f"{at}.experts.htoh4.weight"][e] @ x + state[f"{at}.experts.htoh4.bias"][e])
            y += weight * (state[f"{at}.experts.h4toh.weight"][e] @ hidden + state[f"{at}.experts.h4toh.bias"][e])
        outputs.append(y)
    return ids, torch.stack(outputs)


@pytest.mark.parametrize("kind", ["multi", "single", "one-hot"])
def test_it_computes_what_it_did(kind: str, tmp_path: Path) -> None:
    state = released(kind)
    model = model_of(write(tmp_path / "checkpoint.pth.tar", state), kind)
    whole = "m3vit:checkpoint.pth.tar"
    assert model.origins == {"from": {"backbone": whole, "heads": whole}, "left_out": {}} and not_taken(model) == []
    x = torch.randn(40, D)
    for place, task in enumerate(TASKS):
        ids, expected = layer(state, kind, place, x)
        number = model.task_id(task)
        found, routing = model.backbone.trunk.blocks[1].mlp(x[None, None], (number,))
        assert torch.equal(routing.expert_ids_RNK[0], ids)
        torch.testing.assert_close(found[0, 0], expected, rtol=1e-5, atol=1e-6)
    own = model.state_dict()
    assert torch.equal(own["heads.depth.stages.2.1.running_var"], state["decoders.depth.syncbn_fc_2.running_var"])
    assert torch.equal(own["heads.semseg.output.weight"], state["decoders.semseg.conv_4.weight"])
    assert torch.equal(own["backbone.trunk.blocks.0.mlp.fc2.weight"], state["backbone.blocks.0.mlp.fc2.weight"])
    assert torch.equal(own["backbone.trunk.pos_embed"], state["backbone.pos_embed"])


def test_a_file_for_each_process(tmp_path: Path) -> None:
    """The first has the whole model with its own experts, the others have theirs; there may be more than ten."""
    state, folder = released("multi"), tmp_path / "best_model"
    folder.mkdir()
    for process in range(3):
        own = slice(2 * process, 2 * process + 2)
        shares = {name: value[own] if ".experts." in name else value for name, value in state.items()}
        write(folder / f"{process}.pth", {name: v for name, v in shares.items() if not process or ".experts." in name})
    found, expected = (model_of(path, "multi").state_dict() for path in (folder, write(tmp_path / "one.pth", state)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match=r"has 2 of the 6 experts .* give the folder with the files of all of them"):
        model_of(folder / "0.pth", "multi")


def test_other_models_take_what_fits(tmp_path: Path) -> None:
    state = released("multi", {"semseg": 21, "human_parts": 7, "sal": 1, "normals": 3, "edge": 1})
    state["backbone.blocks.1.mlp.gate.0.w_noise"] = torch.zeros(D, E)
    path = write(tmp_path / "pascal.pth", state)
    model = model_of(path, "multi", tasks=["saliency"], label_set="pascal", head="linear")
    gate = model.backbone.trunk.blocks[1].mlp.router.gates[0]
    assert torch.equal(gate.detach(), state["backbone.blocks.1.mlp.gate.2.w_gate"].T)
    lines = not_taken(model)
    assert "heads (pup heads, here linear)" in lines[0]
    assert "backbone.blocks.*.mlp.gate.*.w_noise (not in this model)" in lines[0]
    assert "router.gates.* (not a task of this model)" in lines[0]
    with pytest.raises(InputError, match=r"pascal.pth has 6 experts a block, and model.num_experts is 4: give 6"):
        model_of(path, "multi", num_experts=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"a": torch.zeros(2)}, "is not in the layout of M3ViT's code"),
        (
            lambda state: {k: v for k, v in state.items() if "h4toh.bias" not in k},
            "lacks b2 of the experts of block 1: it is not whole",
        ),
        (lambda state: {k: v for k, v in state.items() if "depth" not in k}, "has gates of 4 tasks, and the tasks are"),
        (lambda state: state | {"backbone.pos_embed": torch.zeros(1, 12, D)}, "has 11 positions, which are no grid"),
        (lambda state: state | {"backbone.cls_token": torch.full((1, 1, D), torch.nan)}, "holds NaN or Inf in 1 of"),
    ],
)
def test_what_is_no_such_checkpoint(change: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint.pth", change(released("multi")))
    with pytest.raises(InputError, match=f"model.init m3vit:.*{words}"):
        model_of(path, "multi")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"x": {1}}}, tmp_path / "set.pth")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("absent.pth", "does not exist"),
        ("empty", "holds no .pth file"),
        ("text.pth", "cannot be read as tensors alone"),
        ("list.pth", "holds no state_dict of tensors"),
        ("set.pth", "cannot be read as tensors alone|holds no state_dict"),
    ):
        with pytest.raises(InputError, match=words):
            model_of(tmp_path / name, "multi")
