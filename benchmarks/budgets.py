"""One checkpoint for any budget beside models trained for one each: on rendered scenes, or on photographs, small.

    python benchmarks/budgets.py --out runs/budgets [--epochs 40] [--seeds 3] [--jobs 1] [--json FILE] [--plot FILE]
    python benchmarks/budgets.py --out runs/nyud --data ROOT --weights FILE --epochs 6 --seeds 1 [--jobs 1] ...

Nothing but public commands; recipe synthetic-tiny with linear heads and six blocks, two of them with experts. By seed,
one model is trained for budgets (train.budgets), and one plainly for each of four budgets, made as small as the budget
makes the other: hidden units of experts and MLPs from all to a quarter, one expert per token in the two smaller ones,
of which the larger lacks two dense blocks and the smallest all four.

With --data (NYUD-v2 in NYUD_MT's layout) and --weights (of timm's vit_small_patch14_dinov2) it is recipe nyud-vits14 at
112x154 without its edges, five of ten dense blocks left out by the smallest. A separate model starts from as much of
the weights as it has: the hidden units that matter most on 8 training images, as train.budgets orders them.

Four tables, and a picture of the first:

- metric against MACs: the separate models, the one checkpoint under the very same budgets, and under those that
  `m3vit search` finds for as many MACs. "loss" is the mean over tasks of what the headline metric loses on the separate
  model's, in percent.
- latency: of the first seed's ONNX packages, all tasks in turn, of one image on one thread: medians of rounds in which
  the separate packages and the one package's budgets take turns. For an idle machine.
- hypervolume: of what the checkpoint reaches under all budgets found with all preferences, in as many dimensions as
  there are tasks, each metric relative to the largest separate model's (1 is as good, reference point 0); beside it
  that of the separate models.
- control: for each task, the rank correlation (Spearman) of its preference, from 0 to 8 with the others at 1, and its
  metric (turned so that better is more), at one share of the MACs.

What is there is not done again, so an interrupted run goes on. MACs are of all tasks' graphs. Rendered scenes say
nothing about photographs.
"""

import json
import os
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _bench import arguments, machine, medians, one_of_each, save, seconds
from quality import run  # beside this file
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from m3vit.commands.training import config_from
from m3vit.data.loading import unlabelled
from m3vit.data.opening import open_split
from m3vit.evaluation.scoring import read
from m3vit.export.runtime import Package
from m3vit.label_sets import LABEL_SETS
from m3vit.models.budget import FULL, Budget
from m3vit.models.budget_file import BUDGETS, write_budget
from m3vit.models.initialise import new_model
from m3vit.models.space import space_of
from m3vit.profiling import graph_macs
from m3vit.run_folder import load_run
from m3vit.tasks import TASKS
from m3vit.training.ordering import ORDER_IMAGES, importance


class Shape(NamedTuple):
    """How small a separate model is: the share of the hidden units, experts per token, and which blocks it lacks."""

    width: float
    top_k: int
    without: tuple[int, ...] = ()


class Setting(NamedTuple):
    """What is trained: a recipe, keys of it, and its trunk; ratios are of hidden units to channels."""

    recipe: str
    tasks: list[str]
    keys: list[str]
    depth: int
    with_experts: tuple[int, ...]
    trunk: dict[str, Any]
    mlp_ratio: float
    expert_ratio: float
    shapes: dict[str, Shape]
    taps: tuple[int, ...] = ()  # blocks that heads read

    def of(self, shape: Shape) -> list[str]:
        """Return the keys of a model of this shape: its blocks are numbered anew."""
        blocks = [block for block in range(self.depth) if block not in shape.without]
        trunk = self.trunk | {"depth": len(blocks), "mlp_ratio": self.mlp_ratio * shape.width}
        keys = [f"--model.trunk_args={json.dumps(trunk)}", f"--model.top_k={shape.top_k}"]
        keys += [f"--model.moe_blocks={[blocks.index(block) for block in self.with_experts]}"]
        keys += [f"--model.expert_ratio={self.expert_ratio * shape.width}"]
        return keys + [f"--model.head_args.blocks={[blocks.index(tap) for tap in self.taps]}"] * bool(self.taps)


