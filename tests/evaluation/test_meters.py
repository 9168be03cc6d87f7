"""Each meter against numbers worked out by hand."""

import math

import numpy as np
import pytest

from m3vit.evaluation.edge_readers import READERS
from m3vit.evaluation.gain import BASELINES
from m3vit.evaluation.meters import (
    TRAINED,
    ClassMeter,
    DepthMeter,
    EdgeMeter,
    Meter,
    NormalsMeter,
    PixelEdgeMeter,
    SaliencyMeterA,
    SaliencyMeterB,
    make_meter,
    over_trained,
)
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE, TASKS


def score(meter: Meter, *pairs: tuple[object, object]) -> dict[str, float]:
    """Score (prediction, label) pairs, one an image."""
    rows = [meter.image(np.asarray(guess), np.asarray(label)) for guess, label in pairs]
    return {name: float(value) for name, value in meter.compute(np.sum(rows, axis=0)).items()}


def test_classes() -> None:
    # class 0: TP 1, FN 1, FP 1 -> 1/3; class 1: TP 2, FP 1 -> 2/3; class 2: FN 1 -> 0; class 3 is absent, since the
    # pixel where it was predicted is ignored -> 0. Mean over 4: (1/3 + 2/3) / 4 = 25 %; over the 3 present: 1/3.
    guess, label = np.array([[0, 1, 1], [1, 0, 3]], np.uint8), np.array([[0, 0, 1], [1, 2, IGNORE]], np.uint8)
    result = score(ClassMeter("abcd"), (guess, label))
    assert result["mIoU"] == pytest.approx(25)
    assert result["mIoU_present"] == pytest.approx(100 / 3)
    assert [result[f"IoU_{name}"] for name in "abcd"] == pytest.approx([100 / 3, 200 / 3, 0, 0])


