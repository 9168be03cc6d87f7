"""The whole model: a backbone and a decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3vit import normalisation
from m3vit.errors import InputError
from m3vit.models.backbone import Backbone
from m3vit.models.budget import Budget, Uses
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import make_decoder
from m3vit.models.router import Routing


class Output(NamedTuple):
    """Logits {task: [B, C, H, W] float32} and, for each MoE layer, its routing (tasks in the order asked for).

    `auxiliary` holds further outputs of the decoder that only train, {name: logits of each task as above}; `tokens`, if
    they are asked for, what the decoder read {block: [R or 1, B, T, D]}; `unused`, likewise, 0.
    """

    logits: dict[str, Tensor]
    routings: list[Routing]
    auxiliary: dict[str, dict[str, Tensor]]
    tokens: dict[int, Tensor] = {}  # noqa: RUF012 (never changed)
    unused: Tensor | None = None


def of_decoder(uses: Uses | None) -> dict[str, Any]:
    """Return what a decoder is told to use of itself, as arguments: nothing where it is all, which each one takes."""
    return {key: of for key, of in (("kept", uses.decoder), ("channels", uses.heads)) if of} if uses else {}


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

    def hidden_widths(self) -> dict[int, int]:
        """Return the hidden units of each block of which a part can be used: of one expert, or of the dense MLP."""
        layers = {block: self.backbone.trunk.blocks[block].mlp for block in self.backbone.moe_indices}
        experts = {block: int(layer.experts.w1.shape[1]) for block, layer in layers.items()}
        return dict(sorted({**self.backbone.mlp_widths(), **experts}.items()))

    def uses(self, budget: Budget | Uses | None, tasks: Sequence[str]) -> Uses | None:
        """Return a budget as the backbone takes it, for these tasks, or raise InputError if it is another model's."""
        if isinstance(budget, Uses):
            return budget
        if budget is None or budget.full:
            return None
        blocks, mlps = self.backbone.moe_indices, self.backbone.mlp_widths()
        budget.check(self.config.tasks, blocks, mlps)
        layers: dict[int, Any] = {block: self.backbone.trunk.blocks[block].mlp for block in blocks}
        experts = [[layer.use(budget.layer(task, block)) for task in tasks] for block, layer in layers.items()]
        widths = {block: width for block, width in budget.width.items() if width < mlps.get(block, 0)}
        self.heads.check_kept(budget.decoder)
        self.heads.check_channels(budget.heads)
        heads = {task: count for task, count in budget.heads.items() if count < self.heads.channels[task]}
        return Uses(experts, widths, budget.decoder, heads)

    def forward(
        self,
        images: Tensor,
        tasks: Sequence[str] | None = None,
        native: Sequence[str] = (),
        budget: Budget | Uses | None = None,
        *,
        keep_tokens: bool = False,
        keep_unused: bool = False,
    ) -> Output:
        """Predict `tasks` (default: all) for normalised images [B, 3, H, W] float32.

        Logits come at the image's size, those of the tasks in `native` at their decoder's own resolution. `budget`:
        what is used of the model, or what `uses` made of it for these tasks; None: all, as trained. Raises InputError
        for one that the model cannot keep to.

        keep_unused: return 0, made of the parameters that have no part in this (blocks left out, and what of a decoder
        only trains if it is not training), for a loss: DDP waits for each parameter's gradient, and looks for them in
        what a model returns.
        """
        names = list(self.config.tasks if tasks is None else tasks)
        ids = tuple(self.task_id(name) for name in names)
        uses = self.uses(budget, names)
        features, routings = self.backbone(images, ids, self.heads.blocks, uses)
        size = (images.shape[-2], images.shape[-1])
        sizes = {name: None if name in native else size for name in names}
        logits, auxiliary = self.heads(features, sizes, **of_decoder(uses))
        unused = self._unused(uses) if keep_unused else None
        return Output(logits, routings, auxiliary, features.tokens if keep_tokens else {}, unused)

    def _unused(self, uses: Uses | None) -> Tensor | None:
        modules: list[nn.Module] = [
            self.backbone.trunk.blocks[block] for block, width in (uses.widths if uses else {}).items() if width == 0
        ]
        if not self.heads.training:
            modules += [module for name, module in self.heads.named_children() if name == "training_only"]
        found = [parameter.sum() for module in modules for parameter in module.parameters() if parameter.requires_grad]
        return 0 * torch.stack(found).sum() if found else None
