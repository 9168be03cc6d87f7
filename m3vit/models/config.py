"""The model's configuration. No torch: `m3vit train --help` reads it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

from m3vit import normalisation
from m3vit.errors import InputError, short
from m3vit.label_sets import LABEL_SETS, LabelSet, resolve
from m3vit.models.decoders import DECODERS, check_args
from m3vit.values import check_values, not_among

# Arguments of timm's create_model that are not the user's to give here, and which key says the same.
OURS = {
    "img_size": "model.image_size says it",
    "num_classes": "trunks have no classifier",
    "dynamic_img_size": "it is always on",
    "device": "train.accelerator says it",
    "dtype": "train.precision says it",
    "pretrained": "model.pretrained says it",
    "checkpoint_path": "model.weights says it",
    "features_only": "the decoder says which blocks it reads",
    "out_indices": "the decoder says which blocks it reads",
    "scriptable": "it changes nothing",
    "exportable": "it changes nothing",
    "model_name": "model.trunk says it",
}
# (least, most) of numbers: what no real model reaches, so that a slip is refused before anything is built.
LIMITS: dict[str, tuple[float, float]] = {
    "num_experts": (1, 2**16),
    "expert_ratio": (1e-6, 1e3),
    "head_stride": (1, 1024),
    "merge_steps": (1, 10**6),
    "merge_images": (1, 2**16),
}
INIT_WORDS = ("random", "upcycle")
INIT_FORMS = {"run": "{}", "merge": "[{}]", "m3vit": "{}"}  # of model.init, what stands behind the colon
INIT_SHOWN = {"run": "RUN", "merge": "RUN_A, RUN_B", "m3vit": "FILE"}
SIDE_LIMIT = 2**15  # pixels
TRUNK_LIMITS: dict[str, tuple[float, float]] = {"depth": (1, 1000), "num_heads": (1, 1024), "embed_dim": (1, 2**16)}
LARGEST = 10**6  # any number in trunk_args


@dataclass
class ModelConfig:
    """Architecture of one multi-task mixture-of-experts ViT.

    Attributes:
        trunk: name of a timm VisionTransformer or Eva model, e.g. vit_small_patch16_224 or vit_small_patch16_dinov3.
        trunk_args: keyword arguments for timm, e.g. {embed_dim: 64, depth: 4}.
        pretrained: load timm's pretrained weights for the trunk (needs network or a local timm cache). Patches and
            positions are resampled to patch_size and image_size; trunk_args under which other weights do not fit,
            such as another depth, are refused.
        weights: file of weights for the dense trunk instead: .safetensors or torch's .pth, in the layout of timm, of
            a model's authors that timm can convert, or of a run folder (model.safetensors). Empty: none.
        normalisation: how pixels enter the network, (pixel / 255 - mean) / std. auto: as the trunk's weights were
            trained; of model.pretrained by timm's configuration of them, of model.weights by the run they are of, else
            by timm's configuration of the trunk; with random weights ImageNet's, as every published M3ViT. imagenet, or
            {mean: [R, G, B], std: [R, G, B]} of images in 0 to 1. The run keeps the numbers.
        image_size: (height, width) in pixels that the position embedding is made for.
        label_set: whose classes and tasks the outputs have: nyud or pascal (or one of a plug-in); auto is that of
            data.layout, or what data.yaml describes.
        tasks: names of the tasks, in the order of their task ids; [all] is those of the data, with label_set auto.
        moe_blocks: which blocks get experts instead of their MLP: "odd" (M3ViT), "none" or a list of indices.
        num_experts: experts in each bank (E).
        top_k: experts per token (K).
        expert_ratio: hidden width of an expert as a multiple of the embedding dimension (M3ViT: 1).
        init: what the model starts from. random or upcycle say it of the experts alone: upcycle makes them of the
            MLPs of the trunk, pretrained or not, so that the model first computes what the dense trunk does (arXiv
            2410.07524); it needs the MLP's width to be a multiple G of an expert's, and num_experts and top_k to be
            multiples of G. run:RUN takes what fits of a trained run, the heads too, and names what does not: tasks,
            classes, image_size, num_experts and router may be others, and a dense run is up-cycled. merge:[RUN_A,
            RUN_B] makes one model of dense runs of one architecture, each of tasks of its own (Branch-Train-MiX, arXiv
            2403.07816): their MLPs become experts, which their tasks start with, and the rest of the trunk their mean.
            m3vit:FILE reads a checkpoint of M3ViT's released code (or a folder of one file a process). These stand
            for pretrained and weights, which then do nothing (but under merge_coefficients).
        merge_coefficients: with init merge:, a number for each run: the shared trunk is the weights that the runs began
            from (model.weights or pretrained), plus each run's difference from them times its number (task arithmetic,
            arXiv 2212.04089). Empty: the mean of the runs. entropy: finds them, a number for each run and block, on the
            training images without their labels, so that predictions of classes and probabilities become decided
            (AdaMerging, arXiv 2310.02575).
        merge_steps: of that search (500 in the paper); each takes a forward and backward pass for every run.
        merge_images: of each of these steps (16 in the paper).
        upcycle_gates: size of an up-cycled router's gates, relative to random ones. The smaller, the closer the model
            starts to the dense trunk; the larger, the longer the parts of a copied MLP stay together in training.
        router: multi (a gate for each task), task_conditioned (one gate that sees a task embedding) or single (one
            gate that does not know the task: all tasks share the whole trunk, which runs once).
        router_noise: standard deviation of the noise on router logits, times num_experts; in training only.
        router_noise_kind: fixed (router_noise alone, as M3ViT's released runs), or learned: a second linear map of the
            token, through softplus, scales the noise (Shazeer et al., arXiv 1701.06538; router_noise 1 is theirs).
        experts_per_task: the experts that a task may use, such as {depth: [0, 1, 2, 3]}; tasks not named use all.
        head: the decoder, kind of the task heads: linear (a linear map of each token: the cheapest, and the one that
            also goes on the FPGA), conv (the same, then a 3x3 convolution, which hides the patches' borders), pup
            (SETR-PUP, as in M3ViT: the dearest), multiscale (features of several blocks for each task) or taskexpert
            (TaskExpert-style: each task's features assembled from experts over several blocks), or the name of one
            that was added.
        head_args: keyword arguments of the decoder: conv takes width, the features of a pixel that its convolution
            reads (default 32); multiscale takes blocks (how many evenly spaced ones it reads, or their indices;
            default 4), width (channels of a task's feature, default 64), head_width (as conv's width) and preliminary
            (whether features before the last are supervised too, default true); taskexpert takes these, experts (of
            each block, default 5), memory (default true), gates (both, token, sample or static) and rank (experts of
            low rank, MLoRE-style: one for all, or one an expert; default: not); linear and pup take none.
        head_stride: pixels of the image per output of a head, before the final bilinear resize; pup heads have half
            their patch size, halved down to 2 or less.
        distillation: stages of the pup heads whose features also train further outputs for each task, made from the
            features of all tasks (M3ViT's TAM): 0 is the one after the first upsampling. In training only: not
            exported, and nothing of it is needed to predict.
        experts: how the experts are executed: sorted, grouped (grouped GEMM), reference (every expert on every token)
            or auto (grouped for bf16 on CUDA, else sorted); all ways give the same result.
    """

    trunk: str = "vit_small_patch16_224"
    trunk_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str = ""
    normalisation: str | dict[str, list[float]] = "auto"
    image_size: tuple[int, int] = (480, 640)
    label_set: str = "nyud"
    tasks: list[str] = field(default_factory=lambda: ["semseg", "depth", "normals", "edge"])
    moe_blocks: str | list[int] = "odd"
    num_experts: int = 16
    top_k: int = 4
    expert_ratio: float = 1.0
    init: str = "random"
    merge_coefficients: list[float] | Literal["entropy"] = field(default_factory=list)
    merge_steps: int = 500
    merge_images: int = 16
    upcycle_gates: float = 1e-6
    router: Literal["multi", "task_conditioned", "single"] = "multi"
    router_noise: float = 0.0
    router_noise_kind: Literal["fixed", "learned"] = "fixed"
    experts_per_task: dict[str, list[int]] = field(default_factory=dict)
    head: str = "linear"
    head_args: dict[str, Any] = field(default_factory=dict)
    head_stride: int = 4
    distillation: list[int] = field(default_factory=list)
    experts: Literal["auto", "sorted", "grouped", "reference"] = "auto"

    @property
    def labels(self) -> LabelSet:
        """The label set, by its name."""
        return LABEL_SETS[self.label_set]

    @property
    def started(self) -> bool:
        """Whether model.init names what all of the model starts from."""
        return self.init not in INIT_WORDS

    def portable(self) -> "ModelConfig":
        """Return it with the names of what its weights were started from, not where that lies on this disk."""
        kind, given = init_sources(self.init)
        names = [PurePath(one).name or one for one in given]
        init = kind if not given else f"{kind}:{INIT_FORMS[kind].format(', '.join(names))}"
        return replace(self, weights=PurePath(self.weights).name, init=init)

    def check(self) -> None:
        """Raise InputError for values that no model can be built from."""
        normalisation.check(self.normalisation)
        check_values("model", self)
        resolve(self.tasks, self.label_set)
        if self.head not in DECODERS:
            raise InputError(not_among("model.head", self.head, tuple(DECODERS)))
        for key, limits in LIMITS.items():
            _check_number(f"model.{key}", getattr(self, key), limits)
        for side in self.image_size:
            _check_number("model.image_size", side, (1, SIDE_LIMIT), f" in {list(self.image_size)}")
        _check_number("model.router_noise", self.router_noise, (0, 1e6))
        self._check_trunk_args()
        check_args(self.head, self.head_args)
        distilled = [name for name, entry in DECODERS.items() if "distillation" in entry.reads]
        if self.distillation and (self.head not in distilled or len(self.tasks) < 2):
            raise InputError(
                f"model.distillation is {self.distillation} with head {self.head} and tasks {', '.join(self.tasks)}: "
                f"it needs {' or '.join(distilled)} heads and two tasks or more; give --model.distillation=[] without"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"model.top_k is {self.top_k}: give 1 to model.num_experts ({self.num_experts})")
        for task, allowed_experts in self.experts_per_task.items():
            valid = {expert for expert in allowed_experts if isinstance(expert, int) and 0 <= expert < self.num_experts}
            if task not in self.tasks or len(valid) != len(allowed_experts) or len(valid) < self.top_k:
                raise InputError(
                    f"model.experts_per_task gives {task} the experts {allowed_experts}: name tasks of the model "
                    f"({', '.join(self.tasks)}), and for each at least top_k ({self.top_k}) different experts, 0 to "
                    f"{self.num_experts - 1}"
                )
        kind, given = init_sources(self.init)
        if kind == "merge" and len({*given}) < max(2, len(given)):
            raise InputError(f"model.init is {self.init!r}: name two runs or more, each once")
        if kind == "merge" and self.merge_coefficients:
            numbers = [] if isinstance(self.merge_coefficients, str) else self.merge_coefficients
            for number in numbers:
                _check_number("model.merge_coefficients", number, (-10, 10), f" in {self.merge_coefficients}")
            if numbers and len(numbers) != len(given):
                raise InputError(
                    f"model.merge_coefficients are {self.merge_coefficients}: give one for each of the {len(given)} "
                    "runs of model.init, or none for their mean"
                )
            if self.pretrained == bool(self.weights):
                raise InputError(
                    f"model.merge_coefficients are {self.merge_coefficients}: they scale what each run learnt beyond "
                    "the weights that all began from; give these, model.weights FILE or model.pretrained"
                )
        if self.experts_per_task and kind in ("upcycle", "merge"):
            raise InputError(
                f"model.init {kind} makes copies of an MLP that every task must be able to reach: leave out "
                "model.experts_per_task, or start at random"
            )
        if self.experts_per_task and self.router == "single":
            raise InputError("model.experts_per_task needs a router that knows the task: multi or task_conditioned")
        if self.pretrained and self.weights and not self.started:
            raise InputError(f"model.weights {self.weights} and model.pretrained exclude each other: give one of them")
        if not 0 < self.upcycle_gates <= 1:
            raise InputError(f"model.upcycle_gates is {self.upcycle_gates}: give a number above 0, at most 1")
        if isinstance(self.moe_blocks, str) and self.moe_blocks not in ("odd", "none"):
            raise InputError(f"model.moe_blocks is {self.moe_blocks!r}: give odd, none or a list of block indices")

    def _check_trunk_args(self) -> None:
        """Raise InputError for arguments that are ours to give, and for numbers that no trunk can have."""
        for name, value in self.trunk_args.items():
            where = f"model.trunk_args.{name}"
            if not isinstance(name, str):
                raise InputError(f"{where}: names of timm's arguments are words")
            if name in OURS:
                raise InputError(f"{where} is {short(value)}: leave it out, {OURS[name]}")
            if name.endswith("_rate"):
                _check_number(where, value, (0, 0.999))
            elif name in TRUNK_LIMITS:
                _check_number(where, value, TRUNK_LIMITS[name], whole=True)
            else:
                for number in _numbers(value):
                    _check_number(where, number, (-LARGEST, LARGEST))

    def moe_indices(self, depth: int) -> list[int]:
        """Return the indices of the blocks with experts, for a trunk of `depth` blocks."""
        if self.moe_blocks == "odd":
            return list(range(1, depth, 2))
        if self.moe_blocks == "none":
            return []
        wrong = [index for index in self.moe_blocks if not isinstance(index, int) or not 0 <= index < depth]
        if wrong:
            raise InputError(f"model.moe_blocks names {wrong}: the trunk has blocks 0 to {depth - 1}")
        return sorted({int(index) for index in self.moe_blocks})


def init_sources(init: str) -> tuple[str, list[str]]:
    """Return the word of model.init, and the folders or files that it names; raise InputError if it is none.

    random, upcycle, run:RUN, ...
    """
    if init in INIT_WORDS:
        return init, []
    kind, _, given = init.partition(":")
    if kind in INIT_FORMS:
        before, after = INIT_FORMS[kind].split("{}")
        given = given.strip()
        if given.startswith(before) and given.endswith(after):
            found = given[len(before) : len(given) - len(after)]
            names = [one.strip() for one in found.split(",")] if before else [found]
            if all(names):
                return kind, names
    forms = [f"{kind}:{form.format(INIT_SHOWN[kind])}" for kind, form in INIT_FORMS.items()]
    raise InputError(not_among("model.init", init, (*INIT_WORDS, *forms)))


def _check_number(key: str, value: Any, limits: tuple[float, float], where: str = "", *, whole: bool = False) -> None:
    """Raise InputError unless a value is a number within limits, and a whole one if it must be."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not limits[0] <= value <= limits[1]:
        what = "a whole number" if whole else "a number"
        raise InputError(f"{key} is {short(value)}{where}: give {what} of {limits[0]:,g} to {limits[1]:,g}")


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in a value of YAML, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
