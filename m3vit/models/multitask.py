"""The whole model: a backbone and a decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from m3vit import normalisation
from m3vit.errors import InputError
from m3vit.models.backbone import Backbone
from m3vit.models.budget import Budget, Use
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import make_decoder
from m3vit.models.router import Routing


class Output(NamedTuple):
    """Logits {task: [B, C, H, W] float32} and, for each MoE layer, its routing (tasks in the order asked for).

    `auxiliary` holds further outputs of the decoder that only train, {name: logits of each task as above}.
    """

    logits: dict[str, Tensor]
    routings: list[Routing]
    auxiliary: dict[str, dict[str, Tensor]]


class MultiTaskModel(nn.Module):
    """A task-gated mixture-of-experts ViT for dense prediction, after M3ViT (arXiv 2210.14793).

    Of random weights: initialise.py has the others. `normalisation` is that of its images, `heads` is the decoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.origins: dict[str, Any] = {}  # what `initialise` returned, of models that began here
        self.backbone = Backbone(config)
        self.normalisation = normalisation.resolve(config.normalisation, config.trunk, None)
        self.heads = make_decoder(config, self.backbone)

    def normalise_as(self, images: Mapping[str, Any] | None) -> None:
        """Fix how images are normalised, for weights trained on such `images` ("mean", "std"), None for random ones."""
        self.normalisation = normalisation.resolve(self.config.normalisation, self.config.trunk, images)
        self.config = replace(self.config, normalisation=self.normalisation.plain())

    def task_id(self, task: str) -> int:
        """Return the position of a task in the model's task table, or raise InputError."""
        if task not in self.config.tasks:
            raise InputError(f"this model has no task {task!r}: it has {', '.join(self.config.tasks)}")
        return self.config.tasks.index(task)

    def uses(self, budget: Budget | None, tasks: Sequence[str]) -> list[list[Use]] | None:
        """Return a budget as the backbone takes it, for these tasks, or raise InputError if it is another model's."""
        if budget is None or budget.full:
            return None
        blocks = self.backbone.moe_indices
        budget.check(self.config.tasks, blocks)
        layers: dict[int, Any] = {block: self.backbone.trunk.blocks[block].mlp for block in blocks}
        return [[layer.use(budget.layer(task, block)) for task in tasks] for block, layer in layers.items()]

    def forward(
        self,
        images: Tensor,
        tasks: Sequence[str] | None = None,
        native: Sequence[str] = (),
        budget: Budget | None = None,
    ) -> Output:
        """Predict `tasks` (default: all) for normalised images [B, 3, H, W] float32.

        Logits come at the image's size, those of the tasks in `native` at their decoder's own resolution. `budget`:
        what is used of the experts; None: all, as trained. Raises InputError for one that the model cannot keep to.
        """
        names = list(self.config.tasks if tasks is None else tasks)
        ids = tuple(self.task_id(name) for name in names)
        features, routings = self.backbone(images, ids, self.heads.blocks, self.uses(budget, names))
        size = (images.shape[-2], images.shape[-1])
        logits, auxiliary = self.heads(features, {name: None if name in native else size for name in names})
        return Output(logits, routings, auxiliary)
