"""Each meter against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from m3vit.data.nyud import Sample
from m3vit.evaluation.evaluate import TrivialPredictor, evaluate
from m3vit.evaluation.meters import DepthMeter, EdgeMeter, NormalsMeter, SemsegMeter, make_meter
from m3vit.tasks import IGNORE, TASKS


def test_semseg_miou() -> None:
    meter = SemsegMeter(num_classes=4)
    label = torch.tensor([[[0, 0, 1], [1, 2, IGNORE]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 0, 3]]])
    meter.update(torch.nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float(), label)
    # class 0: TP 1, FN 1, FP 1 -> 1/3; class 1: TP 2, FP 1 -> 2/3; class 2: FN 1 -> 0; class 3 is absent, since the
    # pixel where it was predicted is ignored -> 0. Mean over 4: (1/3 + 2/3) / 4 = 25 %; over the 3 present: 1/3.
    result = meter.compute()
    assert result["mIoU"] == pytest.approx(25.0)
    assert result["mIoU_present"] == pytest.approx(100 / 3)


def test_depth_rmse_pools_valid_pixels_of_all_images() -> None:
    meter = DepthMeter()
    meter.update(torch.tensor([[[[3.0, 9.0]]]]), torch.tensor([[[2.0, 0.0]]]))  # error 1; the 9 is on no label
    meter.update(torch.tensor([[[[1.0, 4.0]]]]), torch.tensor([[[4.0, 4.0]]]))  # errors 3, 0
    # squared errors 1, 9, 0 over 3 pixels: sqrt(10/3); relative errors 1/2, 3/4, 0: 5/12
    assert meter.compute()["rmse"] == pytest.approx(math.sqrt(10 / 3))
    assert meter.compute()["abs_rel"] == pytest.approx(5 / 12)


def test_normals_mean_angle() -> None:
    meter = NormalsMeter()
    truth = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]).T.reshape(1, 3, 1, 4)
    predicted = torch.tensor([[0.0, 0, 5], [0, 1, 1], [0, -2, 0], [1, 0, 0]]).T.reshape(1, 3, 1, 4)
    meter.update(predicted, truth)  # 0, 45 and 180 degrees; the last pixel has no label
    result = meter.compute()
    assert result["mErr"] == pytest.approx(75.0)
    assert result["within_11.25"] == pytest.approx(100 / 3)
    assert result["within_30"] == pytest.approx(100 / 3)


def test_edge_best_threshold() -> None:
    meter = EdgeMeter()
    probability = torch.tensor([0.9, 0.6, 0.6, 0.2, 0.99], dtype=torch.float64)
    label = torch.tensor([1, 1, 0, 0, IGNORE], dtype=torch.uint8)
    meter.update(torch.logit(probability).view(1, 1, 1, 5), label.view(1, 1, 5))
    # Threshold in [0.2, 0.6): TP 2, FP 1, FN 0 -> F1 = 4/5. In [0.6, 0.9): TP 1, FN 1 -> 2/3. Below 0.2: 4/6.
    result = meter.compute()
    assert result["pixF1"] == pytest.approx(80.0)
    assert 0.2 <= result["threshold"] < 0.6


def test_edge_threshold_is_strict() -> None:
    meter = EdgeMeter()
    meter.update(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2, dtype=torch.uint8))  # probability exactly 0.5
    positive_at_half = int(meter.positive[:50].sum())  # bins up to 49: p exceeds the thresholds 0.01 .. 0.49 only
    assert positive_at_half == 2


@pytest.mark.parametrize("task", TASKS)
def test_headline_metric_is_reported_and_updates_add_up(task: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, TASKS[task].channels, 5, 6, generator=generator)
    label = {
        "semseg": torch.randint(0, 40, (4, 5, 6), generator=generator),
        "depth": torch.rand(4, 5, 6, generator=generator) + 0.1,
        "normals": torch.nn.functional.normalize(torch.randn(4, 3, 5, 6, generator=generator), dim=1),
        "edge": torch.randint(0, 2, (4, 5, 6), generator=generator).byte(),
    }[task]
    whole, parts = make_meter(task), make_meter(task)
    whole.update(logits, label)
    for start in range(0, 4, 2):
        parts.update(logits[start : start + 2], label[start : start + 2])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert TASKS[task].metric in whole.compute()


class TwoImages:
    """A split of two hand-made images."""

    tasks = ("semseg", "depth", "normals", "edge")

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


def test_trivial_predictor_is_fitted_on_valid_labels() -> None:
    split = TwoImages()
    trivial = TrivialPredictor.fit(split)  # type: ignore[arg-type]
    assert trivial.constants["semseg"] == 3
    assert trivial.constants["depth"] == pytest.approx((1 + 3 + 2 + 2 + 4 + 3) / 6)
    assert trivial.constants["normals"] == pytest.approx([0, 1 / math.sqrt(5), 2 / math.sqrt(5)])
    assert trivial.constants["edge"] == pytest.approx(1 / 3)
    scores = evaluate(split, trivial, split.tasks)  # type: ignore[arg-type]
    # mean depth 2.5: squared errors 2.25 .25 .25 | .25 2.25 .25, sum 5.5 over 6 pixels
    assert scores["depth"]["rmse"] == pytest.approx(math.sqrt(5.5 / 6))
    assert scores["semseg"]["mIoU"] == pytest.approx(100 * (2 / 3) / 40)  # TP 4, FP 2, of 40 classes
    assert scores["edge"]["pixF1"] == pytest.approx(50.0)  # everything an edge: precision 1/3, recall 1
