"""What a model's weights begin as: a model is shapes, and named sources fill it, in order.

Construction draws random weights, as torch's modules do (none on the meta device). `sources` says what goes over them:
weights of the dense trunk, then up-cycling; or what fits of a trained run. `initialise` applies any list of sources: a
source fills tensors of the model, and says which, and what of its own it left out.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig, init_sources
from m3vit.models.entropy import Found, report
from m3vit.models.from_run import TRUNK, Taken, Trained, dense_tensors, read_trained, take
from m3vit.models.merging import began_from, merge
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.pretrained import UNUSED, Weights, of_file, of_timm, run_with_experts
from m3vit.models.released import read_released
from m3vit.models.saved import WEIGHTS
from m3vit.models.upcycling import upcycle

RANDOM = "random"


class Filled(NamedTuple):
    """What a source did.

    names: of the model's tensors that it filled. left_out: parts of its own that it did not use, in words. images:
    "mean" and "std" of the images that its weights were trained on, None if it has no say in that.
    """

    names: Iterable[str]
    left_out: Sequence[str] = ()
    images: Mapping[str, Any] | None = None


class Source(NamedTuple):
    """Where weights come from: a name for reports, and a function that fills a model."""

    name: str
    fill: Callable[[MultiTaskModel], Filled]


def new_model(config: ModelConfig, *, bare: bool = False, coefficients: Found | None = None) -> MultiTaskModel:
    """Build a model and initialise it as its configuration says; the default generator draws what is random.

    bare: at random alone. coefficients: what was found (entropy.py), for model.merge_coefficients entropy.
    """
    model = MultiTaskModel(config)
    model.origins = initialise(model, [] if bare else sources(config, coefficients))
    if coefficients is not None:
        model.origins["coefficients"] = coefficients.plain()
    return model


def sources(config: ModelConfig, coefficients: Found | None = None) -> list[Source]:
    """Return the sources that a configuration names, in order."""
    kind, given = init_sources(config.init)
    if kind == "run":
        return [Source(config.portable().init, partial(_from_run, given[0]))]
    if kind == "merge":
        return [Source(config.portable().init, partial(_merged, given, coefficients))]
    if kind == "m3vit":
        return [Source(config.portable().init, partial(_released, given[0]))]
    found = []
    if config.pretrained:
        found.append(Source(f"timm's {config.trunk}", lambda model: fill_trunk(model, of_timm(config))))
    if config.weights:
        found.append(Source(Path(config.weights).name, partial(_from_file, config.weights)))
    return found + upcycling(config)


def upcycling(config: ModelConfig) -> list[Source]:
    """Return the source that makes experts of the trunk's MLPs, if the configuration asks for it."""
    return [Source("up-cycled MLPs", _upcycled)] if config.init == "upcycle" else []


def initialise(model: MultiTaskModel, sources: Iterable[Source]) -> dict[str, Any]:
    """Fill a new model from `sources`, the later ones over the earlier; return what came from where.

    {"from": {part: source}, "left_out": {source: [parts it did not use]}}, JSON values; a part is the shortest prefix
    of names with one source, * for the numbers of a list. Resolves the model's normalisation (`auto`: that of the last
    source that has a say) and drops the MLPs that experts replaced, so that it is done once in a model's life.
    """
    origins = dict.fromkeys(model.state_dict(), RANDOM)
    left_out: dict[str, list[str]] = {}
    images: Mapping[str, Any] | None = None
    for source in sources:
        filled = source.fill(model)
        origins |= dict.fromkeys(filled.names, source.name)
        if filled.left_out:
            left_out[source.name] = list(filled.left_out)
        images = images if filled.images is None else filled.images
    model.normalise_as(images)
    model.backbone.replaced.clear()
    return {"from": _parts(origins, "*"), "left_out": left_out}


def not_taken(model: MultiTaskModel) -> list[str]:
    """Return, in lines for people, what a model left out of what it was started from, and what of it is random.

    Coefficients that were found come first.
    """
    if not model.config.started:
        return []
    lines = [report(model.origins["coefficients"])] if "coefficients" in model.origins else []
    lines += [f"not taken of {source}: {'; '.join(parts)}" for source, parts in model.origins["left_out"].items()]
    origins = {part: source.split(" and ") for part, source in model.origins["from"].items()}
    if fresh := [part if len(of) == 1 else f"{part} (some)" for part, of in origins.items() if RANDOM in of]:
        lines.append(f"at random: {', '.join(fresh)}")
    return lines


def of_run(name: str, state: Mapping[str, Tensor]) -> Source:
    """Return the source that is a saved model of the same architecture: every tensor, and no other."""

    def fill(model: MultiTaskModel) -> Filled:
        model.load_state_dict(state)
        return Filled(list(state))

    return Source(name, fill)


