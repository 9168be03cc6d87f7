"""A plug-in as somebody outside the package writes it: fields seen from above, how high what grows is, and how wet."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from m3vit.data.opening import add_layout
from m3vit.data.reading import check_size, image_size, read_depth_array, read_image
from m3vit.data.sample import FileSplit
from m3vit.kinds import Kind, add_kind
from m3vit.kinds.pictures import Range, Scale, ramp
from m3vit.label_sets import LabelSet, add_label_set
from m3vit.models.decoders import add_decoder
from m3vit.tasks import Task, add_task


class Share(Kind):
    """A share of 0 to 1 at each pixel; below 0 where it is not known."""

    name, described_as, fill = "share", "share", -1.0

    def valid(self, label: Any) -> Any:
        return label >= 0

    def loss(self, logits: Any, label: Any, counts: Any, **options: float) -> Any:
        return ((logits[:, 0].sigmoid() - label).abs() * self.valid(label)).sum() / counts[0].clamp(min=1)

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return 1 / (1 + np.exp(-logits[:, 0]))

    def meter(self, scoring: Any) -> Any:
        from m3vit.evaluation.meters import Meter

        class MeanError(Meter):
            def image(self, prediction: NDArray[Any], label: NDArray[Any]) -> NDArray[np.float64]:
                return np.array([np.abs(prediction - label)[label >= 0].sum(), (label >= 0).sum()], np.float64)

            def compute(self, totals: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
                return {"error": 100 * totals[..., 0] / np.maximum(totals[..., 1], 1)}

        return MeanError()

    def paint(self, prediction: NDArray[Any], palette: Any = (), limits: Range | None = None) -> NDArray[np.uint8]:
        return ramp(prediction.clip(0, 1))

    def legend(self, prediction: NDArray[Any], task: str, *rest: Any, **options: Any) -> Scale:
        return Scale(task, ramp(np.linspace(0, 1, 256)), 0.0, 1.0)

    def summary(self, prediction: NDArray[Any], entry: Any) -> dict[str, Any]:
        return {"mean": float(prediction.mean())}

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        return np.array([label[label >= 0].sum(), (label >= 0).sum()], np.float64)

    def constant(self, total: NDArray[np.float64]) -> float:
        return float(total[0] / max(total[1], 1))

    def constant_logits(self, constant: float, channels: int) -> NDArray[np.float32]:
        return np.array([np.log(constant / (1 - constant))], np.float32)


class Fields(FileSplit):
    name, title, described = "fields", "Fields", "fields (photos/, height/, wetness/, lists/)"
    label_set, listings = "fields", "lists"
    folders: ClassVar = {"image": ("photos",), "height": ("height",), "wetness": ("wetness",)}
    releases: ClassVar = {"one": {"image": ".png", "height": ".npy", "wetness": ".npy"}}

    def read(self, index: int, kind: str, size: tuple[int, int] | None = None) -> NDArray:
        path = self.path(index, kind)
        if kind == "image":
            return read_image(path)
        check_size(path, label := read_depth_array(path), size or image_size(self.path(index, "image")))
        return label if kind == "height" else label - 1  # stored as 1 to 2, 0 for unknown


def per_pixel(config: Any, backbone: Any) -> Any:
    """Build the decoder: a 1x1 convolution for each task."""
    from torch import nn

    from m3vit.models.decoders.base import PerTask, resize

    class Head(nn.Conv2d):
        def forward(self, tokens: Any, grid: tuple[int, int], size: Any) -> Any:  # type: ignore[override]
            return resize(super().forward(tokens.mT.unflatten(2, grid)), size)

    decoder = PerTask({task: Head(backbone.dim, config.labels.channels(task), 1) for task in config.tasks})
    decoder.no_hls = "it is not made for it"
    return decoder


add_kind(Share())
add_task(Task("height", "identity", "rmse", "m", False, 1.0, output_bias=1.0, value_unit="m"))
add_task(Task("wetness", "share", "error", "%", False, 2.0))
add_label_set(LabelSet("fields", ("height", "wetness"), {}))
add_layout(Fields)
add_decoder("per_pixel", per_pixel)
