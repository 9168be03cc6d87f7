"""What has been measured of an HLS project, for the report: its C-simulation, its evaluation, or both."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.evaluation import scoring
from m3vit.evaluation.artefacts import hls_predictor
from m3vit.evaluation.compare import read_current
from m3vit.evaluation.evaluate import Evaluation, Predictor
from m3vit.export.hls.contents import open_project
from m3vit.export.hls.multiplexed.timing import RECORD, summary
from m3vit.export.hls.verify import PROTOCOL as SIMULATED_PROTOCOL
from m3vit.export.hls.verify import SimulatedOutputs
from m3vit.hw.manifest import MANIFEST
from m3vit.report.hardware import hardware_part
from m3vit.run_folder import Run


@dataclass
class ProjectResults:
    """Columns of the metric table from an HLS project, and the images that it has all of them for.

    `scored` are to be scored, `stored` were by `m3vit eval` (on the whole val split); `indices` are places in the
    split. `drawn` gives pictures of the images `drawable`, under the title `drawn_as`. `hardware`: of `hardware_part`.
    """

    indices: list[int]
    drawable: list[int]
    scored: dict[str, Predictor] = field(default_factory=dict)
    stored: dict[str, Evaluation] = field(default_factory=dict)
    drawn: Predictor | None = None
    drawn_as: str = "C-sim"
    hardware: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def read_project(run: Run, folder: Path, split: Split, protocol: str) -> ProjectResults:
    """Return what was measured of the project in `folder` under a protocol; what was not is said in the notes.

    An evaluation covers the whole split, and so does the table then; a C-simulation of fewer images is left to the
    notes. Without one the table is of the images that were C-simulated. Raises InputError if results are damaged, of
    other weights or of other images.
    """
    everything = list(range(len(split)))
    results = ProjectResults(everything, everything)
    simulated = SimulatedOutputs.load(folder) if (folder / "csim.json").exists() else None
    evaluated = scoring.protocols_of(folder) if (folder / "eval.json").exists() else ()
    if simulated is None and not evaluated:
        results.notes.append(
            f"No C-simulation and no evaluation of an HLS project at {folder}: made with m3vit export hls, then "
            "m3vit hw csim or m3vit eval."
        )
        if (folder / MANIFEST).exists():
            manifest, _ = open_project(folder)
            check_same_weights(run, folder, manifest)
            results.hardware = hardware_part(folder, manifest)
        return results
    manifest, _ = open_project(folder)
    check_same_weights(run, folder, manifest)
    results.hardware = hardware_part(folder, manifest)
    if protocol in evaluated:
        result, evaluation = read_current(folder, protocol)
        check_evaluation(run, folder, evaluation, split)
        results.stored[str(result["predictor"])] = evaluation
    elif evaluated:
        results.notes.append(
            f"The HLS project was evaluated under protocol {', '.join(evaluated)}: for this table, "
            f"m3vit eval {folder} --protocol {protocol}."
        )
    if simulated is None:
        results.notes.append(f"The HLS project was not C-simulated: m3vit hw csim {folder}.")
    else:
        _add_simulation(results, simulated, split, protocol)
    if (folder / RECORD).exists():
        results.notes.append(summary(folder))
    if results.drawn is None and "emulator" in results.stored:  # a spatial project would have to be built first
        results.drawn, results.drawn_as = hls_predictor(folder, manifest), "emulator"
    return results


def _add_simulation(results: ProjectResults, simulated: SimulatedOutputs, split: Split, protocol: str) -> None:
    """Add the column of a C-simulation if it has all images of the table, its pictures and its summary."""
    if protocol != SIMULATED_PROTOCOL:
        results.notes.append(f"Not in this table, for its images were made for protocol {SIMULATED_PROTOCOL}:")
    else:
        results.drawable = sample_indices(split, simulated)
        results.drawn, results.drawn_as = simulated.predictor, "C-sim"
        if not results.stored:
            results.indices = results.drawable
        if len(results.drawable) < len(results.indices):
            results.notes.append("Of fewer images than this table, so not in it:")
        elif "csim" not in results.stored:
            results.scored["csim"] = simulated.predictor
    results.notes.append(simulated.summary)


def check_same_weights(run: Run, folder: Path, manifest: dict[str, Any]) -> None:
    """Raise InputError if an export was made from other weights: its column would stand beside another model's."""
    if manifest.get("run", {}).get("weights_sha256") != run.info["weights_sha256"]:
        raise InputError(
            f"{folder} was exported from other weights than those in {run.folder}: export it again, or name this "
            "run's with --onnx and --hls (a folder that is not there leaves its column out)"
        )


def check_evaluation(run: Run, folder: Path, evaluation: Evaluation, split: Split) -> None:
    """Raise InputError unless a project was evaluated on this split, with the run's tasks."""
    missing = set(run.config.model.tasks) - set(evaluation.statistics)
    if missing:
        raise InputError(f"{folder} has no {', '.join(sorted(missing))}: export the project from this run again")
    if list(evaluation.ids) != list(split.ids):
        raise other_images(folder, split)


def other_images(folder: Path, split: Split) -> InputError:
    """Return the error of a project whose evaluation is not of the images of this split."""
    return InputError(
        f"{folder} was evaluated on other images than the val split of {split.root}: evaluate it again with "
        f"m3vit eval {folder} --data.root {split.root}, or give its data with --data.root"
    )


def sample_indices(split: Split, simulated: SimulatedOutputs) -> list[int]:
    """Return the places in the split of the simulated images, or raise InputError if they are not from it."""
    missing = [name for name in simulated.ids if name not in split.ids]
    if missing:
        raise InputError(
            f"the HLS project was simulated on images that {split.root} does not have, such as {missing[0]}"
        )
    return [split.ids.index(name) for name in simulated.ids]
