"""Losses against hand-worked numbers; ignored pixels have no say."""

import math

import pytest
import torch
from torch import Tensor

from m3vit.kinds import KINDS
from m3vit.tasks import IGNORE, TASKS
from m3vit.training.config import TrainConfig
from m3vit.training.losses import BatchCounts, loss_options, subsample, task_loss

OPTIONS = {task: loss_options(task, TrainConfig(edge_positive_weight=0.95)) for task in TASKS}


def loss(kind: str, logits: Tensor, label: Tensor, **options: float) -> Tensor:
    return KINDS[kind].loss(logits, label, KINDS[kind].counts(label), **options)


def test_cross_entropy_over_labelled_pixels() -> None:
    logits = torch.tensor([[[[math.log(3), 0.0, 9.0]], [[0.0, 0.0, 0.0]]]])  # [1, 2, 1, 3]
    label = torch.tensor([[[0, 1, IGNORE]]])
    # -log(3/4) and -log(1/2)
    assert loss("argmax", logits, label).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_depth_l1_over_valid_pixels() -> None:
    found = loss("identity", torch.tensor([[[[1.0, 5.0, 7.0]]]]), torch.tensor([[[2.0, 2.0, 0.0]]]))
    assert found.item() == pytest.approx(2.0)


def test_normals_l1_on_the_normalised_prediction() -> None:
    predicted = torch.tensor([[0.0, 0, 3], [0, 4, 3], [1, 0, 0]]).T.reshape(1, 3, 1, 3)
    truth = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]]).T.reshape(1, 3, 1, 3)
    # second pixel: (0, .8, .6) against (0, 0, 1): .8 + .4 = 1.2; two valid pixels of three components: 1.2 / 6
    assert loss("unit_vector", predicted, truth).item() == pytest.approx(0.2)


def test_balanced_bce() -> None:
    logits = torch.tensor([[[[0.0, 0.0, 50.0]]]])
    label = torch.tensor([[[1, 0, IGNORE]]], dtype=torch.uint8)
    # log 2 for both pixels, weighed .95 and .05, over two valid pixels
    assert loss("sigmoid", logits, label, positive_weight=0.95).item() == pytest.approx(math.log(2) / 2)


def test_saliency_is_balanced_over_the_batch_as_hed_does() -> None:
    # Two images, 3 negatives and 1 positive valid pixels in all: positives weigh 3/4, negatives 1/4.
    logits = torch.tensor([0.0, 0.0, math.log(3), 0.0, 0.0, 7.0]).view(2, 1, 1, 3)
    label = torch.tensor([[[0, 1, 0]], [[0, IGNORE, IGNORE]]], dtype=torch.uint8)
    # -log(1/2) of pixels 1, 2 and 4, -log(1 - 3/4) = 2 log 2 of pixel 3; over four pixels
    expected = (0.25 * math.log(2) + 0.75 * math.log(2) + 0.25 * 2 * math.log(2) + 0.25 * math.log(2)) / 4
    assert task_loss("saliency", logits, label, OPTIONS["saliency"]).item() == pytest.approx(expected)


def test_balanced_bce_is_the_published_sum() -> None:
    # M3ViT's code: (w * sum over positives + (1 - w) * sum over negatives) / pixels, fixed w or the negatives' share.
    rng = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2, 1, 4, 5, generator=rng)
    label = (torch.rand(2, 4, 5, generator=rng) < 0.3).to(torch.uint8)
    pixels = -torch.log(torch.where(label > 0, logits[:, 0].sigmoid(), 1 - logits[:, 0].sigmoid()))
    for weight in (0.95, None):
        w = weight or (label == 0).float().mean()
        published = (w * pixels[label > 0].sum() + (1 - w) * pixels[label == 0].sum()) / label.numel()
        options = {} if weight is None else {"positive_weight": weight}
        torch.testing.assert_close(loss("sigmoid", logits, label, **options), published, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_add_up() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = {
        "semseg": torch.randint(0, 3, (4, 4, 6), generator=rng),
        "depth": torch.rand(4, 4, 6, generator=rng),
        "normals": torch.nn.functional.normalize(torch.randn(4, 3, 4, 6, generator=rng), dim=1),
        "saliency": torch.randint(0, 2, (4, 4, 6), generator=rng, dtype=torch.uint8),
    }
    labels["semseg"][0, 1:], labels["depth"][1, 1:], labels["normals"][2, :, 1:] = IGNORE, 0, 0
    labels["saliency"][3, 1:] = IGNORE
    counts = BatchCounts(labels)
    for task, channels in (("semseg", 3), ("depth", 1), ("normals", 3), ("saliency", 1)):
        logits = torch.randn(4, channels, 2, 3, generator=rng)  # coarser: labels are subsampled
        whole = task_loss(task, logits, labels[task], OPTIONS[task])
        parts = [task_loss(task, logits[i : i + 1], labels[task][i : i + 1], OPTIONS[task], counts) for i in range(4)]
        torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize(
    ("task", "channels"), [("semseg", 40), ("depth", 1), ("normals", 3), ("edge", 1), ("saliency", 1)]
)
def test_nothing_labelled_means_no_loss_and_no_gradient(task: str, channels: int) -> None:
    logits = torch.randn(1, channels, 2, 2, requires_grad=True)
    unlabelled = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    ignored = {"semseg": unlabelled.long(), "edge": unlabelled, "saliency": unlabelled}
    label = ignored.get(task, torch.zeros(1, 3, 2, 2) if task == "normals" else torch.zeros(1, 2, 2))
    found = task_loss(task, logits, label, OPTIONS[task])
    found.backward()
    assert found.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_subsample_is_centred() -> None:
    label = torch.arange(16).view(1, 4, 4)
    assert [part.tolist() for part in subsample(label, (2, 2))] == [[[[0, 2], [8, 10]]], [[[5, 7], [13, 15]]]]
    assert subsample(label, (4, 4))[0] is label
    assert [part.tolist() for part in subsample(torch.arange(9).view(1, 3, 3), (1, 1))] == [[[[4]]]]
    with pytest.raises(ValueError, match="not a whole factor"):
        subsample(label, (3, 2))


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_subsampled_ramp_is_where_bilinear_resizing_puts_it(factor: int) -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0 * factor), torch.arange(8.0 * factor), indexing="ij")
    ramp = (rows + 3 * columns)[None]
    coarse = torch.stack(subsample(ramp, (8, 8))).mean(dim=0)[None]
    back = torch.nn.functional.interpolate(coarse, scale_factor=factor, mode="bilinear", align_corners=False)[0]
    inside = slice(factor, -factor)  # the border is clamped
    torch.testing.assert_close(back[:, inside, inside], ramp[:, inside, inside])


def test_coarse_logits_are_trained_on_both_diagonal_pixels() -> None:
    # depth label (1, 2 / 3, 4) under one output of 2.0: pixels 1 and 4, errors 1 and 2
    found = task_loss("depth", torch.full((1, 1, 1, 1), 2.0), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), {})
    assert found.item() == pytest.approx(1.5)


def test_only_edges_have_a_fixed_weight() -> None:
    given = {task: loss_options(task, TrainConfig(edge_positive_weight=0.9)) for task in TASKS}
    assert given == {task: {"positive_weight": 0.9} if task == "edge" else {} for task in TASKS}
