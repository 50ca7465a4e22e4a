"""Outlines of labels as SVG path data: sharp at any zoom, and light enough for a web page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from celltyper.types import Labels

UNITS = 2
"""Path units per pixel: corners of the paths lie on half pixels."""

_SMOOTH_FROM = 16
"""Loops with at least as many pixel edges keep every second corner only."""


def outline_paths(labels: Labels, groups: NDArray[np.intp], n_groups: int) -> list[str]:
    """SVG path data of the outlines of all labels, one string for every group.

    The outline goes through the midpoints of the pixel edges round a label, so that slanted sides
    come out straight; it is for looking at, not for measuring.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    groups : ndarray of int, shape (at least labels.max() + 1,)
        Group ``0..n_groups - 1`` of every label id as lookup table; -1 leaves the label out.
    n_groups : int
        Number of strings.

    Returns
    -------
    list of str
        Closed paths in `UNITS` per pixel, x to the right and y down; empty for an empty group.

    Examples
    --------
    >>> import numpy as np
    >>> outline_paths(np.array([[5]]), np.array([-1] * 5 + [0]), 1)
    ['M1 0l1 1 -1 1 -1 -1z']
    """
    owner, start, stop, direction, x, y = _edges(labels)
    order, following = _link(owner, start, stop, direction)
    paths: list[list[str]] = [[] for _ in range(n_groups)]
    group = groups[owner[order]].tolist()
    xs, ys, after = x[order].tolist(), y[order].tolist(), following.tolist()
    seen = bytearray(len(after))
    for first in range(len(after)):
        if seen[first] or group[first] < 0:
            continue
        loop, at = [], first
        while not seen[at]:
            seen[at] = 1
            loop.append(at)
            at = after[at]
        if len(loop) >= _SMOOTH_FROM:
            loop = loop[::2]
        paths[group[first]].append(_path([xs[i] for i in loop], [ys[i] for i in loop]))
    return ["".join(path) for path in paths]


def _edges(labels: Labels) -> tuple[NDArray[np.int64], ...]:
    """Pixel edges round labels, clockwise: label, start and end corner, direction, midpoint."""
    padded = np.pad(labels, 1).astype(np.int64)
    inner = padded[1:-1, 1:-1]
    wide = labels.shape[1] + 1
    # Direction 0 east along the top, 1 south along the right, 2 west, 3 north. Of each: the
    # neighbour behind the edge, the start and end corner, and the midpoint in half pixels.
    sides = (
        (padded[:-2, 1:-1], (0, 0), (0, 1), (0, 1)),
        (padded[1:-1, 2:], (0, 1), (1, 1), (1, 2)),
        (padded[2:, 1:-1], (1, 1), (1, 0), (2, 1)),
        (padded[1:-1, :-2], (1, 0), (0, 0), (1, 0)),
    )
    parts = []
    for direction, (neighbour, begin, end, middle) in enumerate(sides):
        r, c = np.nonzero((inner > 0) & (neighbour != inner))
        parts.append(
            (
                inner[r, c],
                (r + begin[0]) * wide + c + begin[1],
                (r + end[0]) * wide + c + end[1],
                np.full(len(r), direction),
                UNITS * c + middle[1],
                UNITS * r + middle[0],
            )
        )
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _link(
    owner: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    direction: NDArray[np.int64],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Order of the edges, and in that order the place of the edge that follows each."""
    corners = int(max(start.max(initial=0), stop.max(initial=0))) + 1
    key = (owner * corners + start) * 4 + direction
    order = np.argsort(key)
    key = key[order]
    following = np.full(len(key), -1)
    base = (owner * corners + stop)[order] * 4
    # Turning right first keeps pixels that touch at a corner apart.
    for turn in (1, 0, 3):
        wanted = base + (direction[order] + turn) % 4
        place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        found = (following < 0) & (key[place] == wanted) if len(key) else following < 0
        following[found] = place[found]
    return order, following


def _path(xs: list[int], ys: list[int]) -> str:
    steps: list[tuple[int, int]] = []
    for i in range(1, len(xs)):
        step = (xs[i] - xs[i - 1], ys[i] - ys[i - 1])
        if steps and steps[-1][0] * step[1] == steps[-1][1] * step[0]:
            steps[-1] = (steps[-1][0] + step[0], steps[-1][1] + step[1])
        else:
            steps.append(step)
    return f"M{xs[0]} {ys[0]}l" + " ".join(f"{dx} {dy}" for dx, dy in steps) + "z"
