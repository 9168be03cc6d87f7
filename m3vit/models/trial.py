"""Whether a configuration makes a model that can be built and run: tried on torch's meta device, without memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from m3vit.errors import InputError, one_line, short
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import initialise, upcycling
from m3vit.models.meta import KnownShapes, without_values
from m3vit.models.multitask import MultiTaskModel


def meta_model(config: ModelConfig) -> MultiTaskModel:
    """Return the model on the meta device, without values, its experts run in a way that needs shapes alone."""
    with without_values():
        model = MultiTaskModel(replace(config, experts="reference"))
        initialise(model, upcycling(config))  # for what it refuses
    return model.eval()


@contextmanager
def refusing(config: ModelConfig) -> Iterator[None]:
    """Raise InputError for whatever torch or timm raise within it: what they check, they check in many ways."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        words = one_line(error, 200)
        arguments, size = short(config.trunk_args, 200), short(list(config.image_size), 200)
        raise InputError(
            f"no model can be run with model.trunk {config.trunk}, trunk_args {arguments}, image_size {size}, "
            f"num_experts {config.num_experts}, expert_ratio {config.expert_ratio:g} and head {config.head} ({words}): "
            "give other values of these"
        ) from error


def try_out(config: ModelConfig) -> None:
    """Raise InputError if a model cannot be built from the configuration, run on an image, or held in memory."""
    with refusing(config), torch.no_grad(), KnownShapes():
        model = meta_model(config)
        for tasks in (config.tasks, config.tasks[:1]):
            logits = model(torch.empty(1, 3, *config.image_size, device="meta"), tasks).logits
            found = {task: tuple(value.shape) for task, value in logits.items()}
            expected = {task: (1, config.labels.channels(task), *config.image_size) for task in tasks}
            if found != expected:
                raise InputError(f"model.head {config.head} gives logits of the shapes {found}, expected {expected}")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InputError(
            f"the model's parameters take {size / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}: give "
            "smaller model.trunk_args, num_experts or expert_ratio"
        )
