"""Maximum one-to-one matching of boundary pixels, for up to 64 predicted maps of one image at once.

Bit k of a 64-bit word per pixel says whether the pixel is in map k, so that the thresholds of an image share every
step that does not depend on the matching. H, W rows and columns; P predicted pixels, T true pixels, K maps; a
vertex of the K graphs is numbered map * (P or T) + pixel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Ints = NDArray[np.integer]
Pairs = list[tuple[Ints, Ints]]  # per offset: predicted pixels and the true pixels at that offset from them

MAX_MAPS = 64
FREE, ABSENT = -1, -2  # mates of a pixel that has none, and of a pixel that is not in that map
_MAX_EDGES = 1 << 21  # looked at in one numpy call: bounds the memory


@dataclass
class _Neighbours:
    """Row i of a sparse graph is targets[starts[i] : starts[i + 1]]."""

    starts: Ints
    targets: Ints

    @classmethod
    def of(cls, pairs: Pairs, num_rows: int) -> "_Neighbours":
        """Group (row, target) pairs by row. Within one element of `pairs` no row occurs twice."""
        degrees = np.zeros(num_rows, np.int64)
        for rows, _ in pairs:
            degrees[rows] += 1
        starts = np.concatenate([[0], degrees.cumsum()])
        targets, fill = np.empty(starts[-1], np.int32), starts[:-1].copy()
        for rows, others in pairs:
            targets[fill[rows]] = others
            fill[rows] += 1
        return cls(starts, targets)

    def expand(self, rows: Ints) -> tuple[Ints, Ints]:
        """Return all neighbours of some rows: positions in `rows` and targets, both [edges]."""
        first, degree = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        source = np.repeat(np.arange(len(rows)), degree)
        edge = np.arange(len(source)) + np.repeat(first - (degree.cumsum() - degree), degree)
        return source, self.targets[edge]

    def expand_maps(self, vertices: Ints, num_rows: int) -> Iterator[tuple[Ints, Ints, Ints, Ints]]:
        """Yield, for parts of the vertices of the K graphs: their maps, themselves, and `expand` of their rows."""
        map_of = vertices // num_rows
        rows = vertices - map_of * num_rows
        edges = int((self.starts[rows + 1] - self.starts[rows]).sum())
        for part in np.array_split(np.arange(len(vertices)), 1 + edges // _MAX_EDGES):
            yield map_of[part], vertices[part], *self.expand(rows[part])


def matching_sizes(words: Words, truth: NDArray[np.bool_], max_distance_px: float, num_maps: int) -> Ints:
    """Return the sizes [K] of maximum matchings between each map of `words` [H, W] and `truth` [H, W].

    A predicted and a true pixel may match if they are at most the distance apart, inclusive; each matches once.
    """
    # The tools (BSDS500's correspondPixels) minimise the summed distance, at a cost of 100 maximum distances for
    # every pixel left out. A matching with one pair more saves that cost, and pays at most the maximum distance
    # for each new pair on the augmenting path: their optimum has maximum size too, unless the shortest
    # augmenting path has more than 100 new pairs. With a single truth map only that size enters the counts.
    # (The compiled tool offers each pixel but 6 random ways to stay alone, and so ended up to 0.1 % below this.)
    radius = int(max_distance_px)
    row = words.shape[1] + 2 * radius  # padded so that no offset wraps around
    flat_words, flat_truth = np.pad(words, radius).ravel(), np.pad(truth, radius).ravel()
    predicted, true = np.flatnonzero(flat_words), np.flatnonzero(flat_truth)
    if not len(predicted) or not len(true):
        return np.zeros(num_maps, np.int64)
    number = np.full(flat_truth.shape, -1, np.int32)
    number[true] = np.arange(len(true))

    # All pairs at one offset are disjoint, so they are matched in one step, in every map. Farthest first leaves the
    # fewest to be found by search, a few percent: pixels at the rim of a cluster have no other partners.
    free_P, free_T = flat_words[predicted], np.full(len(true), ~np.uint64(0))
    pairs: Pairs = []
    matched: list[tuple[Ints, Ints, Words]] = []
    for offset in _offsets(max_distance_px, row):
        t = number[predicted + offset]
        p: Ints = np.flatnonzero(t >= 0)
        t = t[p]
        pairs.append((p, t))
        both = free_P[p] & free_T[t]
        hit = np.flatnonzero(both)
        p, t, both = p[hit], t[hit], both[hit]
        free_P[p] ^= both
        free_T[t] ^= both
        matched.append((p, t, both))

    mate_P = np.full((num_maps, len(predicted)), ABSENT, np.int32)
    mate_P[_bits(flat_words[predicted], num_maps).T > 0] = FREE
    mate_T = np.full((num_maps, len(true)), FREE, np.int32)
    for p, t, both in matched:
        pair, k = np.nonzero(_bits(both, num_maps))
        mate_P[k, p[pair]] = t[pair]
        mate_T[k, t[pair]] = p[pair]
    _complete(mate_P, mate_T, pairs)
    return np.count_nonzero(mate_T >= 0, axis=1)


def _offsets(max_distance_px: float, row: int) -> Ints:
    """Return the offsets in a flat grid of this row length within the distance, farthest first."""
    radius = int(max_distance_px)
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    squared = dy**2 + dx**2
    order = np.argsort(-squared, kind="stable")
    order = order[squared[order] <= max_distance_px * max_distance_px]  # as correspondPixels compares
    return (dy * row + dx)[order]


def _bits(words: Words, num_maps: int) -> NDArray[np.uint8]:
    """Return the bits [N, K] of words [N]."""
    as_bytes = words.astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(as_bytes, axis=1, count=num_maps, bitorder="little")


def _complete(mate_P: Ints, mate_T: Ints, pairs: Pairs) -> None:
    """Enlarge the matchings mate_P [K, P], mate_T [K, T] to maximum size, in place."""
    swapped = [(t, p) for p, t in pairs]
    degree_P, degree_T = (
        sum(np.bincount(side, minlength=mate.shape[1]) for side, _ in graph)
        for mate, graph in ((mate_P, pairs), (mate_T, swapped))
    )
    # An augmenting path ends in a free pixel on either side, so searching from one side is enough. Take the one
    # whose free pixels have fewer neighbours: with none, the matching is maximum already.
    cost_P, cost_T = (mate_P == FREE) @ degree_P, (mate_T == FREE) @ degree_T
    from_truth = cost_T < cost_P
    from_predicted = ~from_truth & (cost_P > 0)
    from_truth &= cost_T > 0
    if from_predicted.any() or from_truth.any():
        of_P, of_T = _Neighbours.of(pairs, mate_P.shape[1]), _Neighbours.of(swapped, mate_T.shape[1])
    if from_predicted.any():
        _augment(mate_P, mate_T, of_P, of_T, from_predicted)
    if from_truth.any():
        _augment(mate_T, mate_P, of_T, of_P, from_truth)


def _augment(mate_A: Ints, mate_B: Ints, of_A: _Neighbours, of_B: _Neighbours, maps: NDArray[np.bool_]) -> None:
    """Augment the matchings of some maps [K] from their free A pixels until no augmenting path is left.

    Breadth-first search from all free pixels of all maps together (MS-BFS-Graft: Azad, Buluc, Pothen, TPDS 2017).
    Trees share no pixel, so each may be augmented once a phase; a pixel is visited once a phase, hence a phase costs at
    most the edges of the graphs, and there are at most as many phases as free pixels: 10 to 20 on
    edge maps, over 100 between two maps of dense noise. A tree that found no free pixel stays, and takes over what
    others have left: most free pixels stay free, and their trees are the largest.
    """
    num_A, num_B = mate_A.shape[1], mate_B.shape[1]
    flat_A, flat_B = mate_A.reshape(-1), mate_B.reshape(-1)  # views
    parent_B = np.full(flat_B.shape, -1, np.int32)  # the A vertex from which B was reached
    root_A = np.full(flat_A.shape, -1, np.int32)  # -1: in no tree
    end_of = np.full(flat_A.shape, -1, np.int32)  # per root: the free B vertex its tree has found
    degree_A, degree_B = np.diff(of_A.starts), np.diff(of_B.starts)

    def attach(b: Ints, a: Ints) -> Ints:
        """Let b be reached from a; return the A vertices that follow."""
        parent_B[b] = a
        last = parent_B[b] == a  # of several A vertices reaching the same B, the last one written
        b, a = b[last], a[last]
        reached.append(b)
        mate = flat_B[b]
        found = mate == FREE
        end_of[root_A[a[found]]] = b[found]
        b, a, mate = b[~found], a[~found], mate[~found]
        following = b // num_B * num_A + mate
        root_A[following] = root_A[a]
        return following

    def expand(frontier: Ints) -> Iterator[Ints]:
        """Reach the new neighbours of A vertices."""
        for k, part, source, target in of_A.expand_maps(frontier, num_A):
            b = k[source] * num_B + target
            new = np.flatnonzero((parent_B[b] < 0) & (flat_B[b] != ABSENT))
            yield attach(b[new], part[source[new]])

    def graft(left: Ints) -> Iterator[Ints]:
        """Reach B vertices from trees that stayed."""
        for k, part, source, target in of_B.expand_maps(left, num_B):
            a = k[source] * num_A + target
            growing = np.flatnonzero(root_A[a] >= 0)
            yield attach(part[source[growing]], a[growing])

    free = np.flatnonzero((mate_A == FREE) & (degree_A > 0) & maps[:, None])
    reached: list[Ints] = []  # B vertices in trees
    root_A[free] = free
    frontier = free
    while True:
        while len(frontier):
            frontier = frontier[end_of[root_A[frontier]] < 0]
            frontier = np.concatenate([frontier[:0], *expand(frontier)])
        successful = free[end_of[free] >= 0]
        if not len(successful):
            return
        b: Ints = end_of[successful]
        while len(b):  # flip all paths, one pair of each at a time
            parent, k = parent_B[b], b // num_B
            before = flat_A[parent]
            flat_A[parent] = b - k * num_B
            flat_B[b] = parent - k * num_A
            b = (k * num_B + before)[before >= 0]
        in_trees = np.concatenate(reached)
        done = end_of[root_A[parent_B[in_trees]]] >= 0
        left, stay = in_trees[done], in_trees[~done]
        free = free[end_of[free] < 0]
        end_of[successful] = -1
        grown = flat_B[stay]
        to_grow = degree_A[free % num_A].sum() + degree_A[grown[grown >= 0]].sum()
        if degree_B[left % num_B].sum() > to_grow:  # growing them once more takes fewer edges
            improved = np.zeros(len(maps), bool)
            improved[successful // num_A] = True
            free = free[improved[free // num_A]]  # a phase without any success in a map has searched it all
            left, stay = in_trees, in_trees[:0]
        parent_B[left] = -1
        mate = flat_B[left]
        root_A[(left // num_B * num_A + mate)[mate >= 0]] = -1
        reached = [stay]
        if len(stay):
            frontier = np.concatenate([left[:0], *graft(left)])
        else:
            root_A[free] = free
            frontier = free