SCENES = Setting(
    "synthetic-tiny",
    LABEL_SETS["nyud"].tasks,
    ["--model.head=linear", "--train.eval_epochs=0"],
    depth=6,
    with_experts=(2, 5),
    trunk={"patch_size": 8, "embed_dim": 64, "num_heads": 4, "class_token": False, "global_pool": ""},
    mlp_ratio=4.0,
    expert_ratio=2.0,
    shapes={
        "whole": Shape(1.0, 2),
        "large": Shape(0.75, 2),
        "middle": Shape(0.5, 1, (1, 4)),
        "small": Shape(0.25, 1, (0, 1, 3, 4)),  # all dense blocks
    },
)
PHOTOGRAPHS = Setting(
    "nyud-vits14",
    ["semseg", "depth", "normals"],
    [
        *("--model.image_size=[112, 154]", "--model.tasks=[semseg, depth, normals]", "--train.native_losses=[]"),
        *("--model.head_stride=2", "--train.freeze=[embed]", "--train.freeze_epochs.trunk=1", "--train.eval_epochs=0"),
        *("--model.num_experts=8", "--train.precision=32-true"),
    ],
    depth=12,
    with_experts=(10, 11),
    trunk={},
    mlp_ratio=4.0,
    expert_ratio=4.0,  # of parts of an MLP, as the recipe's, a token needs all
    shapes={
        "whole": Shape(1.0, 2),
        "large": Shape(0.75, 2),
        "middle": Shape(0.5, 1, (2, 6)),
        "small": Shape(0.25, 1, (0, 2, 4, 6, 8)),
    },
    taps=(3, 5, 7, 9, 11),
)
WAYS = ("separate", "same", "searched")
PREFERENCES = (0.0, 0.5, 2.0, 8.0)
ROUNDS = 30  # of which latencies are the medians


def hypervolume(points: list[list[float]]) -> float:
    """Return the volume that points dominate above 0, all larger being better: sliced along the last dimension."""
    points = [point for point in points if min(point) > 0]
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    heights = sorted({point[-1] for point in points})
    volume, below = 0.0, 0.0
    for height in heights:
        volume += (height - below) * hypervolume([point[:-1] for point in points if point[-1] >= height])
        below = height
    return volume


def scores(folder: Path) -> dict[str, float]:
    """Return the headline metric of each task."""
    _, result = read(folder, "A")
    return {task: values["torch"][TASKS[task].metric] for task, values in result["tasks"].items()}


def relative(values: dict[str, float], reference: dict[str, float]) -> list[float]:
    """Return each task's metric relative to a reference, larger being better: 1 is as good."""
    return [
        values[task] / reference[task] if TASKS[task].higher_is_better else reference[task] / values[task]
        for task in reference
    ]


def loss(values: dict[str, float], reference: dict[str, float]) -> float:
    """Return the mean over tasks of what is lost on a reference, in percent."""
    changes = [(values[task] - reference[task]) / abs(reference[task]) for task in reference]
    return 100 * statistics.mean(
        -change if TASKS[task].higher_is_better else change for task, change in zip(reference, changes, strict=True)
    )


