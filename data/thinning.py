"""Boundaries one pixel wide: morphological thinning, and the edge maps made from label maps. No torch.

`thin` is the algorithm of MATLAB's bwmorph(..., "thin", Inf) and of skimage.morphology.thin: Guo & Hall, "Parallel
thinning with two-subiteration algorithms" (Comm. ACM 32, 1989), in the formulation of Lam, Lee & Suen, "Thinning
methodologies" (IEEE PAMI 14, 1992).
"""

import numpy as np
from numpy.typing import NDArray

# Neighbours x1..x8 of a pixel as Lam et al. number them: east, then counter-clockwise. (row, column) steps.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def _table(second: bool) -> NDArray[np.bool_]:
    """Return what becomes of a pixel in a sub-iteration, for each of the 512 states of its 3 × 3 neighbourhood.

    Bits 0..7 of the index are x1..x8, bit 8 is the pixel itself. A set pixel goes if all three conditions hold:
    G1 one crossing: exactly one i has x(2i-1) = 0 and x(2i) or x(2i+1) set, so taking it away disconnects nothing;
    G2 2 <= min(n1, n2) <= 3 neighbours, counted in the two ways of pairing them, so it is not the end of a line;
    G3 it lies on the side of its region that this sub-iteration peels off: east and north first, then west and south.
    """
    table = np.zeros(512, np.bool_)
    for code in range(256):
        x = [code >> bit & 1 for bit in range(8)] * 2  # x[0] is x1; twice, so that x9 is x1
        crossings = sum(not x[2 * i] and (x[2 * i + 1] or x[2 * i + 2]) for i in range(4))
        n1 = sum(x[2 * i] | x[2 * i + 1] for i in range(4))
        n2 = sum(x[2 * i + 1] | x[2 * i + 2] for i in range(4))
        turn = 4 if second else 0  # the second condition is the first, turned by 180 degrees
        keeps = (x[1 + turn] or x[2 + turn] or not x[7 + turn]) and x[turn]
        table[256 + code] = not (crossings == 1 and 2 <= min(n1, n2) <= 3 and not keeps)
    return table


TABLES = (_table(second=False), _table(second=True))


def thin(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return `mask` [H, W] thinned until nothing changes; outside the image is background."""
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint16)
    inner = padded[1:-1, 1:-1]
    inner[:] = mask
    # Only pixels that are set can change, and few of a label map's pixels are: look up those alone.
    at = np.flatnonzero(padded)
    flat = padded.reshape(-1)
    steps = [rows * (width + 2) + columns for rows, columns in NEIGHBOURS]
    changed = True
    while changed:
        changed = False
        for table in TABLES:
            code = np.full(at.shape, 256, np.uint16)
            for bit, step in enumerate(steps):
                code += flat[at + step] << bit
            stays = table[code]
            if not stays.all():
                changed = True
                flat[at[~stays]] = 0
                at = at[stays]
    return inner.astype(np.bool_)


def segmentation_boundaries(ids: NDArray) -> NDArray[np.bool_]:
    """Return the boundaries [H, W] of a map of ids [H, W] that published odsF figures are scored against.

    A pixel is a boundary if its id differs from that of its east, south or south-east neighbour; then they are thinned.
    Source: jponttuset/seism, src/piotr_edges/edgesEvalImg.m, bwmorph(seg2bmap(G), 'thin', 'Inf') with BSDS's seg2bmap.
    """
    boundary = np.zeros(ids.shape, np.bool_)
    boundary[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    boundary[:-1, :] |= ids[:-1, :] != ids[1:, :]
    boundary[:-1, :-1] |= ids[:-1, :-1] != ids[1:, 1:]
    return thin(boundary)


def laplacian_boundaries(ids: NDArray) -> NDArray[np.bool_]:
    """Return the edges [H, W] that the literature trains on: where the Laplacian of the ids is not 0, thinned.

    Two pixels wide before thinning, and blind where ids rise by equal steps (1, 2, 3). The kernel is 0 1 0 / 1 -4 1 /
    0 1 0 with mirrored borders (cv2.Laplacian's defaults). Source: _load_edge in data/pascal_context.py of
    SimonVandenhende/Multi-Task-Learning-PyTorch and of prismformore/Multi-Task-Transformer.
    """
    # "reflect" is OpenCV's BORDER_REFLECT_101, except that an image one pixel high or wide has nothing to mirror.
    rows, columns = ("reflect" if side > 1 else "edge" for side in ids.shape)
    padded = np.pad(np.pad(ids.astype(np.int32), ((1, 1), (0, 0)), rows), ((0, 0), (1, 1)), columns)  # type: ignore[call-overload]
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return thin(around != 4 * padded[1:-1, 1:-1])
