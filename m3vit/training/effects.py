"""Settings that cannot act: given on the command line they are refused; a recipe may hold them. No torch.

A recipe's values survive a change beside them (its momentum, --train.optimizer=adamw). What somebody gives for this
very run is meant to do something.
"""

from collections.abc import Sequence

from m3vit.errors import InputError
from m3vit.models.decoders import DECODERS
from m3vit.tasks import TASKS
from m3vit.training.config import GRADIENT_METHODS, Config

OF_EXPERTS = (
    "model.num_experts",
    "model.top_k",
    "model.expert_ratio",
    "model.init",
    "model.upcycle_gates",
    "model.router",
    "model.router_noise",
    "model.experts_per_task",
    "model.experts",
    "train.balance_weight",
    "train.switch_weight",
    "train.z_weight",
    "train.specialise_weight",
    "train.budget_top_k",
)
OF_BUDGETS = (
    "budget_weight", "budget_top_k", "budget_width", "budget_skip", "budget_heads", "budget_tokens", "budget_outputs",
    "budget_start", "budget_warmup",
)  # fmt: skip
COUNTED = (  # what `m3vit profile` looks at
    "model.", "data.layout", "train.budgets", "train.budget_top_k", "train.budget_width", "train.budget_skip",
    "train.budget_heads", "train.budget_start",
)  # fmt: skip
WEIGHTS = ("model.pretrained", "model.weights")  # but for these


def given_keys(words: Sequence[str]) -> list[str]:
    """Return the dotted keys that a command line gives: `--train.lr=1`, `--train.lr 1`, `--model.tasks+=edge`."""
    names = [word[2:].partition("=")[0].rstrip("+") for word in words if word.startswith("--")]
    return [name for name in names if name.partition(".")[0] in ("model", "data", "train") and "." in name]


def without_effect(config: Config) -> dict[str, str]:
    """Return the keys that cannot act in this configuration, and why; a key stands for all below it."""
    model, train, found = config.model, config.train, {}
    if "head_stride" not in DECODERS[model.head].reads:
        found["model.head_stride"] = f"{model.head} heads have a stride of their own"
    if model.init != "upcycle" and not model.init.startswith("run:"):
        found["model.upcycle_gates"] = f"model.init is {model.init}, not upcycle"
    if not model.init.startswith("merge:"):
        found["model.merge_coefficients"] = f"model.init is {model.init}, not merge:"
    if model.merge_coefficients != "entropy":
        why = "model.merge_coefficients are not found (entropy)"
        found |= dict.fromkeys(("model.merge_steps", "model.merge_images"), why)
    if model.started and not (model.init.startswith("merge:") and model.merge_coefficients):
        found |= dict.fromkeys(WEIGHTS, f"model.init is {model.init}, which all weights come from")
    if model.moe_blocks in ("none", []):
        reason = "model.moe_blocks leaves no block with experts"
        found |= {key: reason for key in OF_EXPERTS if key != "model.init" or not model.started}
        for key in ("lr_scale", "freeze", "freeze_epochs"):
            found |= {f"train.{key}.{part}": reason for part in getattr(train, key) if part in ("experts", "routers")}
    if not train.budgets:
        found |= {f"train.{key}": "train.budgets is 0, the whole model alone is trained" for key in OF_BUDGETS}
    elif not train.budget_tokens and not train.budget_outputs:
        found["train.budget_warmup"] = "train.budget_tokens and train.budget_outputs are 0, nothing has to rise"
    if train.optimizer != "sgd":
        found["train.momentum"] = f"train.optimizer is {train.optimizer}, not sgd"
    for task in TASKS.values():
        if task.name not in model.tasks or task.name in train.losses:
            why = "is not among model.tasks" if task.name not in model.tasks else "has another loss (train.losses)"
            settings = [value for value in task.loss_options.values() if isinstance(value, str)]
            found |= {f"train.{name}": f"{task.name} {why}" for name in settings}
    if len(model.tasks) == 1 and train.weighting in ("dwa", *GRADIENT_METHODS):
        found["train.weighting"] = f"{train.weighting} weighs tasks against each other, and model.tasks has one"
    found |= {f"train.lr_scale.{part}": f"train.freeze has {part}" for part in train.lr_scale if part in train.freeze}
    if train.layer_decay < 1 and {"embed", "trunk", "experts", "routers"} <= {*train.freeze}:
        found["train.layer_decay"] = "train.freeze has everything but the heads"
    if "routers" in train.freeze:
        found["model.router_noise"] = "train.freeze has routers, which then run without noise"
    if not train.eval_epochs or train.eval_epochs >= train.epochs:
        found["train.best"] = "only the last epoch is evaluated (train.eval_epochs)"
    for key in ("task_weights", "native_losses", "losses"):
        tasks = getattr(train, key)
        absent = [task for task in tasks if task not in model.tasks]
        found |= {f"train.{key}.{task}": f"{task} is not among model.tasks" for task in absent}
    return found


def describes_itself(layout: str) -> bool:
    """Return whether the files of a layout say themselves which tasks and classes there are, as a data.yaml does."""
    from m3vit.data.opening import layout_named  # with numpy and Pillow, which --help needs not
    from m3vit.data.sample import FileSplit

    own, default = (getattr(one.label_set_of, "__func__", None) for one in (layout_named(layout), FileSplit))
    return own is not default


def check_given(config: Config, words: Sequence[str], command: str = "train") -> None:
    """Raise InputError if a key on the command line cannot act; one that is switched off (0, empty) may be given."""
    dead = without_effect(config)
    for key in given_keys(words):
        section, name, *_ = key.split(".")
        counted = key.startswith(COUNTED) and key not in WEIGHTS
        if command == "profile" and not counted and not (key == "data.root" and describes_itself(config.data.layout)):
            raise InputError(f"--{key} changes nothing that is counted: leave it out")
        within = next((reason for other, reason in dead.items() if other.startswith(f"{key}.")), None)  # of a mapping
        reason = dead.get(key) or dead.get(f"{section}.{name}") or within
        if reason and getattr(getattr(config, section), name):
            raise InputError(f"--{key} would have no effect ({reason}): leave it out, or change that")
