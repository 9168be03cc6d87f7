"""The loader against files in the published layout, whole and broken; augmentation; batch order."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader, open_split
from m3vit.data.nyud import NYUD
from m3vit.data.transforms import image_tensor, label_tensor, mirror, network_input, training_pair
from m3vit.errors import InputError
from m3vit.tasks import IGNORE

MakeData = Callable[..., Path]


def test_label_conventions(make_data: MakeData, tmp_path: Path) -> None:
    root = make_data(tmp_path / "d", train=1, val=1)
    stored = np.zeros((32, 48), np.uint8)
    stored[0, 0], stored[0, 1] = 1, 40
    Image.fromarray(stored).save(root / "segmentation" / "0000.png")
    sample = NYUD(root, "train").load(0)
    assert sample.labels["semseg"][0, :3].tolist() == [0, 39, IGNORE]
    assert {name: (label.dtype, label.shape) for name, label in sample.labels.items()} == {
        "semseg": (np.uint8, (32, 48)),
        "depth": (np.float32, (32, 48)),
        "normals": (np.float32, (32, 48, 3)),
        "edge": (np.uint8, (32, 48)),
    }
    assert sample.image.dtype == np.uint8 and sample.image.shape == (32, 48, 3)


def damage_truncate(root: Path) -> str:
    path = root / "depth" / "0000.npy"
    path.write_bytes(path.read_bytes()[:200])
    return "0000.npy"


def damage_missing(root: Path) -> str:
    (root / "edge" / "0000.npy").unlink()
    return r"0000.npy not found, though gt_sets lists it"


def damage_class(root: Path) -> str:
    Image.fromarray(np.full((32, 48), 41, np.uint8)).save(root / "segmentation" / "0000.png")
    return r"0000.png cannot be read \(expected uint8 ids 0..40"


def damage_size(root: Path) -> str:
    np.save(root / "normals" / "0000.npy", np.zeros((32, 47, 3), np.float32))
    return r"0000.npy has shape \(32, 47, 3\)"


def damage_image(root: Path) -> str:
    (root / "images" / "0000.jpg").write_bytes(b"not a picture")
    return r"0000.jpg cannot be read"


def damage_pickle(root: Path) -> str:
    np.save(root / "depth" / "0000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return r"0000.npy cannot be read"


def damage_nan(root: Path) -> str:
    np.save(root / "depth" / "0000.npy", np.full((32, 48), np.nan, np.float32))
    return r"0000.npy cannot be read \(holds values that are not finite"


def damage_text(root: Path) -> str:
    np.save(root / "depth" / "0000.npy", np.full((32, 48), "far"))
    return r"0000.npy cannot be read"


@pytest.mark.parametrize(
    "damage",
    [damage_text, damage_truncate, damage_missing, damage_class, damage_size, damage_image, damage_pickle, damage_nan],
)
def test_a_bad_file_is_named(make_data: MakeData, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    root = make_data(tmp_path / "d", train=1, val=1)
    message = damage(root)
    with pytest.raises(InputError, match=message):
        NYUD(root, "train").load(0)


def test_a_bad_root_is_explained(make_data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data root .* not found"):
        NYUD(tmp_path / "none", "train")
    with pytest.raises(InputError, match="not in the NYUD_MT layout"):
        NYUD(tmp_path, "train")
    with pytest.raises(InputError, match=r"--data\.root"):
        open_split("nyud", "", "train", [])
    root = make_data(tmp_path / "d", train=1, val=1)
    (root / "images" / "0000.jpg").rename(root / "images" / "0000.png")
    with pytest.raises(InputError, match="NYUDv2 release"):
        NYUD(root, "train")


def test_mirror_is_its_own_inverse_and_negates_normals_in_x(tiny_data: Path) -> None:
    sample = NYUD(tiny_data, "train").load(0)
    sample.labels["normals"][..., :] = [0.6, 0.0, 0.8]
    image = image_tensor(sample.image)
    labels = {task: label_tensor(task, label) for task, label in sample.labels.items()}
    once = mirror(image, labels)
    assert once[1]["normals"][:, 0, 0].tolist() == pytest.approx([-0.6, 0.0, 0.8])
    assert torch.equal(once[1]["depth"][:, 0], labels["depth"][:, -1])
    twice = mirror(*once)
    assert torch.equal(twice[0], image)
    assert all(torch.equal(twice[1][task], labels[task]) for task in labels)


def test_normalisation_and_resizing(tiny_data: Path) -> None:
    grey = np.full((32, 48, 3), 255, np.uint8)
    # (1 - mean) / std of ImageNet, channel by channel
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert network_input(grey, (16, 24)).mean(dim=(1, 2)).tolist() == pytest.approx(expected, rel=1e-5)
    sample = NYUD(tiny_data, "train").load(0)
    image, labels = training_pair(sample, (16, 24), np.random.default_rng(0), flip=False, colour=0.0)
    assert image.shape == (3, 16, 24)
    assert {task: tuple(label.shape) for task, label in labels.items()} == {
        "semseg": (16, 24),
        "depth": (16, 24),
        "normals": (3, 16, 24),
        "edge": (16, 24),
    }
    assert set(labels["semseg"].unique().tolist()) <= set(np.unique(sample.labels["semseg"]).tolist())
    torch.testing.assert_close(labels["normals"].norm(dim=0), torch.ones(16, 24))


def test_batches_do_not_depend_on_workers_or_on_where_training_resumed(tiny_data: Path) -> None:
    def batches(workers: int, start: int) -> list[torch.Tensor]:
        dataset = TrainingSet(NYUD(tiny_data, "train"), (32, 48), seed=1, colour=0.2)
        order = EpochBatches(len(dataset), 3, seed=1)
        order.epoch, order.start = 2, start
        return [images for images, _ in make_loader(dataset, order, workers)]

    straight = batches(workers=0, start=0)
    assert len(straight) == 3  # ten images, the short batch is dropped
    assert all(torch.equal(a, b) for a, b in zip(straight, batches(workers=2, start=0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight[1:], batches(workers=0, start=1), strict=True))


def test_an_epoch_holds_each_image_once_and_epochs_differ() -> None:
    order = EpochBatches(10, 3, seed=0)
    epochs = []
    for order.epoch in range(2):
        epochs.append([index for batch in order for _, index in batch])
    assert all(len(set(epoch)) == len(epoch) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    with pytest.raises(InputError, match="batch_size 4 is more than the 3 training images"):
        EpochBatches(3, 4, seed=0)
