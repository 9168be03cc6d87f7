"""From an image to what enters a network: resized, normalised, placed in the middle of a larger size."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from m3vit.normalisation import Normalisation


def normalise(image: Tensor, normalisation: Normalisation) -> Tensor:
    """Turn RGB uint8 [..., 3, H, W] into normalised float32."""
    scaled = tv.to_dtype(image, torch.float32, scale=True)
    return tv.normalize(scaled, list(normalisation.mean), list(normalisation.std))


def image_tensor(image: NDArray[np.uint8]) -> Tensor:
    """Turn RGB uint8 [H, W, 3] into a uint8 tensor [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_image(image: NDArray[np.uint8], size: tuple[int, int], cubic: bool = False) -> NDArray[np.uint8]:
    """Resize RGB uint8 [H, W, 3]: bilinear, antialiased and rounded, or `cubic`.

    `cubic` is what the published code of protocol A feeds: OpenCV's INTER_CUBIC on float32, not antialiased, clipped to
    0..255, then truncated.
    """
    if image.shape[:2] == tuple(size):
        return image
    pixels = image_tensor(image)
    if cubic:
        exact = F.interpolate(pixels[None].double(), size=tuple(size), mode="bicubic", align_corners=False)[0]
        # A flat area must not lose a level to the last bit of the weights.
        resized = (exact + 1e-6).clamp(0, 255).to(torch.uint8)
    else:
        resized = tv.resize(pixels, list(size), interpolation=tv.InterpolationMode.BILINEAR, antialias=True)
    return resized.permute(1, 2, 0).contiguous().numpy()


def network_input(image: NDArray[np.uint8], size: tuple[int, int], normalisation: Normalisation) -> Tensor:
    """Resize (bilinear, antialiased) RGB uint8 [H, W, 3] to `size` and normalise: float32 [3, *size]."""
    return normalise(image_tensor(resize_image(image, size)), normalisation)


def padded_place(image_size: tuple[int, ...], size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns that an image takes when it is centred in `size`."""
    top, left = (max(0, outer - inner) // 2 for outer, inner in zip(size, image_size, strict=True))
    return slice(top, top + image_size[0]), slice(left, left + image_size[1])
