"""Scoring a split: the trivial predictor, several processes, unreadable files."""

import math

import numpy as np
import pytest
import torch

from m3vit.data.sample import Sample
from m3vit.errors import InputError
from m3vit.evaluation.edge_pool import EdgeScorer, edge_statistics
from m3vit.evaluation.evaluate import Predictor, TrivialPredictor, evaluate
from m3vit.label_sets import NYUD_CLASSES
from m3vit.tasks import IGNORE
from tests.evaluation.noise import Noise, Suicidal


class TwoImages:
    """A split of two hand-made images."""

    label_set, release, split = "nyud", "hand-made", "val"
    tasks = ("semseg", "depth", "normals", "edge")
    ids = ("0", "1")

    def __len__(self) -> int:
        return 2

    def load(self, index: int) -> Sample:
        labels = {
            "semseg": np.array([[3, 3, IGNORE, 1]], np.uint8),
            "depth": np.array([[1.0, 3.0, 0.0, 2.0]], np.float32) + index,
            "normals": np.array([[[0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]], np.float32),
            "edge": np.array([[0, 0, IGNORE, 1]], np.uint8),
        }
        labels["depth"][0, 2] = 0
        return Sample(str(index), np.zeros((1, 4, 3), np.uint8), labels)

    def edge_truth(self, index: int) -> np.ndarray:
        return np.array([[False, False, False, True]])


def test_trivial_predictor_is_fitted_on_valid_labels() -> None:
    split = TwoImages()
    trivial = TrivialPredictor.fit(split)  # type: ignore[arg-type]
    assert trivial.constants["semseg"] == 3
    assert trivial.constants["depth"] == pytest.approx((1 + 3 + 2 + 2 + 4 + 3) / 6)
    assert trivial.constants["normals"] == pytest.approx([0, 1 / math.sqrt(5), 2 / math.sqrt(5)])
    assert trivial.constants["edge"] == pytest.approx(1 / 3)
    assert trivial.untrained == {"semseg": [name for name in NYUD_CLASSES if name not in ("floor", "bed")]}  # 1 and 3
    scores = evaluate(split, trivial.predictor((1, 4)), quick=True).scores()  # type: ignore[arg-type]
    # mean depth 2.5: squared errors 2.25 .25 .25 | .25 2.25 .25, sum 5.5 over 6 pixels
    assert scores["depth"]["rmse"] == pytest.approx(math.sqrt(5.5 / 6))
    assert scores["semseg"]["mIoU"] == pytest.approx(100 * (2 / 3) / 40)  # TP 4, FP 2, of 40 classes
    assert scores["edge"]["pixF1"] == pytest.approx(50.0)  # everything an edge: precision 1/3, recall 1


def test_a_stores_normals_of_pascal_with_y_down() -> None:
    """The same upright normals everywhere: what 8 bits cost depends on the axes the files of the data set have."""
    up = np.array([0, 0.28, 0.96])  # stored y down 0.72 * 127.5 = 91.8, y up 163.2; z 249.9

    class Upright(TwoImages):
        tasks = ("normals",)

        def load(self, index: int) -> Sample:
            return Sample(str(index), np.zeros((1, 4, 3), np.uint8), {"normals": np.tile(np.float32(up), (1, 4, 1))})

    errors = {}
    for label_set, stored in (("pascal", [127, 91, 249]), ("nyud", [127, 163, 249])):
        split = Upright()
        split.label_set = label_set  # type: ignore[misc]
        constant = TrivialPredictor({"normals": up.tolist()}, label_set).predictor((1, 4))
        errors[label_set] = evaluate(split, constant).scores()["normals"]["mErr"]  # type: ignore[arg-type]
        axes = np.array([1, -1, 1]) if label_set == "pascal" else 1
        guess = (np.array(stored) / 127.5 - 1) * axes
        expected = np.degrees(np.arccos(guess @ up / np.linalg.norm(guess)))
        assert errors[label_set] == pytest.approx(expected, abs=1e-4)
    assert errors["pascal"] > errors["nyud"] + 0.1


def red_edges(images: list) -> dict[str, torch.Tensor]:
    """Take the red channel for an edge map."""
    return {"edge": torch.stack([torch.from_numpy(image.pixels[..., 0].copy()).float()[None] / 64 for image in images])}


def predictor(size: int, batch: int = 1) -> Predictor:
    return Predictor("red", ("edge",), "nyud", (size, size), red_edges, batch)


@pytest.mark.process
def test_batches_and_processes_do_not_change_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Noise(40)
    plain = evaluate(split, predictor(40)).statistics["edge"]  # type: ignore[arg-type]
    batched = evaluate(split, predictor(40, 4)).statistics["edge"]  # type: ignore[arg-type]
    monkeypatch.setattr("m3vit.evaluation.edge_pool.POOL_FROM_PIXELS", 0)
    monkeypatch.setattr(EdgeScorer, "PENDING", 1)
    pooled = evaluate(split, predictor(40), workers=2).statistics["edge"]  # type: ignore[arg-type]
    np.testing.assert_array_equal(plain, batched)
    np.testing.assert_array_equal(plain, pooled)
    one = edge_statistics(split, "edge", "A", 3, np.full((40, 40), 0.5, np.float32))  # type: ignore[arg-type]
    assert one.shape == plain[0].shape


def test_unreadable_images_stop_or_are_left_out() -> None:
    split = Noise(40, unreadable=(1, 4))
    with pytest.raises(InputError, match="image 1 is damaged"):
        evaluate(split, predictor(40))  # type: ignore[arg-type]
    found = evaluate(split, predictor(40, 3), skip_unreadable=True)  # type: ignore[arg-type]
    assert found.ids == ["0", "2", "3", "5"]
    assert found.errors == ["image 1 is damaged", "image 4 is damaged"]
    whole = evaluate(Noise(40), predictor(40))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.statistics["edge"], whole.statistics["edge"][[0, 2, 3, 5]])


@pytest.mark.process
def test_a_killed_process_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3vit.evaluation.edge_pool.POOL_FROM_PIXELS", 0)
    with pytest.raises(InputError, match="was killed, maybe for want of memory: run again with fewer --workers"):
        with EdgeScorer(Suicidal(40), "edge", "A", 2) as scorer:  # type: ignore[arg-type]
            scorer.submit(0, np.zeros((40, 40), np.float32))
            scorer.results()


def test_nothing_readable_is_an_error() -> None:
    split = Noise(40, unreadable=tuple(range(6)))
    with pytest.raises(InputError, match="no image could be scored: image 0 is damaged"):
        evaluate(split, predictor(40), skip_unreadable=True)  # type: ignore[arg-type]


def test_another_label_set_is_refused() -> None:
    other = Predictor("red", ("edge",), "pascal", (40, 40), red_edges)
    with pytest.raises(InputError, match="predicts the classes of pascal, the data are nyud"):
        evaluate(Noise(40), other)  # type: ignore[arg-type]