def test_a_breakdown_of_classes_has_the_pixels_of_each_pair() -> None:
    guess, label = np.array([[0, 1, 1], [1, 0, 3]], np.uint8), np.array([[0, 0, 1], [1, 2, IGNORE]], np.uint8)
    meter = ClassMeter("abcd")
    found = meter.explained(meter.breakdown(guess, label) + meter.breakdown(guess[:1], label[:1]))
    assert found["classes"] == list("abcd")
    assert found["pixels"] == [[2, 2, 0, 0], [0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_a_breakdown_of_depth_goes_by_the_true_depth() -> None:
    # 1.2 and 1.4 lie between 1 and sqrt(2), 4 between 4 and 4 sqrt(2); 0 is no label.
    guess, label = np.array([[1.0, 1.5, 3.0, 9.0]], np.float32), np.array([[1.2, 1.4, 4.0, 0.0]], np.float32)
    meter = DepthMeter()
    near, far = meter.explained(meter.breakdown(guess, label))["ranges"]
    assert (near["from"], near["pixels"], far["from"], far["pixels"]) == (1.0, 2, 4.0, 1)
    assert near["to"] == pytest.approx(2**0.5) and far["to"] == pytest.approx(4 * 2**0.5)
    assert near["bias"] == pytest.approx(-0.05, abs=1e-5) and far["bias"] == pytest.approx(-1)
    assert near["rmse"] == pytest.approx((0.05 / 2) ** 0.5, abs=1e-5) and far["rmse"] == pytest.approx(1)
    assert EdgeMeter(0.01).breakdown(guess, label) is None


def test_the_mean_without_untrained_classes_stands_beside_the_published_one() -> None:
    # As above: IoU 1/3, 2/3, 0, 0. Without class 2, which nothing trains: (1/3 + 2/3 + 0) / 3. Its one pixel, where 0
    # is predicted, stays an error of class 0, which would have 1/2 else.
    guess, label = np.array([[0, 1, 1], [1, 0, 3]], np.uint8), np.array([[0, 0, 1], [1, 2, IGNORE]], np.uint8)
    plain = score(ClassMeter("abcd"), (guess, label))
    result = over_trained(plain, "abcd", ["c"])
    assert result.pop(TRAINED) == pytest.approx(100 / 3)
    assert result == plain, "nothing published is replaced"
    assert over_trained(plain, "abcd", [])[TRAINED] == plain["mIoU"]
    assert over_trained({"rmse": 1.0}, "abcd", ["c"]) == {"rmse": 1.0}, "another meter's"


def test_an_image_without_a_person_contributes_nothing() -> None:
    person = (np.array([[1, 0]], np.uint8), np.array([[1, 1]], np.uint8))
    nobody = (np.array([[1, 1]], np.uint8), np.full((1, 2), IGNORE, np.uint8))
    assert score(ClassMeter("ab"), person, nobody) == score(ClassMeter("ab"), person)


def test_depth_pools_valid_pixels_of_all_images() -> None:
    first = (np.float32([[3, 9]]), np.float32([[2, 0]]))  # the 9 is on no label
    second = (np.float32([[1, 4]]), np.float32([[4, 4]]))
    result = score(DepthMeter(), first, second)
    # errors 1, 3, 0: squares 1, 9, 0 over 3 pixels; relative errors 1/2, 3/4, 0; ratios 1.5, 4, 1
    assert result["rmse"] == pytest.approx(math.sqrt(10 / 3))
    assert result["log_rmse"] == pytest.approx(math.sqrt((math.log(1.5) ** 2 + math.log(4) ** 2) / 3))
    assert result["abs_rel"] == pytest.approx(5 / 12)
    # 1.25, 1.5625 and 1.953125: the ratio 1.5 is within the second
    assert [result[f"delta{n}"] for n in (1, 2, 3)] == pytest.approx([100 / 3, 200 / 3, 200 / 3])


def test_depth_at_or_below_zero_counts_as_next_to_nothing() -> None:
    result = score(DepthMeter(), (np.float32([[-5]]), np.float32([[2]])))
    assert result["rmse"] == pytest.approx(2)
    assert result["log_rmse"] == pytest.approx(math.log(2 / 1e-9))


def test_normals() -> None:
    truth = np.float32([[[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]])
    guess = np.float32([[[0, 0, 5], [0, 1, 1], [0, -2, 0], [1, 0, 0]]])  # 0, 45 and 180 degrees; the last has no label
    result = score(NormalsMeter(), (guess, truth))
    assert result["mErr"] == pytest.approx(75)
    assert result["median"] == pytest.approx(45, abs=0.1)
    assert result["within_11.25"] == pytest.approx(100 / 3)
    assert result["within_30"] == pytest.approx(100 / 3)


def test_median_is_that_of_all_angles() -> None:
    rng = np.random.default_rng(0)
    angles = np.radians(rng.gamma(2, 10, 4001))
    guess = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=-1)[None]
    truth = np.broadcast_to(np.float32([0, 0, 1]), guess.shape)
    result = score(NormalsMeter(), (guess[:, :1500], truth[:, :1500]), (guess[:, 1500:], truth[:, 1500:]))
    assert result["median"] == pytest.approx(np.degrees(np.median(angles)), abs=0.05)  # half a bin


def test_median_of_few_pixels_is_within_a_tenth_of_a_degree() -> None:
    rng = np.random.default_rng(1)
    worst = 0.0
    for trial in range(300):
        angles = np.radians(rng.uniform(0, [180, 20, 0.3][trial % 3], 1 + trial % 7))
        guess = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=-1)[None]
        result = score(NormalsMeter(), (guess, np.broadcast_to(np.float32([0, 0, 1]), guess.shape)))
        worst = max(worst, abs(result["median"] - np.degrees(np.median(angles))))
    assert worst <= 0.1
    # Two pixels at 0 and 90 degrees: 45, not the edge of a bin at either.
    two = np.float32([[[0, 0, 1], [1, 0, 0]]])
    assert score(NormalsMeter(), (two, np.float32([[[0, 0, 1]] * 2])))["median"] == pytest.approx(45, abs=0.1)
    assert math.isnan(score(NormalsMeter(), (two, 0 * two))["median"])


def test_saliency_a_averages_over_images() -> None:
    # Thresholds 0.2, 0.25, .. 0.9. Image 1: probabilities .8 .8 .3 .1, truth 1 0 1 0.
    #   t < .3: predicted 3, hits 2: IoU 2/3, P 2/3, R 1. .3 <= t < .8: predicted 2, hits 1: IoU 1/3, P 1/2, R 1/2.
    # Image 2: .6 .1 with truth 1 0: t < .6: IoU P R 1. .6 <= t: IoU P R 0.
    # Means: t in [.2, .3): IoU 5/6, P 5/6, R 1 -> F 10/11.
    first = (np.float32([[0.8, 0.8, 0.31, 0.1]]), np.uint8([[1, 0, 1, 0]]))
    second = (np.float32([[0.6, 0.1]]), np.uint8([[1, 0]]))
    result = score(SaliencyMeterA(), first, second)
    assert result["mIoU"] == pytest.approx(100 * 5 / 6)
    assert result["maxF"] == pytest.approx(100 * 10 / 11)


def test_saliency_a_nothing_to_find() -> None:
    # No salient pixel, none predicted: IoU 1, precision and recall 0 (ASTMT's code).
    result = score(SaliencyMeterA(), (np.float32([[0.1]]), np.uint8([[0]])))
    assert result == {"mIoU": 100, "maxF": 0}


def test_saliency_thresholds_strict_in_a_only() -> None:
    # 102 / 255 = 0.4 in float32 is a threshold of both: A's `>` excludes it, B's `>=` does not. Truth: everything.
    guess, label = np.float32([[102 / 255]]), np.uint8([[1]])
    a = SaliencyMeterA().image(guess, label)[1:16]
    assert a.sum() == 4  # IoU 1 at 0.2, 0.25, 0.3, 0.35
    hits = SaliencyMeterB().image(guess, label)[:19]
    assert hits.sum() == 8  # 0.05 .. 0.4


def test_saliency_b_pools_pixels() -> None:
    # Pooled over both images: probabilities .8 .8 .3 .1 .6 .1, truth 1 0 1 0 1 0.
    # t <= .3: predicted 4, hits 3: P 3/4, R 1: F = 1.3 * .75 / (.3 * .75 + 1) = .975 / 1.225
    # .3 < t <= .6: predicted 3, hits 2: P 2/3, R 2/3: F = 2/3
    first = (np.float32([[0.8, 0.8, 0.31, 0.1]]), np.uint8([[1, 0, 1, 0]]))
    second = (np.float32([[0.6, 0.1, 0.9]]), np.uint8([[1, 0, IGNORE]]))
    result = score(SaliencyMeterB(), first, second)
    assert result["maxF"] == pytest.approx(100 * 0.975 / 1.225)
    # Once more through a sigmoid: .69 .69 .577 .525 .646 .525. The thresholds .05 .. .5 take all 6 pixels (P 1/2, R 1:
    # F = .65 / 1.15), .55 takes 4 (as above), .6 takes 3 (2/3), .65 takes 2 (P 1/2, R 1/3).
    assert result["maxF_as_published"] == pytest.approx(100 * 0.975 / 1.225)
    blunt = score(SaliencyMeterB(), (np.float32([[0.15, 0.05]]), np.uint8([[1, 0]])))
    # .537 and .512: no threshold of the published way lies between them.
    assert blunt["maxF"] == pytest.approx(100)
    assert blunt["maxF_as_published"] == pytest.approx(100 * 0.65 / 1.15)


def test_pixel_edges() -> None:
    guess = np.float32([[0.9, 0.6, 0.6, 0.2, 0.99]])
    label = np.uint8([[1, 1, 0, 0, IGNORE]])
    # Threshold in [0.2, 0.6): TP 2, FP 1, FN 0 -> F1 = 4/5. In [0.6, 0.9): TP 1, FN 1 -> 2/3. Below 0.2: 4/6.
    assert score(PixelEdgeMeter(), (guess, label))["pixF1"] == pytest.approx(80)


def test_edges_within_a_distance() -> None:
    truth = np.zeros((40, 40), bool)
    truth[8:32, 20] = True
    guess = np.zeros((40, 40), np.float32)
    guess[8:32, 22] = 0.75
    diagonal = math.hypot(40, 40)
    near = score(EdgeMeter(2.01 / diagonal), (guess, truth))
    assert near["odsF"] == near["oisF"] == pytest.approx(100)
    assert near["threshold"] < 0.75
    # One pixel nearer is asked for: nothing matches.
    assert score(EdgeMeter(1.5 / diagonal), (guess, truth))["odsF"] == 0


def test_edges_are_read_by_the_readers_behind_the_protocols_figures() -> None:
    """Figures end in their reader's name, the headline's in none, and each is that reader's alone."""
    guess = np.random.default_rng(0).random((30, 40)).astype(np.float32)
    truth = np.eye(30, 40, 5, dtype=bool)
    for protocol, other in (("A", "read_one_png"), ("B", "sak")):
        meter = make_meter("edge", "nyud", protocol)
        found = meter.compute(meter.image(guess, truth))
        names = ["odsF", "oisF", "AP", "threshold"]
        assert list(found) == names + [f"{name}_{other}" for name in names]
        for reader, suffix in zip(READERS[protocol], ("", f"_{other}"), strict=True):
            alone = EdgeMeter(LABEL_SETS["nyud"].edge_max_dist, [reader])
            assert alone.compute(alone.image(guess, truth))[f"odsF{suffix}"] == found[f"odsF{suffix}"]


@pytest.mark.parametrize("name", BASELINES)
def test_named_baselines_are_over_metrics_that_there_are(name: str) -> None:
    baseline = BASELINES[name]
    for task, (metric, _) in baseline.figures.items():
        meter = make_meter(task, baseline.label_set, baseline.protocol)
        shapes = {"unit_vector": (24, 30, 3)}
        ones = np.ones(shapes.get(TASKS[task].kind, (24, 30)), np.int64)
        assert metric in meter.compute(meter.image(ones, ones > 0 if task == "edge" else ones))


@pytest.mark.parametrize("protocol", ["A", "B"])
@pytest.mark.parametrize(
    ("label_set", "task"), [(name, task) for name in LABEL_SETS for task in LABEL_SETS[name].tasks]
)
def test_headline_metric_is_reported_for_one_or_many_totals(label_set: str, task: str, protocol: str) -> None:
    rng = np.random.default_rng(0)
    size = (24, 30)
    classes = len(LABEL_SETS[label_set].classes.get(task, "ab"))
    kinds = {
        "argmax": (rng.integers(0, classes, size), rng.integers(0, classes, size)),
        "identity": (rng.random(size) + 1, rng.random(size) + 1),
        "unit_vector": (rng.normal(size=(*size, 3)), rng.normal(size=(*size, 3))),
        "sigmoid": (rng.random(size), rng.integers(0, 2, size)),
    }
    guess, label = kinds[TASKS[task].kind]
    label = label > 0 if task == "edge" else label
    meter = make_meter(task, label_set, protocol)
    row = meter.image(guess, label)
    once, many = meter.compute(row), meter.compute(np.stack([row, 3 * row]))
    assert TASKS[task].metric in once
    for name, value in once.items():
        # Metrics are ratios of sums: the same images three times over score the same.
        np.testing.assert_allclose(many[name], [value, value], rtol=1e-9, equal_nan=True)
