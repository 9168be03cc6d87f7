"""What is a merged model worth after as much further training as others? One start against the others, small scale.

    python benchmarks/merging.py --out runs/merging [--before 20] [--after 20] [--seeds 2] [--jobs 1] [--json FILE]

Dense models are trained for --before epochs: one for each task, and one for all of them. Then multi-task models with
experts are trained for --after epochs on the same scenes: merged from the single-task ones (model.init merge:, each
task starting with the experts of its own run), up-cycled from the multi-task one (model.init run:), and from scratch.
The trunk that merged models share is the runs' mean, or the weights that they began from (those of one seed begin
alike) with 0.3 of what each run learnt (task arithmetic), or with as much of it as entropy asks for (AdaMerging). "at
once" is each before any further training. Nothing but public commands, recipe synthetic-tiny with linear heads; what
was trained before is not trained again. delta_m is over the means of the models from scratch, by seed. Rendered scenes
and small models.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _bench import arguments, machine, save
from quality import beside, print_table, run  # beside this file

from m3vit.evaluation.scoring import read
from m3vit.label_sets import LABEL_SETS

NAMES = LABEL_SETS["nyud"].tasks
COEFFICIENTS = {"merged": "", "merged 0.3": str([0.3] * len(NAMES)), "merged by entropy": "entropy"}
ROWS = (
    *(f"{row}, at once" for row in (*COEFFICIENTS, "up-cycled")),
    *("from scratch", "up-cycled", *COEFFICIENTS),
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=int, default=20, help="epochs of the dense models")
    parser.add_argument("--after", type=int, default=20, help="epochs of the models with experts")
    parser.add_argument("--train", type=int, default=400, help="scenes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="models trained at a time, on one thread each")
    args = parser.parse_args()
    found = machine()
    data = args.out / "data"
    run("data", "synth", "--out", data, "--train", args.train, "--val", 100, "--seed", 0)
    common = ["synthetic-tiny", "--model.head=linear", f"--data.root={data}"]
    training = ["--train.threads=1", "--train.eval_epochs=0", "--resume"]

    def folder(row: str, seed: int) -> Path:
        return args.out / f"{row.replace(',', '').replace(' ', '-')}-{seed}"

    def dense(job: tuple[int, str]) -> None:
        seed, tasks = job
        keys = ["--model.moe_blocks=none", f"--model.tasks=[{tasks}]", f"--train.seed={seed}"]
        run(
            "train", *common, *training, *keys, f"--train.epochs={args.before}", "--out", folder(f"dense {tasks}", seed)
        )

    def untrained(seed: int) -> None:
        keys = ["--model.moe_blocks=none", f"--model.tasks=[{every}]", f"--train.seed={seed}"]
        if not folder("untrained", seed).exists():
            run("init", *common, *keys, "--out", folder("untrained", seed))

    def routed(job: tuple[int, str]) -> None:
        seed, row = job
        if (folder(row, seed) / "eval.json").exists():
            return
        singles = ", ".join(str(folder(f"dense {task}", seed)) for task in NAMES)
        keys = [*common, f"--train.seed={seed}", "--out", str(folder(row, seed))]
        kind = row.partition(",")[0]
        if kind == "up-cycled":
            keys.append(f"--model.init=run:{folder(f'dense {every}', seed)}")
        if kind in COEFFICIENTS:
            keys.append(f"--model.init=merge:[{singles}]")
            if COEFFICIENTS[kind]:
                keys.append(f"--model.weights={folder('untrained', seed) / 'model.safetensors'}")
                keys.append(f"--model.merge_coefficients={COEFFICIENTS[kind]}")
        if row.endswith("at once"):
            if not folder(row, seed).exists():
                run("init", *keys)
        else:
            run("train", *keys, *training, f"--train.epochs={args.after}")
        run("eval", folder(row, seed), "--workers", 1)

    every = ",".join(NAMES)
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(dense, [(seed, tasks) for seed in seeds for tasks in (*NAMES, every)]))
        list(pool.map(untrained, seeds))
        list(pool.map(routed, [(seed, row) for seed in seeds for row in ROWS]))

    def scores(row: str, seed: int) -> dict[str, dict[str, float]]:
        _, result = read(folder(row, seed), "A")
        return {task: values["torch"] for task, values in result["tasks"].items()}

    rows = {row: [scores(row, seed) for seed in seeds] for row in ROWS}
    table = beside(rows, "from scratch")
    print(f"{args.before} epochs before, {args.after} after, {args.train} scenes, {args.seeds} seeds, protocol A")
    print_table(table, digits=3)
    save(args.json, {"machine": found, "before": args.before, "after": args.after, "rows": table})


if __name__ == "__main__":
    main()
