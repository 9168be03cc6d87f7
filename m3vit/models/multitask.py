"""The whole model: backbone and one head per task."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from m3vit import normalisation
from m3vit.errors import InputError
from m3vit.models.backbone import Backbone
from m3vit.models.budget import Budget, Use
from m3vit.models.config import ModelConfig
from m3vit.models.heads import make_distillation, make_head, resize
from m3vit.models.router import Routing
from m3vit.tasks import resolve


class Output(NamedTuple):
    """Logits {task: [B, C, H, W] float32} and, for each MoE layer, its routing (tasks in the order asked for).

    `distilled` holds the outputs of each level of `model.distillation`, {level: logits of each task as above}.
    """

    logits: dict[str, Tensor]
    routings: list[Routing]
    distilled: dict[int, dict[str, Tensor]]


class MultiTaskModel(nn.Module):
    """A task-gated mixture-of-experts ViT for dense prediction, after M3ViT (arXiv 2210.14793).

    `normalisation` is that of its images, `config` the one given with these numbers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.backbone = Backbone(config)
        trained = self.backbone.trunk.pretrained_cfg if config.pretrained or config.weights else None
        self.normalisation = normalisation.resolve(config.normalisation, config.trunk, trained)
        self.config = replace(config, normalisation=self.normalisation.plain())
        patch_size = self.backbone.patch_size
        self.heads = nn.ModuleDict(
            {
                task.name: make_head(config, task, self.backbone.dim, patch_size)
                for task in resolve(config.tasks, config.label_set)
            }
        )
        self.distillation = make_distillation(config, patch_size)

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

        Logits come at the image's size, those of the tasks in `native` at their head's own resolution. `budget`: what
        is used of the experts; None: all, as trained. Raises InputError for one that the model cannot keep to.
        """
        names = list(self.config.tasks if tasks is None else tasks)
        task_ids = tuple(self.task_id(name) for name in names)
        tokens_RBTD, routings = self.backbone(images, task_ids, self.uses(budget, names))
        grid, size = self.backbone.grid(images), (images.shape[-2], images.shape[-1])
        tokens = dict(zip(names, tokens_RBTD.unbind(), strict=True))
        sizes = {name: None if name in native else size for name in names}
        # Distillation needs every task's features: a training step on some of the tasks goes without.
        if self.training and self.distillation and set(names) == set(self.heads):
            logits, distilled = self._distil(tokens, grid, sizes)
            return Output(logits, routings, distilled)
        return Output({name: self.heads[name](tokens[name], grid, sizes[name]) for name in names}, routings, {})

    def _distil(
        self, tokens: dict[str, Tensor], grid: tuple[int, int], sizes: dict[str, tuple[int, int] | None]
    ) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """Return the logits of the (pup) heads and the distilled ones of each level, by task."""
        heads: dict[str, Any] = dict(self.heads.items())
        features = {name: heads[name].features(tokens[name], grid) for name in self.config.tasks}
        logits = {name: heads[name].predict(features[name][-1], sizes[name]) for name in tokens}
        distilled: dict[int, dict[str, Tensor]] = {}
        for level in self.config.distillation:
            outputs = self.distillation[str(level)]([stages[level + 1] for stages in features.values()])
            named = zip(features, outputs, strict=True)
            distilled[level] = {name: resize(output, sizes[name]) for name, output in named}
        return logits, distilled
