"""What may be asked of `m3vit export onnx`, by a program or on the command line. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from m3vit.errors import InputError
from m3vit.export.runtime.manifest import FLOAT, HALF, PRECISIONS
from m3vit.models.budget import FULL, Budget
from m3vit.options import DataRoot, Positive, Size, Value, count, positive

MIN_OPSET = 20  # the first one with Gelu
MAX_OPSET = 23  # the last that the exporter and onnxruntime were tested with
NO_BUDGETS = (*PRECISIONS, "head")  # words that stand in the names of a package's files


@dataclass(frozen=True)
class Content:
    """What a package holds of a model.

    `size` is (height, width). Static graphs have `lower_moe`'s wide form and take one image of it.

    Attributes:
        tasks: tasks to export (default: all)
        opset: ONNX opset
        size: the only image size of the graphs, in pixels (default: any)
        static: no shape depends on the data: all experts run; needs --size
        precisions: fp32, fp16 (weights as stored), int8 (all linear layers but routers), int8-mixed, int8-experts,
            int4-experts (the rest as int8); several may share a package, the first is its default
        budget: the experts that each task's graph keeps and uses, and hidden units
        budgets: several by name instead, around one file of weights: the first is the package's default
        coverage: the share of the gate mass that these hold, by task and layer, for the manifest
        decoder_coverage: the same of the decoder's own experts
        one_backbone: add one graph of the backbone for all tasks, and one of each head
        attention: fused, a kernel that onnxruntime alone has, or standard, operators of every runtime (default: fused,
            but standard with --static)
        all_tasks: add one graph of all tasks at once, which computes what they have in common once
    """

    tasks: tuple[Annotated[str, Value(metavar="T")], ...] = ()
    opset: Annotated[int, Value(choices=lambda: range(MIN_OPSET, MAX_OPSET + 1))] = MIN_OPSET
    size: Size | None = None
    static: bool = False
    precisions: tuple[Annotated[str, Value(metavar="P", flag="precision")], ...] = (FLOAT,)
    budget: Annotated[Budget, Value(hidden=True)] = FULL
    budgets: Annotated[Mapping[str, Budget], Value(hidden=True)] = field(default_factory=dict)
    coverage: Annotated[Mapping[str, Sequence[float]], Value(hidden=True)] = field(default_factory=dict)
    decoder_coverage: Annotated[Mapping[str, Sequence[float]], Value(hidden=True)] = field(default_factory=dict)
    one_backbone: bool = False
    attention: Literal["fused", "standard"] | None = None
    all_tasks: bool = False

    @property
    def form(self) -> str:
        """The form of the MoE layers: `lower_moe`'s."""
        return "wide" if self.static else "sparse"

    @property
    def batch(self) -> int | None:
        """How many images the graphs take at once; None: any number."""
        return 1 if self.static else None

    @property
    def attends(self) -> str:
        """The form of attention: `lower_attention`'s."""
        return self.attention or ("standard" if self.static else "fused")

    @property
    def by_budget(self) -> "dict[str, Content]":
        """The content of each budget by its name, "" of the one that has none, the package's default first."""
        if not self.budgets:
            return {"": self}
        return {name: replace(self, budget=budget, budgets={}) for name, budget in self.budgets.items()}

    @property
    def nested(self) -> bool:
        """Whether weights are stored so that those of a smaller width are a beginning of those of a larger."""
        used = {(*sorted(budget.width.items()), *sorted(budget.heads.items())) for budget in self.budgets.values()}
        return len(used) > 1

    def check(self) -> None:
        """Raise InputError for what cannot be exported."""
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown or not self.precisions or len(set(self.precisions)) != len(self.precisions):
            raise InputError(
                f"precisions are {', '.join(self.precisions) or 'none'}: give one or more of {', '.join(PRECISIONS)}, "
                "each once"
            )
        if self.static and self.size is None:
            raise InputError("a static graph is made for one size: give it too, such as --size 224x224")
        if self.one_backbone and (self.static or not self.budget.full or self.budgets):
            raise InputError(
                "one backbone serves all tasks with the same experts: leave out --static, --prune, --keep, --top-k and "
                "--budget, or --one-backbone"
            )
        if self.budgets:
            self._check_budgets()

    def _check_budgets(self) -> None:
        for name in self.budgets:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) or name in NO_BUDGETS:
                raise InputError(
                    f"a budget cannot be called {name!r} in a package: give its file a name of up to 40 letters, "
                    f"digits, _ and -, and none of {', '.join(NO_BUDGETS)}"
                )
        if self.nested and (whole := [name for name in self.precisions if name not in (FLOAT, HALF)]):
            raise InputError(
                f"budgets of several widths or channels have their weights in common in {FLOAT} and {HALF} alone, not "
                f"in {', '.join(whole)}, whose scales are of all units: leave that out, or give one budget a package"
            )
        if self.nested and self.static:
            raise InputError(
                "static graphs have all experts in one product, of which no part is another width's: leave out "
                "--static, or give one budget a package"
            )


@dataclass(frozen=True)
class Request:
    """What a user asks for beside the package's content.

    Attributes:
        coverage: the share of its use that the experts kept of each task and layer hold (default: all experts)
        keep: keep the N most used experts of each task and layer (default: all)
        top_k: experts per token by task, where not as trained
        calibration: training images that --prune, --keep and --sweep measure use on
        measure: validation images to score the package on (default: 100 if experts, top-k or precision changed, else 0)
        check_images: compare with torch on N images (validation, then training, then noise), each at three sizes with
            1 and 2 threads, hunt for races, reach every expert: minutes to hours (default: a quick check of 2 images a
            size)
        data_root: data set's folder (default: the one the run was trained on)
    """

    coverage: Annotated[float | None, Value(hidden=True)] = None
    keep: Positive | None = None
    top_k: Annotated[Mapping[str, int], Value(hidden=True)] = field(default_factory=dict)
    calibration: Annotated[int, Value(positive, "N", flag="calibrate")] = 64
    measure: Annotated[int, Value(count, "N")] | None = None
    check_images: Positive | None = None
    data_root: DataRoot | None = None
