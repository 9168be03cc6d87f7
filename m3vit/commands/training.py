"""m3vit train, init, profile: the commands that take a recipe and any key of it."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from m3vit.collector import resting
from m3vit.commands.hls import add_cost_options
from m3vit.commands.terminal import PLUGIN_HELP, progress_bar, say
from m3vit.errors import InputError
from m3vit.plugins import loaded, recall

TITLES = {
    "train": "Train a recipe into a run folder.",
    "init": "Write the run folder of a recipe with untrained weights.",
    "profile": "Count parameters and multiply-accumulates of a recipe or a run.",
    "hw cost": "Model what an accelerator costs on a board, of a recipe, a run or an HLS project.",
    "hw explore": "Search the engines of an accelerator on a board: modelled time against what they take.",
}
OPENING_RUNS = ("profile", "hw cost", "hw explore")  # take a run folder in place of a recipe

# What a value of a type is, for people; {}: what was given instead.
_WORDS = {
    "bool": "true or false",
    "dict": "a mapping, {{key: value, ...}}",
    "float": "a number",
    "int": "a whole number",
    "list": "a list, such as [{}]",
    "tuple": "a list, such as [{0}, {0}]",
}


def config_from(command: str, argv: Sequence[str]) -> tuple[Any, Any]:
    """Parse `RECIPE [--config FILE] [--any.dotted.key VALUE] ...` into (Config, the other arguments)."""
    import jsonargparse
    from yaml import YAMLError

    from m3vit.training.config import SECTIONS, Config, read_run_config, recipe_names, recipe_path, yaml_text
    from m3vit.values import not_among

    recipe = argv[0] if argv and not argv[0].startswith("-") else None
    start = None
    if recipe and command in OPENING_RUNS and recipe not in recipe_names() and Path(recipe).is_dir():
        start = Path(recipe) / "config.yaml"
        run = read_run_config(Path(recipe))  # its messages are clearer than those of the parser below
        _know_labels(Path(recipe), run.model)
    elif recipe:
        start = recipe_path(recipe)
    parser = jsonargparse.ArgumentParser(
        prog=f"m3vit {command} RECIPE",
        exit_on_error=False,
        default_config_files=[str(start)] if start else None,
        description=f"{TITLES[command]} RECIPE: {', '.join(recipe_names())}. "
        "Later sources win: recipe, --config, dotted keys. A mapping in a file replaces the recipe's; a dotted key "
        "changes one entry of it. Defaults shown here are those of the RECIPE given before --help, if one is.",
        epilog=PLUGIN_HELP,
        allow_abbrev=False,
    )
    parser.add_argument("--plugins", type=list[str], default=[], help=argparse.SUPPRESS)  # of a run's config.yaml
    parser.add_argument("--config", action="config", help="YAML file of the same keys, read after the recipe")
    if command == "profile":
        parser.add_argument("--task", default=None, help="show this task alone; without it, all of them")
        parser.add_argument(
            "--budget", default=None, metavar="FILE", help="of m3vit search: count what it uses of the model alone"
        )
        parser.add_argument(
            "--device",
            default=None,
            metavar="NAME",
            help="with --train alone, which predicts the memory of a training step: the largest batch that fits: "
            "A100-40GB, H100, RTX4090, ..., or a size such as 24GB",
        )
    if command in ("hw cost", "hw explore"):
        add_cost_options(parser, exploring=command == "hw explore")
    if command in OPENING_RUNS:
        parser.add_argument("--json", type=str, default=None, metavar="FILE", help="write the figures as JSON")
    else:
        parser.add_argument("--out", type=str, required=True, metavar="RUN", help="the run folder to write")
    if command == "train":
        parser.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")
    for section in fields(Config):
        if section.name in SECTIONS:
            parser.add_class_arguments(section.default_factory, section.name)  # type: ignore[arg-type]
    if recipe is None and not {"-h", "--help"} & set(argv):
        rest = " (or a run folder)" if command in OPENING_RUNS else " --out RUN"
        raise InputError(f"give a recipe first: m3vit {command} RECIPE{rest}, with one of {', '.join(recipe_names())}")
    words = list(argv[1:] if recipe else argv)
    if command == "train" and "--resume" in words:
        recall_of(words)
    configs, others = _split_configs(words)
    for word, following in zip(configs, [*configs, ""][1:], strict=True):
        option, _, value = word.partition("=")
        if option == "--config" and os.path.exists(value or following):  # what is missing the parser says
            yaml_text(Path(value or following), "give a YAML file as --config")
    words = configs + others  # dotted keys win over files, wherever they stand
    try:
        parsed = parser.instantiate(parser.parse_args(words))
    except (jsonargparse.ArgumentError, TypeError, ValueError, OverflowError, RecursionError, YAMLError) as error:
        text = " ".join(str(error).split()).replace("arguments are required: out", "arguments are required: --out")
        if choice := re.search(r'Parser key "(\S+)": Expected a typing.Literal\[(.*?)\]. Got value: (.*)', text):
            key, choices, value = choice.groups()
            raise InputError(not_among(key, value, tuple(re.findall(r"'(.*?)'", choices)))) from None
        if either := re.search(r'Parser key "(\S+)": .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)', text):
            key, kinds, value = either.groups()
            forms = re.sub(r"typing\.Literal\['(.*?)'\]", r"\1", kinds).replace(", ", " or ")
            raise InputError(f"{key} is {value[:80]}: give {forms}") from None
        if other := re.search(r'Parser key "(\S+)": Expected a <class \'(\w+)\'>. Got value: (.*)', text):
            key, kind, value = other.groups()
            raise InputError(f"{key} is {value[:80]}: give {_WORDS.get(kind, kind).format(value[:80])}") from None
        raise InputError(f"m3vit {command}: {text}") from None
    for name in ("out", "json"):  # str for jsonargparse, whose help would show what a Path is
        if parsed.get(name) is not None:
            parsed[name] = Path(parsed[name])
    recall(parsed.plugins, str(start))
    return Config(parsed.model, parsed.data, parsed.train, loaded()), parsed


def _know_labels(run: Path, model: Any) -> None:
    """Make known the classes and tasks that a run describes, where they are of data of somebody's own."""
    from m3vit.digests import read_sealed_json
    from m3vit.label_sets import LABEL_SETS, declare

    info = run / "model.json"
    if model.label_set not in LABEL_SETS and info.is_file():
        described = read_sealed_json(info, "part of a run folder").get("labels")
        if described is not None:
            declare(described, str(info), model.tasks)


