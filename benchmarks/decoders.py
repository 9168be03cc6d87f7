"""What a decoder gives: linear, pup, multi-scale and TaskExpert-style on a dense trunk and on one with experts.

    python benchmarks/decoders.py --out runs/decoders [--epochs 20] [--seeds 3] [--jobs 2] [--ablations] [--json FILE]

Nothing but public commands: m3vit data synth, train, eval (protocol A) and profile with the recipe
synthetic-taskexpert-tiny on rendered scenes. --epochs are those of TaskExpert-style; every other row on its trunk has
as many as take the same time of training, by the time of a step and of reading a batch (--equal-epochs: the same number
instead). Multi-scale has the width that makes its MACs those of TaskExpert-style. What was trained, scored or timed
before is not done again and an interrupted training is resumed, so that the table may be made in several goes. It gives
mean and standard deviation over seeds; delta_m is over the multi-scale decoder on the dense trunk, its mean over the
seeds. Time (CPU seconds of one thread) and memory are those of steps on random images of the recipe's batch, each row
in a process of its own, in turn; memory is the process's peak beyond what it held before the model was built.
--ablations adds rows of TaskExpert-style without one of its parts, of as many epochs, with --ablation-seeds. Rendered
scenes and small models: the table says nothing about photographs.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from _bench import arguments, child, machine, save
from quality import NAMES, beside, print_table, run  # beside this file

from m3vit.evaluation.scoring import read
from m3vit.tasks import TASKS

RECIPE = "synthetic-taskexpert-tiny"
DENSE = ["--model.moe_blocks=none"]
ROWS: dict[str, list[str]] = {
    "linear, dense": [*DENSE, "--model.head=linear", "--model.head_args={}"],
    "pup, dense": [*DENSE, "--model.head=pup", "--model.head_args={}"],
    "multiscale, dense": [*DENSE, "--model.head=multiscale", "--model.head_args={width: 32}"],
    "taskexpert, dense": DENSE,
    "linear, MoE": ["--model.head=linear", "--model.head_args={}"],
    "pup, MoE": ["--model.head=pup", "--model.head_args={}"],
    "multiscale, MoE": ["--model.head=multiscale", "--model.head_args={width: 56}"],
    "taskexpert, MoE": [],
}
ABLATIONS: dict[str, list[str]] = {
    f"taskexpert, dense, {name}": [*DENSE, *words]
    for name, words in {
        "no memory": ["--model.head_args.memory=false"],
        "static gates": ["--model.head_args.gates=static"],
        "token gates": ["--model.head_args.gates=token"],
        "sample gates": ["--model.head_args.gates=sample"],
        "one layer": ["--model.head_args.blocks=1"],
        "no preliminary": ["--model.head_args.preliminary=false"],
        "2 experts": ["--model.head_args.experts=2"],
        "8 experts": ["--model.head_args.experts=8"],
    }.items()
}
REFERENCE = "multiscale, dense"
ROUNDS, STEPS = 5, 4


def folder_of(out: Path, row: str, seed: int) -> Path:
    return out / f"{row.replace(',', '').replace(' ', '-').lower()}-{seed}"


def train_and_score(out: Path, row: str, seed: int, words: list[str], epochs: int) -> None:
    """Train one model on one thread, evaluate and profile it, unless that is done."""
    folder = folder_of(out, row, seed)
    if not (folder / "eval.json").exists():
        keys = [*words, f"--train.epochs={epochs}", f"--train.seed={seed}", "--train.threads=1"]
        keys += ["--train.eval_epochs=0", f"--data.root={out / 'data'}"]
        start = time.perf_counter()
        run("train", RECIPE, *keys, "--out", folder, "--resume")
        run("eval", folder, "--workers", 1)
        print(f"{folder.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if not (folder / "profile.json").exists():
        run("profile", folder, "--json", folder / "profile.json")


def keys_of(words: list[str]) -> dict[str, object]:
    """Return {key: value} of the words of a command line."""
    pairs = (word.removeprefix("--").split("=", 1) for word in words)
    return {key: yaml.safe_load(value) for key, value in pairs}


def measure(row: str) -> dict[str, float]:
    """Return the CPU seconds of a training step of a row's model, and the MiB of its peak; in this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from m3vit.api import configure
    from m3vit.kinds.kind import IGNORE
    from m3vit.models.initialise import new_model
    from m3vit.training.launch import launch
    from m3vit.training.optim import make_optimizer
    from m3vit.training.step import Stepper
    from m3vit.training.weighting import make_weighting

    torch.set_num_threads(1)
    keys = {"data.root": ".", "model.label_set": "nyud", **keys_of((ROWS | ABLATIONS)[row])}
    config = configure(RECIPE, keys)
    fabric = launch(config.train)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model, weighting = new_model(config.model).train(), make_weighting(config, fabric.device)
    optimizer = make_optimizer(config.train, model, weighting.parameters())
    stepper = Stepper(fabric, config, *fabric.setup(model, optimizer), weighting)
    batch, (height, width) = config.train.batch_size, config.model.image_size
    labels = {
        "semseg": torch.randint(0, 40, (batch, height, width)),
        "depth": torch.rand(batch, height, width) + 0.5,
        "normals": torch.nn.functional.normalize(torch.randn(batch, 3, height, width), dim=1),
        "edge": torch.randint(0, 2, (batch, height, width)),
    }
    labels["semseg"][:, :2] = IGNORE
    images, times = torch.randn(batch, 3, height, width), []
    for step in range(STEPS + 1):
        start = time.process_time()
        stepper.gradients(step, images, labels)
        stepper.clip()
        stepper.optimizer.step()
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"s_per_step": statistics.median(times[1:]), "peak_mib": peak}


