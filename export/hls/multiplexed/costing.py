"""`m3vit hw cost`: what a model would cost in the multiplexed schedule, from its sizes; or what a project costs."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from m3vit.errors import InputError
from m3vit.export.hls.contents import open_project
from m3vit.export.hls.edits import check_engines
from m3vit.export.hls.leaf import token_heads
from m3vit.export.hls.schedules import choose_options
from m3vit.hw.boards import find_board
from m3vit.hw.cost import cost
from m3vit.hw.design import Design
from m3vit.hw.explore import explore
from m3vit.hw.fit import check_tokens, fit
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Instruction
from m3vit.hw.layer_bits import chosen_maps
from m3vit.hw.manifest import WEIGHTS, budget_names, find_budget
from m3vit.hw.network import Head, Network, maps_of, program_of
from m3vit.hw.program import Image
from m3vit.models.config import ModelConfig
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import meta_model, refusing

BITS = ((8, 8), (8, 16), (16, 16))  # of weights and activations, that are explored


def _task(name: str | None, tasks: list[str]) -> int:
    if name is not None and name not in tasks:
        raise InputError(f"--task is {name!r}: this model has {', '.join(tasks)}")
    return tasks.index(name) if name else 0


def network_of(model: MultiTaskModel) -> Network:
    """Return the sizes of a model. Raises InputError for heads that the accelerator does not have."""
    backbone, config = model.backbone, model.config
    blocks: list[Any] = list(backbone.trunk.blocks)
    experts = [block.mlp.experts if isinstance(block.mlp, MoELayer) else None for block in blocks]
    heads = token_heads(model)
    rows, columns = (side // backbone.patch_size for side in config.image_size)
    return Network(
        grid=(rows, columns),
        patch=backbone.patch_size,
        prefix=backbone.trunk.num_prefix_tokens,
        dim=backbone.dim,
        heads=blocks[0].attn.num_heads,
        mlps=[
            block.mlp.fc1.out_features if bank is None else bank.w1.shape[1]
            for block, bank in zip(blocks, experts, strict=True)
        ],
        top_ks=[0 if bank is None else config.top_k for bank in experts],
        experts=config.num_experts,
        tasks=[
            Head(head.linear.out_features, head.conv.out_channels if head.conv is not None else 0)
            for head in (heads[task] for task in config.tasks)
        ],
        upscale=heads[config.tasks[0]].upscale,
        same_gates=config.router == "single",
        pre_norm=not isinstance(backbone.trunk.norm_pre, torch.nn.Identity),
    )


def sizes_of_model(config: ModelConfig) -> Network:
    """Return the sizes of a model that need not be trained. Raises InputError for one that cannot be exported."""
    with refusing(config):
        network = network_of(meta_model(config))
    check_tokens(network.grid[0] * network.grid[1] + network.prefix)
    return network


def of_model(
    config: ModelConfig,
    weight_bits: int | None,
    act_bits: int | None,
    board: str | None,
    task: str | None,
    engines: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the cost of a model that need not be trained; engines: as of choose_options.

    Raises InputError for a model that cannot be exported, and engines that do not fit.
    """
    options = choose_options("multiplexed", weight_bits, act_bits, board, engines)
    assert options.design is not None
    chosen, bits = options.design.target, (options.weight_bits, options.act_bits)
    network = sizes_of_model(config)
    program = program_of(network, *bits, chosen.port_bits, chosen_maps(options.layers, maps_of(network)))
    hardware = fit(program, *bits, chosen, options.design.sizes)
    return cost(program, hardware, chosen, _task(task, config.tasks))


def explore_model(
    config: ModelConfig,
    weight_bits: int | None,
    act_bits: int | None,
    board: str | None,
    engines: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the fronts of engines for a model (m3vit.hw.explore): of the bits that are given, else of BITS."""
    tried = [bits for bits in BITS if weight_bits in (None, bits[0]) and act_bits in (None, bits[1])]
    if not tried and weight_bits and act_bits:
        tried = [(weight_bits, act_bits)]
    if not tried:
        raise InputError(f"of bits {', '.join(f'W{w}A{a}' for w, a in BITS)} none are those given: give both")
    options = [choose_options("multiplexed", *bits, board, engines) for bits in tried]
    network, design = sizes_of_model(config), options[0].design
    assert design is not None
    fine = chosen_maps(options[0].layers, maps_of(network))
    return explore(partial(program_of, network, fine=fine), tried, design, engines.get("layer_bits"))


def of_project(project: Path, board: str | None, task: str | None, budget: str | None = None) -> dict[str, Any]:
    """Return the cost of a project: of its own engines, or with another `board` of those that fit there.

    Of several budgets that of `budget` (default: the first), `budget` its name, and under `budgets` a line of each.
    """
    manifest, _ = open_project(project)
    if manifest.get("schedule") != "multiplexed":
        raise InputError(
            f"{project} is of the spatial schedule, which has no program: give one of --schedule multiplexed"
        )
    image, number = Image.read(project / WEIGHTS), find_budget(manifest, budget)
    programs = [image.program_of(place) for place in range(len(image.starts))]
    check_engines(project, manifest)
    hardware, design = Hardware(**manifest["hardware"]), Design(**manifest.get("design", {"board": manifest["board"]}))
    chosen = design.target if board in (None, design.board) else find_board(board)
    if chosen.port_bits != hardware.port_bits:
        raise InputError(
            f"--board {board} has ports of {chosen.port_bits} bits, and {project} was written for "
            f"{hardware.port_bits}: export it with --board {board}"
        )
    if chosen.name != manifest["board"]:
        others, own = [one for program in programs[1:] for one in program], {"wide_bits": hardware.wide_bits}
        hardware = fit(programs[0], hardware.weight_bits, hardware.act_bits, chosen, own, others)
    names, tasks = budget_names(manifest), [entry["name"] for entry in manifest["tasks"]]
    found = [cost(program, hardware, chosen, _task(task, tasks)) for program in programs]
    lines = {name: _line(one, programs[place]) for place, (name, one) in enumerate(zip(names, found, strict=True))}
    return {**found[number], **({"of_budget": names[number], "budgets": lines} if len(names) > 1 else {})}


def _line(found: dict[str, Any], program: Sequence[Instruction]) -> dict[str, Any]:
    """Return what is said of each budget."""
    return {
        "ms": found["ms"],
        "macs": found["macs"],
        "bytes": sum(found["bytes"].values()),
        "instructions": len(program),
    }
