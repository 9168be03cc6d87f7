"""What a run starts as: its model, before training; coefficients of merged runs, found on its training images."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from m3vit.collectives import agree, gather
from m3vit.data.loading import unlabelled
from m3vit.data.opening import open_split
from m3vit.data.sample import Split
from m3vit.files import require_empty
from m3vit.models.entropy import Found, find_coefficients
from m3vit.models.initialise import new_model, not_taken
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import try_out
from m3vit.run_folder import save_model
from m3vit.training.budgets import space
from m3vit.training.checkpoint import GO_ON, prepare_folder
from m3vit.training.config import Config
from m3vit.training.parts import frozen_epochs
from m3vit.training.stopping import Stopped, stop_signals


def build(config: Config, *, bare: bool = False, coefficients: Found | None = None) -> MultiTaskModel:
    """Return the model with weights drawn from the run's seed, or raise InputError if there can be none.

    bare: its weights are all random, for a checkpoint to be put over them; what they began as is not read again.
    coefficients: of merged runs, if they are found by now.
    """
    config.check()
    try_out(config.model)
    if not bare and coefficients is None:
        coefficients = coefficients_of(config)
    torch.manual_seed(config.train.seed)
    model = new_model(config.model, bare=bare, coefficients=coefficients)
    frozen_epochs(config.train, model)  # refuses blocks that there are not
    if config.train.budgets:
        space(model, config.train)  # refuses budgets that leave nothing to choose
    return model


def initialise(config: Config, out: Path, say: Callable[[str], None] | None = None) -> None:
    """Write a run folder with untrained weights (`m3vit init`); `say` gets lines about what did not fit."""
    model = build(config, coefficients=coefficients_of(config, out=out))
    if say:
        for line in not_taken(model):
            say(line)
    prepare_folder(replace(config, model=model.config), out, resume=False)
    save_model(out, model, epoch=0)


def coefficients_of(
    config: Config,
    split: Split | None = None,
    out: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Found | None:
    """Return the coefficients that a configuration asks to be found, None if it does not.

    split: the training split, whose images are looked at, not its labels; without it, it is opened. out: the folder
    of the run, which is to be new or empty: said before the search. The same with the same seed.
    """
    model, data = config.model, config.data
    if model.merge_coefficients != "entropy":
        return None
    config.check()
    try_out(model)
    if out is not None:
        require_empty(out, advice=GO_ON)
    skip = data.on_error == "skip"
    if split is None:
        split = open_split(data.layout, data.root, "train", model.tasks, partial=skip, label_set=model.label_set)
    size = (model.image_size[0], model.image_size[1])
    images = partial(unlabelled, split, size, count=model.merge_images, seed=config.train.seed, skip=skip)
    return find_coefficients(model, images, device, progress)


def search(
    config: Config,
    split: Split,
    out: Path | None,
    device: torch.device | str,
    progress: Callable[[int, int, str], None] | None,
) -> Found | None:
    """Return `coefficients_of`, the same on every process; raise `Stopped` after a signal to any of them."""
    with stop_signals() as stop:

        def watch(done: int, of: int, words: str) -> None:
            if stop.received:
                raise Stopped(stop.received, None)
            if progress:
                progress(done, of, words)

        def look() -> Found | None:
            try:
                return coefficients_of(config, split, out, device, watch)
            except Stopped:  # told to the others below: none may leave while they wait for it
                return None

        # Each process looks for them, in the same time; sums may differ in their last bits.
        found = agree(look)
        ends = gather((stop.received, found))
    for received, _ in ends:
        if received:
            raise Stopped(received, None)
    return ends[0][1]