def measure_loading(root: Path) -> float:
    """Return the CPU seconds that a batch takes to be read, images and labels cached as the recipe has them."""
    from m3vit.api import configure
    from m3vit.data.loading import TrainingSet, collate
    from m3vit.data.opening import open_split
    from m3vit.models.initialise import new_model

    config = configure(RECIPE, {"data.root": str(root), "model.label_set": "nyud"})
    split, height, width = open_split("nyud", root, "train", NAMES), *config.model.image_size
    normalisation, options = new_model(config.model).normalisation, config.data
    data = TrainingSet(split, (height, width), 0, normalisation, "simple", options.flip, options.colour, cache=True)
    batch = range(min(len(data), config.train.batch_size))
    collate([data.example((0, index)) for index in batch])
    start = time.process_time()
    for epoch in range(1, STEPS + 1):
        collate([data.example((epoch, index)) for index in batch])
    return (time.process_time() - start) / STEPS


def step_costs(out: Path, rows: list[str]) -> dict[str, dict[str, float]]:
    """Return the time and memory of a step of each row's model, measured once in turn."""
    path = out / "steps.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    missing, shuffle = [row for row in rows if row not in found], random.Random(0)
    rounds: dict[str, list[dict[str, float]]] = {row: [] for row in missing}
    if missing:  # ratios are within a round: the reference takes part in each
        rounds.setdefault(REFERENCE, [])
    for _ in range(ROUNDS if missing else 0):
        for row in shuffle.sample(list(rounds), len(rounds)):
            rounds[row].append(child(["--measure", row]))
    for row in missing:
        pairs = zip(rounds[row], rounds[REFERENCE], strict=True)
        found[row] = {key: statistics.median(each[key] for each in rounds[row]) for key in rounds[row][0]}
        found[row]["time_ratio"] = statistics.median(one["s_per_step"] / other["s_per_step"] for one, other in pairs)
    save(path, found)
    return {row: found[row] for row in rows}


def loading_cost(out: Path) -> float:
    """Return `measure_loading` in a process of its own, measured once."""
    path = out / "loading.json"
    if not path.exists():
        rounds = [child(["--measure-loading", out / "data"]) for _ in range(ROUNDS)]
        save(path, {"s_per_batch": statistics.median(rounds)})
    return float(json.loads(path.read_text())["s_per_batch"])


def profiled(out: Path, row: str) -> dict[str, float]:
    """Return the MACs and parameters of a row's model."""
    profile = json.loads((folder_of(out, row, 0) / "profile.json").read_text())
    macs = profile["all_tasks_in_one_pass"]["macs"]
    return {
        "gmac": macs["total"] / 1e9,
        "gmac_heads": macs["parts"]["heads"] / 1e9,
        "parameters": profile["stored"]["total"],
    }


def equal_epochs(row: str, epochs: int, steps: dict[str, dict[str, float]], loading: float) -> int:
    """Return the epochs of a row that take the time of `epochs` of TaskExpert-style on the same trunk."""
    whole = f"taskexpert, {'MoE' if 'MoE' in row else 'dense'}"
    reference = steps[REFERENCE]["s_per_step"]  # ratios within rounds are the better measure
    own, other = (steps[name]["time_ratio"] * reference + loading for name in (row, whole))
    return max(1, round(epochs * other / own))


