"""The report's section on errors, against figures worked out by hand."""

from typing import Any

import numpy as np

from m3vit.evaluation.evaluate import Evaluation
from m3vit.evaluation.meters import ClassMeter, make_meter
from m3vit.report.errors import cards, class_rows, ranked


def evaluation(errors_m: list[float], faulty: list[int]) -> Evaluation:
    """Images of four pixels at 2 m (0: not labelled), and of class 0, of which some are predicted as class 1."""
    depth, semseg = make_meter("depth", "nyud", "A"), make_meter("semseg", "nyud", "A")
    rows: dict[str, Any] = {"depth": [], "semseg": []}
    for error, wrong in zip(errors_m, faulty, strict=True):
        truth = np.full((2, 2), 2.0 if error else 0.0, np.float32)
        rows["depth"].append(depth.image(truth + error, truth))
        label = np.zeros((1, 4), np.uint8)
        rows["semseg"].append(semseg.image((np.arange(4) < wrong).astype(np.uint8)[None], label))
    ids = [f"photo{place}" for place in range(len(errors_m))]
    return Evaluation("A", "nyud", ids, {task: np.stack(found) for task, found in rows.items()})


def test_images_are_ranked_by_their_own_figures() -> None:
    found = evaluation([0.5, 0.1, 0.0, 0.3, 0.2], [3, 1, 0, 2, 4])
    result = ranked(found, ["depth", "semseg"])
    # Of four labelled images two at either end; the third has no depth.
    assert [one["id"] for one in result["depth"]["worst"]] == ["photo0", "photo3"]
    assert [one["id"] for one in result["depth"]["best"]] == ["photo1", "photo4"]
    assert [one["id"] for one in result["semseg"]["worst"]] == ["photo4", "photo0"]
    assert [one["id"] for one in result["semseg"]["best"]] == ["photo2", "photo1"]
    np.testing.assert_allclose([one["value"] for one in result["semseg"]["worst"]], [0, 25])
    depth, semseg = cards(found, ["depth", "semseg"], lambda place, task: {"input": f"{task} {place}"})
    worst = depth["groups"][0]["images"][0]
    assert worst["pictures"] == {"input": "depth 0"} and worst["value"] == "0.5 m"
    assert worst["elsewhere"] == [{"task": "semseg", "rank": "4 of 5", "link": "#semseg-photo0"}]
    of_third = semseg["groups"][1]["images"][0]
    assert of_third["id"] == "photo2" and of_third["elsewhere"] == [], "it has no rank in depth"


def test_one_image_has_no_worst_and_best() -> None:
    found = evaluation([0.5], [1])
    assert ranked(found, ["depth"])["depth"] == {"metric": "rmse", "worst": [], "best": []}
    assert cards(found, ["depth"], lambda place, task: {})[0]["groups"] == []


def test_rows_of_classes_by_hand() -> None:
    meter = ClassMeter(["night_stand", "bed", "sofa", "lamp"])
    pixels = np.array([[2, 1, 1, 0], [0, 6, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    bed, stand, lamp = class_rows(meter.explained(pixels))
    assert bed == {"name": "bed", "share": "54.55", "iou": "75.0", "recall": "100.0", "precision": "75.0", "taken": "-"}
    assert stand["name"] == "night stand" and stand["taken"] == "bed (25 %)" and stand["iou"] == "50.0"
    assert lamp["precision"] == "-" and lamp["recall"] == "0.0" and lamp["taken"] == "bed (100 %)"
