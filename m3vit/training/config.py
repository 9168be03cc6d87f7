"""Configuration of a run: dataclasses, YAML recipes, dotted overrides. No torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from m3vit.digests import check_sealed
from m3vit.errors import InputError, one_line
from m3vit.files import read_text
from m3vit.label_sets import LABEL_SETS
from m3vit.losses import LOSSES
from m3vit.models.config import ModelConfig
from m3vit.normalisation import recorded
from m3vit.tasks import TASKS
from m3vit.values import check_values, fits, not_among

if TYPE_CHECKING:
    from m3vit.data.sample import FileSplit

MOST = {"threads": 1024, "workers": 1024}
LARGEST = 10**9  # of other whole numbers
# Of a model, for learning rates and freezing (m3vit.training.parts).
PARTS = ("embed", "trunk", "experts", "routers", "heads")
MOST_BUDGETS = 16
GRADIENT_METHODS = ("pcgrad", "mgda", "aligned_mtl")
MAX_YAML_BYTES, MAX_YAML_VALUES = 1 << 20, 100_000  # a configuration has 3 KiB and a hundred values


@dataclass
class DataConfig:
    """Where the data are and how they are loaded.

    Attributes:
        layout: how the data set lies in files: nyud, pascal (or one of a plug-in), or folder: data of your own, which a
            data.yaml describes (m3vit data init). Which release of nyud lies in root is found out from the files.
        root: the data set's folder, the one that holds gt_sets/ (nyud), ImageSets/ (pascal) or data.yaml (folder).
        workers: loader processes; 0 loads in the training process.
        cache: keep decoded samples in memory after the first epoch, as many as 40 % of it holds (workers 0): 6.4 MB for
            a photograph of 480 x 640 with its four labels.
        pipeline: how training images are changed: simple (resize, colour), m3vit (zoom and rotation, resize) or invpt
            (scaling, crop, photometric distortion, padding), both as published.
        flip: mirror half of the training images.
        colour: strength of the random gain and offset of each colour channel; 0 is off; of the pipeline simple.
        on_error: what a missing or unreadable file does, with a line in metrics.jsonl: stop training, or skip it: an
            image is left out, a label makes its image one that is not labelled for that task.
    """

    layout: str = "nyud"
    root: str = ""
    workers: int = 2
    cache: bool = False
    pipeline: Literal["simple", "m3vit", "invpt"] = "simple"
    flip: bool = True
    colour: float = 0.0
    on_error: Literal["stop", "skip"] = "stop"


@dataclass
class TrainConfig:
    """How the model is trained.

    Attributes:
        epochs: passes over the training split.
        batch_size: images per optimiser step, of all processes of a torchrun together: a recipe means the same training
            on any number of them.
        accumulate: parts that a process works through its share of the batch in, to save memory. Losses and gradients
            are those of the whole batch, except that the balance losses are averaged over the parts.
        optimizer: adamw or sgd (with momentum).
        lr: peak learning rate.
        lr_scale: factor on the learning rate of a part, such as {embed: 0.1, trunk: 0.1}; of others it is 1. Parts are
            embed (patches, positions, prefix tokens), trunk (the blocks without their experts and routers), experts,
            routers and heads.
        layer_decay: factor on the learning rate for each block between a parameter and the heads, and the block itself,
            as in BEiT and timm: 0.75 is usual, 1 is off.
        freeze: what is not trained at all: parts, and blocks with all that is in them, such as [embed, blocks.0-6].
        freeze_epochs: what is not trained in the first epochs, and for how many, such as {trunk: 2, blocks.0-6: 4}.
        weight_decay: for adamw, of weights but not biases, norms, positions and prefix tokens; for sgd, of everything
            (as published).
        momentum: of sgd.
        warmup_epochs: epochs of linear warm-up.
        schedule: cosine (towards 1 % of lr) or poly (power 0.9, to 0), per step.
        grad_clip: largest gradient norm; 0 is off.
        ema: decay, each step, of an exponential moving average of the weights, such as 0.999; 0 is off. It is what is
            evaluated and saved as the model; last/state.pt has the raw weights too.
        balance_weight: weight of the routers' importance and load losses (M3ViT: 0.01). Without router noise the load
            counts tokens and has no gradient, as in M3ViT's released runs.
        switch_weight: weight of the Switch/GShard load-balancing loss (Switch: 0.01); instead of balance_weight.
        z_weight: weight of the router z-loss (ST-MoE: 0.001).
        specialise_weight: weight of the mutual information between tasks and experts (Mod-Squad: 0.001 to 0.01), which
            gives tasks experts of their own, so that the others can be pruned at export.
        budgets: passes of each step that take less than the whole model, so that one checkpoint serves any budget of
            `m3vit search` (after arXiv 2308.11744): the first has the smallest budget, the others random ones; with 1,
            the smallest and a random one in turn. 0 trains the whole alone.
        budget_weight: what each smaller pass counts, 0.01 to 100, where the whole model's counts 1: a step's loss is
            their weighted mean.
        budget_top_k: experts per token of the smallest budget; by task and block, budgets have this to model.top_k.
        budget_width: share of the hidden units of experts and dense MLPs that the smallest budget has; by block,
            budgets have four evenly spaced widths, the first units of a whole one's, which are put in the order of
            their importance when passes of less begin.
        budget_skip: dense blocks that the smallest budget leaves out, attention and all, and others may: [2, 4].
        budget_heads: share of the channels of each task's head that the smallest budget has; by task, budgets have four
            evenly spaced numbers, the first channels of all. Of pup heads, which take most of a model's compute.
        budget_tokens: weight of how far the tokens that a smaller budget gives the heads are from the whole model's.
        budget_outputs: the same of its predictions, besides the tasks' weights.
        budget_start: share of the training that trains the whole model alone, before any pass takes less.
        budget_warmup: share of what follows over which both weights rise from 0: what the whole model makes of images
            before it has learned anything is nothing to learn from.
        weighting: how the tasks' losses are weighed. fixed: by task_weights. uncertainty: by learned log-variances that
            start at the fixed weights (Kendall 2018). dwa: fixed weights times dynamic weight averages, temperature 2
            (Liu 2019). pcgrad (Yu 2020), mgda (Sener 2018), aligned_mtl (Senushkin 2023): fixed weights, then the
            tasks' gradients of the parameters they share are combined so; that runs each task by itself, as many
            passes through the trunk as there are tasks.
        tasks_per_step: train on that many tasks a step, drawn at random, with losses scaled so that their expectation
            stays that of all; 0 is all tasks.
        task_weights: weight of each task's loss, where it differs from the task table (M3ViT's weights).
        edge_positive_weight: weight of edge pixels in the balanced BCE, 1 minus it for the others (M3ViT: 0.95).
        losses: loss of a task, where it is not its kind's, by the name that a plug-in gave it (docs/plugins.md).
        native_losses: tasks whose loss is taken at the head's own resolution, with subsampled labels: several
            times cheaper than at the image's.
        seed: of weights, data order, augmentation and noise.
        threads: CPU threads of torch; 0 leaves torch's choice, within a container's quota. Bit-equal repeats need
            equal threads.
        accelerator: auto, cpu, cuda or mps; one device, or one for each process of a torchrun.
        strategy: what the processes of a torchrun share. ddp: each holds the whole model. fsdp: each keeps a share of
            weights, gradients and optimiser state, and fetches the rest when it is needed: less memory, more traffic,
            the same result. One process has nothing to share.
        precision: 32-true, bf16-mixed or 16-mixed (Lightning Fabric's words).
        checkpoint_activations: keep only the input of each of the trunk's blocks and compute the rest again for the
            gradient: less memory, more time, the same result.
        checkpoint_steps: steps between checkpoints to resume from; 0 is once an epoch.
        eval_epochs: epochs between evaluations on the val split; 0 is never. The last epoch is always evaluated.
        best: which evaluation's weights best/ keeps: the best headline metric of a task, by its name, or mean: the mean
            over tasks of the headline metric's change since the first evaluation, as a share of the larger of the two.
        log_steps: steps between lines of metrics.jsonl.
        loggers: where the values of metrics.jsonl go as well: tensorboard, wandb (Weights & Biases), mlflow.
    """

    epochs: int = 100
    batch_size: int = 8
    accumulate: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_scale: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    freeze: list[str] = field(default_factory=list)
    freeze_epochs: dict[str, int] = field(default_factory=dict)
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup_epochs: float = 0.0
    schedule: Literal["cosine", "poly"] = "cosine"
    grad_clip: float = 0.0
    ema: float = 0.0
    balance_weight: float = 0.01
    switch_weight: float = 0.0
    z_weight: float = 0.0
    specialise_weight: float = 0.0
    budgets: int = 0
    budget_weight: float = 1.0
    budget_top_k: int = 1
    budget_width: float = 0.25
    budget_skip: list[int] = field(default_factory=list)
    budget_heads: float = 1.0
    budget_tokens: float = 1.0
    budget_outputs: float = 0.1
    budget_start: float = 0.4
    budget_warmup: float = 0.5
    weighting: Literal["fixed", "uncertainty", "dwa", "pcgrad", "mgda", "aligned_mtl"] = "fixed"
    tasks_per_step: int = 0
    task_weights: dict[str, float] = field(default_factory=dict)
    edge_positive_weight: float = 0.95
    losses: dict[str, str] = field(default_factory=dict)
    native_losses: list[str] = field(default_factory=list)
    seed: int = 0
    threads: int = 0
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    checkpoint_activations: bool = False
    checkpoint_steps: int = 0
    eval_epochs: int = 0
    best: str = "mean"
    log_steps: int = 10
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])

    def routing_weights(self) -> dict[str, float]:
        """Return the weight of each routing loss that has one, by its name in metrics.jsonl."""
        weights = {
            "balance": self.balance_weight,
            "switch": self.switch_weight,
            "z": self.z_weight,
            "specialise": self.specialise_weight,
        }
        return {name: weight for name, weight in weights.items() if weight}


@dataclass
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    plugins: list[str] = field(default_factory=list)  # as given to --plugin

    def __post_init__(self) -> None:
        if self.model.label_set == "auto":
            self._take_labels()

    def _take_labels(self) -> None:
        """Fill in what the data say of themselves: the label set, its tasks for "all", and special mean and std."""
        layout, root = self._layout(), self.data.root
        label_set = layout.label_set_of(root)
        tasks = list(LABEL_SETS[label_set].tasks) if self.model.tasks == ["all"] else self.model.tasks
        normalisation = self.model.normalisation
        if normalisation == "auto" and (special := layout.normalisation_of(root)):
            normalisation = special.plain()
        self.model = replace(self.model, label_set=label_set, tasks=tasks, normalisation=normalisation)

    def _layout(self) -> "type[FileSplit]":
        from m3vit.data.opening import layout_named  # with numpy and Pillow, which --help needs not

        return layout_named(self.data.layout)

    def check(self) -> None:
        """Raise InputError for values that cannot work, before anything slow starts."""
        self.model.check()
        train = self.train
        check_values("data", self.data)
        check_values("train", train)
        if train.best not in (choices := ("mean", *self.model.tasks)):
            raise InputError(not_among("train.best", train.best, choices))
        layout = self._layout()
        layout.check_fits(self.model.labels, self.model.tasks, self.data.root)
        if self.data.pipeline == "m3vit" and layout.m3vit_ranges is None:
            raise InputError(
                "data.pipeline is m3vit, whose zooms and turns are those published for a data set, and data.layout "
                f"{layout.name} has no m3vit_ranges: give simple or invpt"
            )
        if self.data.colour and self.data.pipeline != "simple":
            raise InputError(
                f"data.colour {self.data.colour} is of the pipeline simple: give 0 with {self.data.pipeline}"
            )
        for key in ("epochs", "batch_size", "accumulate", "lr", "log_steps"):
            if not 0 < getattr(train, key) < math.inf:
                raise InputError(f"train.{key} is {getattr(train, key)}: give a positive number")
        limits = (
            "weight_decay momentum warmup_epochs grad_clip balance_weight switch_weight z_weight specialise_weight "
            "seed threads checkpoint_steps eval_epochs tasks_per_step budgets budget_tokens budget_outputs"
        )
        values = {f"train.{key}": getattr(train, key) for key in limits.split()}
        values |= {f"train.task_weights.{task}": weight for task, weight in train.task_weights.items()}
        values |= {"data.workers": self.data.workers, "data.colour": self.data.colour}
        for key, number in values.items():
            if not 0 <= number < math.inf:
                raise InputError(f"{key} is {number}: give zero or a positive number")
        for section, settings in (("train", train), ("data", self.data)):
            for key, number in vars(settings).items():
                most = MOST.get(key, LARGEST)
                if key != "seed" and isinstance(number, int) and number > most:
                    raise InputError(f"{section}.{key} is {number}: give at most {most:,}")
        if train.seed >= 2**32:
            raise InputError(f"train.seed is {train.seed}: give a whole number below 2^32 ({2**32})")
        if train.momentum >= 1:
            raise InputError(f"train.momentum is {train.momentum}: give a number below 1, such as 0.9")
        if not 0 < train.edge_positive_weight < 1:
            raise InputError(
                f"train.edge_positive_weight is {train.edge_positive_weight}: give a number between 0 and 1"
            )
        if not 0 <= train.ema < 1:
            raise InputError(f"train.ema is {train.ema}: give a decay below 1, such as 0.999, or 0 for none")
        if train.accumulate > train.batch_size:
            raise InputError(
                f"train.accumulate is {train.accumulate}: a batch of {train.batch_size} images has no more parts"
            )
        if train.tasks_per_step > len(self.model.tasks):
            raise InputError(
                f"train.tasks_per_step is {train.tasks_per_step}: the model has {len(self.model.tasks)} tasks; 0 is all"
            )
        if self.model.router_noise_kind == "learned" and not self.model.router_noise:
            raise InputError(
                "model.router_noise_kind learned scales model.router_noise, which is 0: give --model.router_noise=1 "
                "(Shazeer et al.), or --model.router_noise_kind=fixed"
            )
        some = 0 < train.tasks_per_step < len(self.model.tasks)
        if self.model.distillation and (some or train.weighting in GRADIENT_METHODS):
            what = f"tasks_per_step {train.tasks_per_step}" if some else f"weighting {train.weighting}"
            raise InputError(
                f"model.distillation {self.model.distillation} needs the features of all tasks at once, and "
                f"train.{what} never has them: give --model.distillation=[], or all tasks in a pass"
            )
        if train.specialise_weight:
            self._check_specialise()
        if train.budgets > MOST_BUDGETS:
            raise InputError(f"train.budgets is {train.budgets}: give at most {MOST_BUDGETS} passes a step, or 0")
        if not 0 < train.budget_width <= 1:
            raise InputError(f"train.budget_width is {train.budget_width}: give a share above 0, up to 1 (all units)")
        if not 0 < train.budget_heads <= 1:
            raise InputError(
                f"train.budget_heads is {train.budget_heads}: give a share above 0, up to 1 (all channels)"
            )
        if not 0 <= train.budget_start < 1:
            raise InputError(f"train.budget_start is {train.budget_start}: give a share of the training, 0 to below 1")
        if not 0 <= train.budget_warmup <= 1:
            raise InputError(f"train.budget_warmup is {train.budget_warmup}: give a share of the training, 0 to 1")
        if not 0.01 <= train.budget_weight <= 100:
            raise InputError(f"train.budget_weight is {train.budget_weight}: give 0.01 to 100")
        if train.budget_top_k < 1 or (train.budgets and train.budget_top_k > self.model.top_k):
            raise InputError(
                f"train.budget_top_k is {train.budget_top_k}: give 1 to model.top_k ({self.model.top_k}), the experts "
                "of the whole model"
            )
        if train.weighting in GRADIENT_METHODS and train.precision == "16-mixed":
            raise InputError(
                f"train.weighting {train.weighting} compares gradients, which 16-mixed scales: give "
                "train.precision bf16-mixed or 32-true"
            )
        if train.strategy == "fsdp" and (train.weighting in GRADIENT_METHODS or train.precision == "16-mixed"):
            what = train.precision if train.precision == "16-mixed" else f"train.weighting {train.weighting}"
            raise InputError(
                f"train.strategy fsdp does not go with {what}, which needs every gradient whole: give ddp, or "
                "train.precision bf16-mixed or 32-true and another weighting"
            )
        self._check_parts()
        # Tasks that exist but are not this model's may stay: a recipe's values survive --model.tasks=[depth].
        for task, name in train.losses.items():
            if name not in LOSSES:
                raise InputError(
                    not_among(f"train.losses.{task}", name, tuple(LOSSES) or ("none (no plug-in has any)",))
                )
        for key in ("task_weights", "native_losses", "losses"):
            unknown = [task for task in getattr(train, key) if task not in TASKS]
            if unknown:
                raise InputError(f"train.{key} names {', '.join(unknown)}: choose from {', '.join(TASKS)}")
        if self.data.cache and self.data.workers:
            raise InputError(
                f"data.cache needs data.workers 0, got {self.data.workers}: workers have memories of their own"
            )

    def _check_specialise(self) -> None:
        """Raise InputError where the mutual information of tasks and experts would be 0, whatever is learned."""
        train = self.train
        reasons = (
            ("one task", len(self.model.tasks) == 1),
            ("the router single, the same for all tasks", self.model.router == "single"),
            ("train.tasks_per_step 1", train.tasks_per_step == 1),
            (f"train.weighting {train.weighting}, which runs each task alone", train.weighting in GRADIENT_METHODS),
        )
        for reason, found in reasons:
            if found:
                raise InputError(
                    f"train.specialise_weight is {train.specialise_weight}, but the mutual information of tasks and "
                    f"experts is 0 with {reason}: give --train.specialise_weight=0, or change that"
                )

    def _check_parts(self) -> None:
        """Raise InputError for parts that no model has, and for rates and epochs that mean nothing."""
        train = self.train
        if unknown := [part for part in train.lr_scale if part not in PARTS]:
            raise InputError(f"train.lr_scale names {', '.join(unknown)}: choose from {', '.join(PARTS)}")
        for part, scale in train.lr_scale.items():
            if not 0 < scale < math.inf:
                raise InputError(
                    f"train.lr_scale.{part} is {scale}: give a positive number; train.freeze is for what is not trained"
                )
        if not 0 < train.layer_decay <= 1:
            raise InputError(
                f"train.layer_decay is {train.layer_decay}: give a number above 0, such as 0.75, or 1 for none"
            )
        for key, entries in (("freeze", train.freeze), ("freeze_epochs", train.freeze_epochs)):
            unknown = [entry for entry in entries if entry not in PARTS and not block_range(entry)]
            if unknown:
                raise InputError(
                    f"train.{key} names {', '.join(unknown)}: choose from {', '.join(PARTS)}, and blocks.0-6 or "
                    "blocks.3 for whole blocks"
                )
        if both := [entry for entry in train.freeze_epochs if entry in train.freeze]:
            raise InputError(
                f"train.freeze and train.freeze_epochs both name {', '.join(both)}: give it in one of them"
            )
        for entry, epochs in train.freeze_epochs.items():
            if not 0 < epochs < train.epochs:
                few = f"give 1 to {train.epochs - 1}, fewer than train.epochs" if train.epochs > 1 else "of 1 in all"
                raise InputError(
                    f"train.freeze_epochs gives {entry} {epochs} epochs: {few}; train.freeze is for all of them"
                )
        if train.freeze_epochs and train.strategy == "fsdp":
            raise InputError(
                "train.strategy fsdp does not go with train.freeze_epochs, since what is sharded is trained or not "
                "from the start: give ddp, or train.freeze"
            )

    def to_yaml(self) -> str:
        """Return the whole configuration, fully resolved, as YAML."""
        return yaml.safe_dump(plain(asdict(self)), sort_keys=False)


def block_range(entry: str) -> range:
    """Return the indices of an entry like blocks.0-6 or blocks.3, an empty range for any other text."""
    found = re.fullmatch(r"blocks\.(\d{1,4})(?:-(\d{1,4}))?", entry)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


def plain(value: Any) -> Any:
    """Turn tuples into lists, at any depth: what YAML and JSON hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.name[:-5] for path in files("m3vit.recipes").iterdir() if path.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe, or raise InputError listing the recipes there are."""
    if name not in recipe_names():
        raise InputError(
            f"unknown recipe {name!r}: choose from {', '.join(recipe_names())}; a file of your own goes on top of one, "
            "with --config FILE"
        )
    return Path(str(files("m3vit.recipes") / f"{name}.yaml"))


def yaml_text(path: Path, what: str) -> str:
    """Return a configuration's text, or raise InputError naming `what` it is part of and how to get it.

    It is small, and so is what it stands for: aliases of aliases can unfold to more than any memory.
    """
    text = read_text(path, what, MAX_YAML_BYTES)
    sizes: dict[int, int] = {}

    def unfolded(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_YAML_VALUES  # of a node that holds itself
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
            sizes[id(node)] = 1 + sum(map(unfolded, parts))
        return sizes[id(node)]

    try:
        if (root := yaml.compose(text, Loader=yaml.SafeLoader)) is not None and unfolded(root) > MAX_YAML_VALUES:
            raise InputError(f"{path} unfolds to more than {MAX_YAML_VALUES} values by its aliases: write them out")
    except (yaml.YAMLError, RecursionError):
        pass  # whoever reads it says so, in its own words
    return text


SECTIONS = ("model", "data", "train")  # of a configuration


def read_config(path: Path) -> Config:
    """Read a resolved configuration, whoever wrote it."""
    try:
        values = yaml.safe_load(yaml_text(path, "not a run folder (make one with m3vit train or m3vit init)"))
        if not isinstance(values, dict) or not all(isinstance(values.get(key), dict) for key in SECTIONS):
            raise TypeError(f"it is empty or lacks one of the mappings {', '.join(SECTIONS)}")
        # Of runs from before there was a choice.
        values["model"].setdefault("normalisation", recorded(None, str(path)).plain())
        if values["train"].get("budgets"):
            values["train"].setdefault("budget_start", 0.0)
        if "budget_warmup" not in values["train"]:
            if values["train"].get("budgets"):
                values["train"]["budget_warmup"] = 0.0
            else:
                values["train"].pop("budget_outputs", None)  # without effect, and by default another number then
        sections = ModelConfig(**values["model"]), DataConfig(**values["data"]), TrainConfig(**values["train"])
        config = Config(*sections, values.get("plugins", []))
        if not fits(config.plugins, list[str]):
            raise TypeError(f"plugins is {str(config.plugins)[:80]!r}, expected list[str]")
    except InputError:
        raise
    # ValueError: what looks like a date or a number and is none; UnicodeDecodeError is one.
    except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        words = one_line(error, 300)
        raise InputError(f"{path} is not a configuration of this version: {words}") from None
    try:
        for name in SECTIONS:
            check_values(name, getattr(config, name))
    except InputError as error:
        raise InputError(f"{path} is not a configuration of this version: {error}") from None
    return config


def read_run_config(folder: Path) -> Config:
    """Read a run folder's config.yaml, or raise InputError if it is not as training wrote it."""
    path = folder / "config.yaml"
    if path.is_file():
        check_sealed(path, "put it back; or delete its last line, the digest, to have the edit taken as it is")
    return read_config(path)


def differences(a: Config, b: Config, ignore: Sequence[str] = ()) -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    left, right = plain(asdict(a)), plain(asdict(b))
    keys = [f"{section}.{key}" for section in SECTIONS for key in left[section]]
    return [key for key in keys if key not in ignore and _get(left, key) != _get(right, key)]


def _get(tree: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return tree[section][name]