class Seed:
    """The models and budgets of one seed."""

    def __init__(self, args: Any, seed: int) -> None:
        self.args, self.seed, self.folder = args, seed, args.out / f"seed-{seed}"
        self.setting, self.one = PHOTOGRAPHS if args.data else SCENES, self.folder / "one"
        self.folder.mkdir(parents=True, exist_ok=True)

    def train(self, name: str) -> None:
        """Train and score a model: "one", for budgets, or a separate one of that shape."""
        folder = self.folder / name
        if (folder / "eval.json").exists():
            return
        setting, shape = self.setting, self.setting.shapes["whole" if name == "one" else name]
        keys = [*setting.keys, f"--train.epochs={self.args.epochs}", f"--train.seed={self.seed}", "--train.threads=1"]
        keys += [f"--data.root={self.args.data or self.args.out / 'data'}", *setting.of(shape)]
        if self.args.weights:
            keys += [f"--model.weights={self.weights(shape)}"]
        if name == "one":
            keys += [f"--train.budgets={self.args.budgets}", "--train.budget_width=0.25"]
            keys += [f"--train.budget_skip={list(setting.shapes['small'].without)}"]
            keys += [f"--{key}" for key in self.args.one]
        run("train", setting.recipe, *keys, "--out", folder, "--resume")
        self.score(folder)

    def score(self, *words: object) -> None:
        """Evaluate a run, edges by one process, as other models may be in training."""
        run("eval", *words, *(["--workers", 1] if "edge" in self.setting.tasks else []))

    def weights(self, shape: Shape) -> Path:
        """Return the weights that a model of this shape starts from: of its blocks, the first units in order."""
        if shape.width == 1 and not shape.without:
            return self.args.weights
        file = self.folder / f"weights-{shape.width:g}.safetensors"
        if file.exists():
            return file
        setting, given = self.setting, load_file(self.args.weights)
        keys = [*setting.keys, f"--data.root={self.args.data}", f"--model.weights={self.args.weights}"]
        keys += ["--model.moe_blocks=none", "--out", str(file)]
        config, _ = config_from("train", [setting.recipe, *keys])
        torch.manual_seed(self.seed)
        model, size = new_model(config.model), (config.model.image_size[0], config.model.image_size[1])
        split = open_split(config.data.layout, config.data.root, "train", setting.tasks)
        matters = importance(model, next(unlabelled(split, size, model.normalisation, ORDER_IMAGES, self.seed)))
        found = {name: tensor for name, tensor in given.items() if not name.startswith("blocks.")}
        for place, block in enumerate(block for block in range(setting.depth) if block not in shape.without):
            order = matters[block].argsort(descending=True)[: round(shape.width * len(matters[block]))]
            of_block = {
                name.removeprefix(f"blocks.{block}."): given[name]
                for name in given
                if name.startswith(f"blocks.{block}.")
            }
            for name, tensor in of_block.items():
                if name.startswith("mlp.fc1."):
                    tensor = tensor[order]
                elif name == "mlp.fc2.weight":
                    tensor = tensor[:, order]
                found[f"blocks.{place}.{name}"] = tensor.contiguous()
        save_file(found, file)
        return file

    def under(self, file: Path) -> dict[str, float]:
        """Return what the one checkpoint scores under a budget."""
        into = self.one / BUDGETS / file.stem
        if not (into / "eval.json").exists():
            self.score(self.one, "--budget", file)
        return scores(into)

    def budgets(self) -> list[str]:
        """Return the names of all budgets that are looked at, in the form that `file` takes."""
        wanted = [f"{way}-{name}" for name in self.setting.shapes for way in WAYS[1:]]
        return wanted + [f"prefer-{task}-{weight:g}" for task in self.setting.tasks for weight in PREFERENCES]

    def file(self, name: str) -> Path:
        """Return the file of a budget, which is made if it is not there: same-SHAPE, searched-SHAPE (for as many MACs),
        or prefer-TASK-WEIGHT (searched for, with the MACs of the shape "middle")."""
        file = self.folder / f"{name}.json"
        if file.exists():
            return file
        way, of, *weight = name.split("-")
        if way == "same":
            write_budget(file, self.same(of), {})
        else:
            share = min(1.0, self.share("middle" if weight else of) * (1 + 1e-6))
            prefer = ["--prefer", f"{of}={weight[0]}"] if weight else []
            run("search", self.one, "--budget", share, *prefer, "--images", self.args.images, "--out", file)
        return file

    def same(self, name: str) -> Budget:
        """Return the budget that makes the checkpoint as small as a separate model."""
        found = load_run(self.one)
        space, shape = space_of(found.model, found.config.train), self.setting.shapes[name]
        widths = {block: round(shape.width * units) for block, units in found.model.hidden_widths().items()}
        return replace(space.budget(shape.top_k, 0), width=widths | dict.fromkeys(shape.without, 0))

    def share(self, name: str) -> float:
        """Return the MACs of a separate model as a share of the whole model's."""
        return self.macs(name) / self.macs("one")

    def macs(self, name: str) -> int:
        """Return the MACs of a model of all tasks' graphs."""
        config = load_run(self.folder / name).config.model
        size = (config.image_size[0], config.image_size[1])
        return sum(graph_macs(config, task, size, FULL) for task in self.setting.tasks)

    def latency(self) -> dict[str, dict[str, float]]:
        """Return the milliseconds of all tasks' graphs for one image, by shape: of the separate model, of the one."""
        files = {name: self.file(f"same-{name}") for name in self.setting.shapes}
        folders = {name: self.folder / f"package-{name}" for name in ("one", *files)}
        for name, folder in folders.items():
            if not folder.exists():
                budgets = ["--budget", ",".join(map(str, files.values()))] if name == "one" else []
                run("export", "onnx", self.folder / name, *budgets, "--out", folder)
        one = Package.load(folders["one"], threads=1)
        found = {("separate", name): Package.load(folders[name], threads=1) for name in files}
        found |= {("same", name): one.of(file.stem) for name, file in files.items()}
        image = np.zeros((1, 3, *load_run(self.one).config.model.image_size), np.float32)

        def once(package: Package) -> float:
            return seconds(lambda: [package.logits(image, task) for task in self.setting.tasks])

        ways = {key: partial(once, package) for key, package in found.items()}
        shuffle = random.Random(0)
        rounds = [one_of_each(ways, shuffle) for _ in range(ROUNDS + 1)][1:]  # the first warms up
        times = medians(rounds)
        return {name: {way: 1000 * times[way, name] for way in ("separate", "same")} for name in files}

    def figures(self) -> dict[str, Any]:
        """Return the tables of this seed."""
        rows, reached, separate = {}, [], []
        reference = scores(self.folder / "whole")
        for name in self.setting.shapes:
            own = scores(self.folder / name)
            same, found = (self.under(self.file(f"{way}-{name}")) for way in WAYS[1:])
            rows[name] = {
                "share_of_macs": self.share(name),
                "separate": own,
                "same": same,
                "searched": found,
                "loss_same_percent": loss(same, own),
                "loss_searched_percent": loss(found, own),
            }
            reached += [relative(same, reference), relative(found, reference)]
            separate.append(relative(own, reference))
        control = {}
        for task in self.setting.tasks:
            values = []
            for weight in PREFERENCES:
                found = self.under(self.file(f"prefer-{task}-{weight:g}"))
                reached.append(relative(found, reference))
                values.append(found[task] if TASKS[task].higher_is_better else -found[task])
            # All the same: the preference does nothing.
            control[task] = float(spearmanr(PREFERENCES, values).statistic) if len(set(values)) > 1 else 0.0
        volumes = {"one checkpoint": hypervolume(reached), "separate models": hypervolume(separate)}
        return {"rows": rows, "hypervolume": volumes, "control": control}