@torch.no_grad()
def fill_trunk(model: MultiTaskModel, weights: Weights) -> Filled:
    """Copy weights that fit into the dense trunk."""
    own, names = dense_tensors(model), set(model.state_dict())
    given = {name: value for name, value in weights.state.items() if not name.startswith(UNUSED)}
    for name, value in given.items():
        own[name].copy_(value)
    uses = {name: "used" if f"{TRUNK}{name}" in names else "" for name in weights.state}
    left_out = [part for part, use in _parts(uses).items() if not use]
    return Filled([f"{TRUNK}{name}" for name, use in uses.items() if use], left_out, weights.images)


def _from_file(file: str, model: MultiTaskModel) -> Filled:
    if run := run_with_experts(file):
        return _trunk_of_run(model, read_trained(str(run), "model.weights "))
    return fill_trunk(model, of_file(model.backbone.trunk, dense_tensors(model), file))


def _trunk_of_run(model: MultiTaskModel, run: Trained) -> Filled:
    """Take the trunk of a run with experts, with these: all of it, or raise InputError."""
    advice = f"--model.init=run:{run.folder} takes what fits"
    if model.config.init == "upcycle":
        raise InputError(
            f"model.init upcycle would make new experts over those of model.weights {run.folder / WEIGHTS}: give "
            f"--model.init=random to keep them; {advice}"
        )
    taken = take(model, run, heads=False)
    if missing := [name for name in model.state_dict() if name.startswith(TRUNK) and name not in taken.values]:
        why = next((fate for name, fate in taken.fates.items() if fate and name in missing), "the run has none")
        raise InputError(
            f"model.weights {run.folder / WEIGHTS} does not fit the model: it lacks {len(missing)} tensors of the "
            f"trunk, such as {missing[0]} ({why}); {advice}"
        )
    return _filled(taken, run)


def _from_run(given: str, model: MultiTaskModel) -> Filled:
    run = read_trained(given)
    return _filled(take(model, run), run)


def _merged(given: Sequence[str], coefficients: Found | None, model: MultiTaskModel) -> Filled:
    runs = [read_trained(one, "model.init merge: ") for one in given]
    values, taken = merge(model, runs, began_from(model), coefficients.layers if coefficients else None)
    left_out = [f"{run.name}: {words}" for run, one in zip(runs, taken, strict=True) for words in _left_out(one)]
    return Filled(list(values), left_out, runs[0].images)


def _released(given: str, model: MultiTaskModel) -> Filled:
    run, besides = read_released(given, model.config)
    filled = _filled(take(model, run), run)
    starred = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in besides)
    return filled._replace(left_out=[*filled.left_out, *(f"{name} (not in this model)" for name in starred)])


def _filled(taken: Taken, run: Trained) -> Filled:
    return Filled(list(taken.values), _left_out(taken), run.images)


def _left_out(taken: Taken) -> list[str]:
    fates = {part: fate.removeprefix(" and ") for part, fate in _parts(taken.fates, "*").items()}
    return [f"{part} ({fate})" for part, fate in fates.items() if fate]  # "" is what was taken, of several of a part


def _upcycled(model: MultiTaskModel) -> Filled:
    """Make the experts of each layer from the MLP they replaced, with the weights that it has by now."""
    config, filled = model.config, []
    for index, mlp in model.backbone.replaced.items():
        layer = model.backbone.trunk.blocks[index].mlp
        upcycle(layer, mlp, config.upcycle_gates, f"block {index} of {config.trunk}")
        changed = [*(f"experts.{name}" for name in layer.experts.state_dict())]
        changed += [f"router.gates.{number}" for number in range(len(layer.router.gates))]
        filled += [f"{TRUNK}blocks.{index}.mlp.{name}" for name in changed]
    return Filled(filled)


def _parts(origins: Mapping[str, str], number: str = "") -> dict[str, str]:
    """Return the origin of each part: of the shortest prefixes all of whose tensors have one origin.

    `number` stands for all numbers in names, if given.
    """
    found: dict[str, str] = {}

    def visit(prefix: tuple[str, ...], names: list[str]) -> None:
        last = any(len(name.split(".")) == len(prefix) for name in names)
        if prefix and (last or len({origins[name] for name in names}) == 1):
            found[".".join(prefix)] = " and ".join(sorted({origins[name] for name in names}))
            return
        groups: dict[str, list[str]] = {}
        for name in names:
            part = name.split(".")[len(prefix)]
            groups.setdefault(number if number and part.isdecimal() else part, []).append(name)
        for part, group in groups.items():
            visit((*prefix, part), group)

    visit((), list(origins))
    return found