def figures(out: Path, row: str, seed: int) -> dict[str, dict[str, float]]:
    """Return {task: {metric: value}} of a row's model of one seed."""
    _, result = read(folder_of(out, row, seed), "A")
    return {task: values["torch"] for task, values in result["tasks"].items()}


def print_costs(found: dict[str, dict[str, float]]) -> None:
    """Print what the rows cost."""
    heads = ("epochs", "GMAC", "of the heads", "parameters", "step (CPU ms)", f"x {REFERENCE}", "peak (MiB)")
    print("| | " + " | ".join(heads) + " |\n|---|" + "---:|" * len(heads))
    for row, one in found.items():
        cells = (f"{one['epochs']}", f"{one['gmac']:.3f}", f"{one['gmac_heads']:.3f}", f"{one['parameters']:,}")
        times = (f"{1000 * one['s_per_step']:.0f}", f"{one['time_ratio']:.2f}", f"{one['peak_mib']:.0f}")
        print(f"| {row} | " + " | ".join((*cells, *times)) + " |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=20, help="of TaskExpert-style")
    parser.add_argument("--equal-epochs", action="store_true", help="the same number for every row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="models trained at a time, on one thread each")
    parser.add_argument("--images", type=int, nargs=2, default=(400, 100), metavar=("TRAIN", "VAL"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, *ABLATIONS], metavar="ROW")
    parser.add_argument("--ablations", action="store_true", help="the rows without one of the parts too")
    parser.add_argument("--ablation-seeds", type=int, default=1)
    parser.add_argument("--measure", choices=[*ROWS, *ABLATIONS], help=argparse.SUPPRESS)
    parser.add_argument("--measure-loading", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    if args.measure_loading:
        print(json.dumps(measure_loading(args.measure_loading)))
        return
    if args.out is None:
        parser.error("give --out")
    rows = list(dict.fromkeys([REFERENCE, *args.rows, *(ABLATIONS if args.ablations else ())]))
    train, val = args.images
    if not (args.out / "data").exists():
        run("data", "synth", "--out", args.out / "data", "--train", train, "--val", val)
    seeds = {row: args.ablation_seeds if row in ABLATIONS else args.seeds for row in rows}
    wholes = () if args.equal_epochs else ("taskexpert, dense", "taskexpert, MoE")
    steps = step_costs(args.out, list(dict.fromkeys([*rows, *wholes])))
    loading = loading_cost(args.out)
    epochs = {row: args.epochs for row in rows}
    if not args.equal_epochs:
        epochs |= {row: equal_epochs(row, args.epochs, steps, loading) for row in rows if row in ROWS}
    # Seed by seed, ablations last, so that what an interruption leaves is whole seeds.
    jobs = [(row, seed) for seed in range(max(seeds.values())) for row in rows if seed < seeds[row]]
    jobs.sort(key=lambda job: job[0] in ABLATIONS)
    with ThreadPoolExecutor(args.jobs) as pool:
        words = ROWS | ABLATIONS
        list(pool.map(lambda job: train_and_score(args.out, *job, words[job[0]], epochs[job[0]]), jobs))

    table = beside({row: [figures(args.out, row, seed) for seed in range(seeds[row])] for row in rows}, REFERENCE)
    where = machine()
    print(f"{args.seeds} seeds ({args.ablation_seeds} of the ablations), protocol A; mean ± standard deviation")
    print_table(table)
    cost = {row: {"epochs": epochs[row], **steps[row], **profiled(args.out, row)} for row in rows}
    print_costs(cost)
    for trunk in ("dense", "MoE"):
        if {f"taskexpert, {trunk}", f"multiscale, {trunk}"} <= set(rows):
            ours, plain = (table[f"{head}, {trunk}"]["delta_m"] for head in ("taskexpert", "multiscale"))
            ahead = ", ".join(f"{one - other:+.2f}" for one, other in zip(ours, plain, strict=True))
            macs = cost[f"taskexpert, {trunk}"]["gmac"] / cost[f"multiscale, {trunk}"]["gmac"]
            print(f"{trunk} trunk: delta_m of taskexpert less that of multiscale, by seed: {ahead} (MACs x{macs:.2f})")
    metrics = {task: TASKS[task].metric for task in NAMES}
    save(args.json, {"machine": where, "metrics": metrics, "rows": table, "costs": cost})


if __name__ == "__main__":
    main()
