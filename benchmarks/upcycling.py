"""Do up-cycled experts help, and how large should their gates be? Fine-tuning one dense model in several ways.

    python benchmarks/upcycling.py --out runs/upcycling [--epochs 20] [--seeds 3] [--jobs 2] [--json FILE]

A dense model is trained on scenes of its own (the stand-in for pre-training: nobody released one of M3ViT's kind). Its
trunk then starts models that are fine-tuned on other, fewer scenes: dense again, with random experts, and with
experts up-cycled from its MLPs (model.init upcycle) under gates of several sizes. Nothing but public commands, recipe
synthetic-tiny; what was trained before is not trained again. delta_m is over the dense fine-tuned models' means, by
seed. Rendered scenes and small models.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _bench import arguments, save
from quality import beside, print_table, run  # beside this file

from m3vit.evaluation.scoring import read
from m3vit.label_sets import LABEL_SETS

NAMES = LABEL_SETS["nyud"].tasks
GATES = ("1e-6", "1e-3", "1e-2", "1e-1", "1")
ROWS = {"dense": ["--model.moe_blocks=none"], "random experts": []} | {
    f"up-cycled, gates {gates}": ["--model.init=upcycle", f"--model.upcycle_gates={float(gates)}"] for gates in GATES
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning; twice that of the dense model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="models trained at a time, on one thread each")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    for name, count, seed in (("first", 800, 1), ("second", 200, 0)):
        run("data", "synth", "--out", args.out / name, "--train", count, "--val", 100, "--seed", seed)
    common = ["synthetic-tiny", "--model.head=linear", "--train.threads=1", "--train.eval_epochs=0", "--resume"]
    source = args.out / "pretrained"
    dense = ["--model.moe_blocks=none", f"--train.epochs={2 * args.epochs}", f"--data.root={args.out / 'first'}"]
    run("train", *common, *dense, "--out", source)

    def folder(row: str, seed: int) -> Path:
        return args.out / f"{row.replace(',', '').replace(' ', '-')}-{seed}"

    def fine_tune(job: tuple[int, str]) -> None:
        seed, row = job
        if not (folder(row, seed) / "eval.json").exists():
            keys = [*ROWS[row], f"--model.weights={source / 'model.safetensors'}", "--train.lr=1e-3"]
            keys += [f"--train.epochs={args.epochs}", f"--train.seed={seed}", f"--data.root={args.out / 'second'}"]
            run("train", *common, *keys, "--out", folder(row, seed))
            run("eval", folder(row, seed), "--workers", 1)

    rows = list(dict.fromkeys(["dense", *args.rows]))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(fine_tune, [(seed, row) for seed in range(args.seeds) for row in rows]))

    def scores(row: str, seed: int) -> dict[str, dict[str, float]]:
        _, result = read(folder(row, seed), "A")
        return {task: values["torch"] for task, values in result["tasks"].items()}

    found = {row: [scores(row, seed) for seed in range(args.seeds)] for row in rows}
    table = beside(found, "dense")
    print(f"{args.epochs} epochs, {args.seeds} seeds, protocol A; mean ± standard deviation")
    print_table(table, digits=3)
    save(args.json, {"epochs": args.epochs, "rows": table})


if __name__ == "__main__":
    main()
