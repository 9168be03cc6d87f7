"""Does exporting add to what a decoder costs? TaskExpert-style beside multi-scale and linear, in torch and onnxruntime.

    python benchmarks/decoder_export.py [--task depth] [--threads 1] [--rounds 7] [--json FILE]

The recipe nyud-taskexpert-vits14 with random weights, one task, one image, all ways in turn, in one process. For each
decoder: what it takes beyond the linear head on the same trunk (the decoder's own time), in torch eager and in the
exported fp32 graph. The last column is the ratio of the two programs' relative times, whole frames of a decoder over
those of the linear head: above 1 the exported graph pays more for the decoder than torch does. The limit is 1.15.
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

# Python looks for modules in this file's folder first, and onnx.py there would be the module onnx: look there last.
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == Path(__file__).resolve().parent)
from _bench import arguments, machine, medians, one_of_each, save, seconds

RECIPE, LIMIT = "nyud-taskexpert-vits14", 1.15
BLOCKS = [3, 5, 7, 9, 11]
DECODERS: dict[str, dict[str, Any]] = {
    "linear": {"model.head": "linear", "model.head_args": {}},
    "multiscale": {
        "model.head": "multiscale",
        "model.head_args": {"blocks": BLOCKS, "width": 61, "head_width": 64, "preliminary": False},
    },
    "taskexpert": {},
}
REFERENCE = "linear"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--task", default="depth", choices=["semseg", "depth", "normals", "edge"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    import numpy as np
    import torch

    from m3vit.api import build_model, configure
    from m3vit.export.onnx.package import Content, export_package
    from m3vit.export.runtime.package import Package
    from m3vit.profiling import profile

    torch.set_num_threads(args.threads)
    where = machine()
    ways, gmac = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in DECODERS.items():
            words = {"data.root": ".", "model.label_set": "nyud", "model.tasks": [args.task], "model.init": "random"}
            config = configure(RECIPE, words | keys)
            torch.manual_seed(0)
            model = build_model(config).eval()
            export_package(model, Path(folder) / name, Content(), info={})
            package = Package.load(Path(folder) / name, threads=args.threads)
            gmac[name] = profile(config.model, args.task)["tasks"][args.task]["macs"]["total"] / 1e9
            image = np.random.default_rng(0).integers(0, 255, (1, *config.model.image_size, 3), np.uint8)
            pixels = torch.randn(1, 3, *config.model.image_size)

            def eager(model: Any = model, pixels: Any = pixels) -> float:
                with torch.inference_mode():
                    return seconds(lambda: model(pixels, [args.task]))

            def exported(package: Any = package, image: Any = image) -> float:
                return seconds(lambda: package.logits(image, args.task))

            ways |= {f"torch {name}": eager, f"onnx {name}": exported}
        for way in ways.values():
            way()
        shuffle = random.Random(0)
        found = medians([one_of_each(ways, shuffle) for _ in range(args.rounds)])

    figures = {}
    print("| | GMAC | torch (ms) | its decoder | ONNX (ms) | its decoder | ONNX over torch, relative |")
    print("|---|" + "---:|" * 6)
    for name in DECODERS:
        torch_ms, onnx_ms = 1000 * found[f"torch {name}"], 1000 * found[f"onnx {name}"]
        base = {kind: 1000 * found[f"{kind} {REFERENCE}"] for kind in ("torch", "onnx")}
        ratio = (onnx_ms / base["onnx"]) / (torch_ms / base["torch"])
        figures[name] = {"gmac": gmac[name], "torch_ms": torch_ms, "onnx_ms": onnx_ms, "relative": ratio}
        cells = f"{gmac[name]:.2f} | {torch_ms:.1f} | {torch_ms - base['torch']:+.1f} | {onnx_ms:.1f}"
        print(f"| {name} | {cells} | {onnx_ms - base['onnx']:+.1f} | {ratio:.2f} |")
    ratio = figures["taskexpert"]["relative"]
    print(f"taskexpert: {ratio:.2f}, limit {LIMIT}: {'met' if ratio <= LIMIT else 'missed'}")
    save(args.json, {"machine": where, "task": args.task, "threads": args.threads, "decoders": figures})


if __name__ == "__main__":
    main()
