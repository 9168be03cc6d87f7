"""How small do packages get when experts that a task does not use are left out? Two ways of training, two numbers.

    python benchmarks/pruning.py --out runs/pruning [--data DIR] [--epochs 40] [--json FILE]

Trains the recipe synthetic-tiny with 16 experts (top-2), once with M3ViT's balance loss, which makes every task use all
experts, once with the mutual information of tasks and experts instead (Mod-Squad), which gives tasks experts of their
own; then exports packages by coverage and scores them on the validation scenes. Nothing but public commands; what was
trained before is not trained again. Sizes are of what one task needs (its graph and its weights), relative to the same
without pruning. Rendered scenes and a small model.
"""

from pathlib import Path
from typing import Any

from _bench import arguments, save
from quality import run  # beside this file

from m3vit.export.runtime.manifest import read_manifest

MODELS = {"balance": [], "specialise": ["--train.balance_weight=0", "--train.specialise_weight=0.1"]}
COVERAGES = (1.0, 0.999, 0.99, 0.95)


def sizes(manifest: dict[str, Any], precision: str) -> dict[str, int]:
    """Return the bytes that each task needs."""
    graphs = {task: entry["graphs"][precision] for task, entry in manifest["tasks"].items()}
    return {task: graph["bytes"] + graph["weight_bytes"] for task, graph in graphs.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=None, help="rendered scenes (default: rendered into --out)")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    data = args.data or args.out / "data"
    if args.data is None:
        run("data", "synth", "--out", data, "--train", 400, "--val", 100)
    found: dict[str, Any] = {}
    print("| loss | coverage | experts kept of 16 | fp32 size of a task | int8 size | worst loss fp32 | int8 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, keys in MODELS.items():
        folder = args.out / name
        keys = [*keys, "--model.num_experts=16", f"--train.epochs={args.epochs}", "--train.eval_epochs=0"]
        keys += ["--model.head=linear", "--train.threads=1"]  # the same weights on every run
        run("train", "synthetic-tiny", *keys, f"--data.root={data}", "--out", folder, "--resume")
        whole: dict[str, int] = {}
        for coverage in COVERAGES:
            package = args.out / f"{name}-{coverage:g}"
            pruning = ["--prune", f"coverage={coverage:g}"] if coverage < 1 else []
            run("export", "onnx", folder, "--out", package, "--precision", "fp32", "int8", *pruning)
            manifest = read_manifest(package)
            whole = whole or sizes(manifest, "fp32")
            tasks = manifest["tasks"].values()
            kept = [16 if e["experts"]["kept"] == "all" else len(k) for e in tasks for k in _lists(e["experts"])]
            share = {p: [sizes(manifest, p)[task] / whole[task] for task in whole] for p in ("fp32", "int8")}
            rows = manifest["measured"]["tasks"].values()
            loss = {p: max(row["loss_percent"][p] for row in rows) for p in ("fp32", "int8")}
            cells = [f"{100 * min(share[p]):.0f} to {100 * max(share[p]):.0f} %" for p in share]
            cells += [f"{loss[p]:+.2f} %" for p in loss]
            print(f"| {name} | {coverage:g} | {min(kept)} to {max(kept)} | " + " | ".join(cells) + " |", flush=True)
            found[package.name] = {"kept": kept, "size": share, "loss_percent": loss, "measured": manifest["measured"]}
    save(args.json, found)


def _lists(experts: dict[str, Any]) -> list[Any]:
    return list(experts["kept"].values()) if isinstance(experts["kept"], dict) else [experts["kept"]]


if __name__ == "__main__":
    main()