def recall_of(words: Sequence[str]) -> None:
    """Note which plug-ins the run to resume was trained with: an error then says which of them are missing.

    They are not imported: a run folder must not make a program run what its user did not name.
    """
    from yaml import YAMLError, safe_load

    from m3vit.training.config import yaml_text

    given = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == "--out"]
    given += [word.partition("=")[2] for word in words if word.startswith("--out=")]
    path = Path(given[-1]) / "config.yaml" if given else Path()
    if not path.is_file():
        return
    try:
        found = safe_load(yaml_text(path, "a run folder"))
        recorded = found.get("plugins", []) if isinstance(found, dict) else []
    except (YAMLError, InputError):  # what is wrong with it is said when the run is opened
        return
    if isinstance(recorded, list) and all(isinstance(one, str) for one in recorded):
        recall(recorded, given[-1])


def _split_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that give --config, as two words or as one, and the others."""
    configs: list[str] = []
    others: list[str] = []
    for word, before in zip(words, ["", *words][: len(words)], strict=True):
        is_config = word == "--config" or word.startswith("--config=") or before == "--config"
        (configs if is_config else others).append(word)
    return configs, others


def run_train(argv: Sequence[str]) -> int:
    from m3vit.training.effects import check_given

    try:
        config, args = config_from("train", argv)
        config.check()
        check_given(config, argv)
    except InputError as error:
        error.everywhere = True  # the processes of a torchrun read the same words
        raise
    with resting():
        from m3vit.collectives import rank
        from m3vit.training.loop import train
        from m3vit.training.stopping import Stopped

    first = rank() == 0  # of several processes: the one that speaks
    try:
        with progress_bar("training", visible=first) as bar:
            left_out = train(config, args.out, resume=args.resume, progress=bar, say=say)
    except Stopped as stopped:
        if first:
            print(f"m3vit: {stopped}", file=sys.stderr)
        return stopped.exit_code
    if first:
        epochs = config.train.epochs
        say(f"trained for {epochs} epoch{'' if epochs == 1 else 's'}: {args.out}")
        if left_out.images:
            say(f"{len(left_out.images)} training images could not be read and were left out: see metrics.jsonl")
        if left_out.labels:
            counts = ", ".join(f"{task} {len(messages)}" for task, messages in left_out.labels.items())
            say(f"labels that could not be read, of images trained on without them: {counts}: see metrics.jsonl")
    return 0


def run_init(argv: Sequence[str]) -> None:
    config, args = config_from("init", argv)
    from m3vit.training.effects import check_given

    config.check()
    check_given(config, argv)
    with resting():
        from m3vit.training.starting import initialise

    initialise(config, args.out, say)
    say(f"untrained weights: {args.out}")


def _take_flag(name: str, argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether a word stands by itself, without a value, and the other words."""
    places = [
        place
        for place, (word, following) in enumerate(zip(argv, [*argv, "-"][1:], strict=True))
        if word == name and following.startswith("-")
    ]
    return bool(places), [word for place, word in enumerate(argv) if place not in places]


def run_profile(argv: Sequence[str]) -> None:
    training, argv = _take_flag("--train", argv)  # jsonargparse has --train FILE, of the section's keys
    config, args = config_from("profile", argv)
    from m3vit.training.effects import check_given

    config.check()
    check_given(config, argv, "train" if training else "profile")
    with resting():
        from m3vit.models.budget import FULL
        from m3vit.models.budget_file import read_budget
        from m3vit.profiling import profile, render

    if args.device and not training:
        raise InputError("--device is of a training: give --train too")
    if args.device:
        from m3vit.training.memory import device_bytes

        device_bytes(args.device)
    budget = read_budget(Path(args.budget)) if args.budget is not None else FULL
    report = profile(config.model, args.task, budget)
    if config.train.budgets:
        from m3vit.models.trial import meta_model
        from m3vit.profiling import macs_share
        from m3vit.training.budgets import space, step_macs, training_macs

        shapes = meta_model(config.model)
        report["smallest_budget"] = macs_share(shapes, space(shapes, config.train).smallest)
        report["step_macs"] = step_macs(shapes, config.train)
        report["training_macs"] = training_macs(config.train, report["step_macs"])
    if training:
        from m3vit.training.memory import predict, said

        report["training"] = predict(config, args.device)
    if args.json is not None:
        from m3vit.files import write_json

        write_json(args.json, report)
    say(render(report))
    if config.train.budgets:
        say(f"the smallest budget trained for takes {report['smallest_budget']:.3f} of the MACs of all tasks' graphs")
        line = f"a step of training takes {report['step_macs']:.2f} times the MACs of one for the whole model alone"
        if start := config.train.budget_start:
            line += f" from {100 * start:g} % of the training on, {report['training_macs']:.2f} all in all"
        say(line)
    if training:
        say(said(report["training"]))
