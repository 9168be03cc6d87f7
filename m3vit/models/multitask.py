"""The whole model: backbone and one head per task."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.backbone import Backbone
from m3vit.models.config import ModelConfig
from m3vit.models.heads import LinearHead
from m3vit.models.router import Routing
from m3vit.tasks import resolve


class Output(NamedTuple):
    """Logits {task: [B, C, H, W] float32} and, for each MoE layer, its routing (tasks in the order asked for)."""

    logits: dict[str, Tensor]
    routings: list[Routing]


class MultiTaskModel(nn.Module):
    """A task-gated mixture-of-experts ViT for dense prediction, after M3ViT (arXiv 2210.14793)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.backbone = Backbone(config)
        self.heads = nn.ModuleDict(
            {
                task.name: LinearHead(
                    self.backbone.dim,
                    config.labels.channels(task.name),
                    self.backbone.patch_size,
                    config.head_stride,
                    task.output_bias,
                )
                for task in resolve(config.tasks, config.label_set)
            }
        )

    def task_id(self, task: str) -> int:
        """Return the position of a task in the model's task table, or raise InputError."""
        if task not in self.config.tasks:
            raise InputError(f"this model has no task {task!r}: it has {', '.join(self.config.tasks)}")
        return self.config.tasks.index(task)

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None, native: Sequence[str] = ()) -> Output:
        """Predict `tasks` (default: all) for normalised images [B, 3, H, W] float32.

        Logits come at the image's size, those of the tasks in `native` at their head's own resolution.
        """
        names = list(self.config.tasks if tasks is None else tasks)
        tokens_RBTD, routings = self.backbone(images, tuple(self.task_id(name) for name in names))
        grid, size = self.backbone.grid(images), (images.shape[-2], images.shape[-1])
        logits = {
            name: self.heads[name](tokens, grid, None if name in native else size)
            for name, tokens in zip(names, tokens_RBTD.unbind(), strict=True)
        }
        return Output(logits, routings)