def draw(rows: dict[str, dict[str, Any]], tasks: list[str], title: str, path: Path) -> None:
    """Draw each task's metric against the share of the MACs: `rows` are means over seeds, by shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    styles = {"separate": "s", "same": "o--", "searched": "^-"}
    labels = (
        "trained for this budget alone",
        "one checkpoint, the same budgets",
        "one checkpoint, budgets searched for",
    )
    for axis, name in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        task = TASKS[name]
        for (way, style), label in zip(styles.items(), labels, strict=True):
            shares = [row["share_of_macs"] for row in rows.values()]
            axis.plot(shares, [row[way][name] for row in rows.values()], style, label=label, markersize=5)
        axis.set_title(f"{name}: {task.metric} ({task.unit}) {'↑' if task.higher_is_better else '↓'}", fontsize=9)
        axis.set_xlabel("share of the MACs", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, default=1, help="smaller passes of a step (train.budgets)")
    parser.add_argument("--one", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of the one checkpoint")
    parser.add_argument(
        "--jobs", type=int, default=1, help="models trained, and budgets tried, at a time, on one thread each"
    )
    parser.add_argument("--train", type=int, default=400, help="scenes")
    parser.add_argument("--val", type=int, default=100, help="scenes")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--images", type=int, default=32, help="val scenes that a search measures on")
    parser.add_argument("--data", type=Path, help="photographs: NYUD-v2 in NYUD_MT's layout")
    parser.add_argument("--weights", type=Path, help="with --data: of vit_small_patch14_dinov2, in timm's names")
    args = parser.parse_args()
    if bool(args.data) != bool(args.weights):
        parser.error("give --data and --weights together")
    os.environ["OMP_NUM_THREADS"] = "1"  # of what is started below
    found = machine()
    if not args.data:
        run("data", "synth", "--out", args.out / "data", "--train", args.train, "--val", args.val)
    setting = PHOTOGRAPHS if args.data else SCENES
    names, images = setting.tasks, "photographs" if args.data else f"{args.train} scenes"
    seeds = [Seed(args, seed) for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: job[0].train(job[1]), product(seeds, ("one", *setting.shapes))))
        looked_at = [(seed, name) for seed in seeds for name in seed.budgets()]
        list(pool.map(lambda job: job[0].under(job[0].file(job[1])), looked_at))
    tables = [seed.figures() for seed in seeds]

    def mean(*keys: str) -> float:
        """Return the mean over the seeds of what stands under these keys."""
        return statistics.mean(reduce(getitem, keys, table) for table in tables)

    print(f"{args.epochs} epochs, {images}, {args.seeds} seeds, protocol A; means over seeds")
    heads = " | ".join(f"{task} {TASKS[task].metric}: {', '.join(WAYS)}" for task in names)
    print(f"| MACs | {heads} | loss %, same | searched |\n|---|" + "---:|" * (len(names) + 2))
    rows: dict[str, dict[str, Any]] = {
        name: {"share_of_macs": mean("rows", name, "share_of_macs")}
        | {way: {task: mean("rows", name, way, task) for task in names} for way in WAYS}
        for name in setting.shapes
    }
    for name, row in rows.items():
        cells = [", ".join(f"{row[way][task]:.3f}" for way in WAYS) for task in names]
        cells += [f"{mean('rows', name, f'loss_{way}_percent'):+.2f}" for way in WAYS[1:]]
        print(f"| {row['share_of_macs']:.3f} | " + " | ".join(cells) + " |")
    latencies = seeds[0].latency()
    print("| MACs | ms, all tasks: separate | same |\n|---|---:|---:|")
    for name, row in rows.items():
        print(f"| {row['share_of_macs']:.3f} | {latencies[name]['separate']:.2f} | {latencies[name]['same']:.2f} |")
    for name in ("one checkpoint", "separate models"):
        print(f"hypervolume, {name}: {mean('hypervolume', name):.4f}")
    words = ", ".join(f"{task} {mean('control', task):+.2f}" for task in names)
    print(f"control (rank correlation of preference and metric): {words}")
    save(args.json, {"machine": found, "epochs": args.epochs, "seeds": tables, "latency_ms": latencies})
    if args.plot:
        title = (
            f"{'Photographs' if args.data else 'Rendered scenes'}, mean of {args.seeds} seed{'s' * (args.seeds > 1)}"
        )
        draw(rows, names, title, args.plot)


if __name__ == "__main__":
    main()
