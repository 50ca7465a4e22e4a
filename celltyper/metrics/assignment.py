"""One-to-one pairing on a sparse list of candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def best_pairing(
    first: NDArray[np.intp], second: NDArray[np.intp], weights: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Choose the one-to-one subset of candidate pairs with the largest total weight.

    The candidates split into connected components, most of them a single pair, and the
    assignment is solved in each: exact, and never a dense matrix of all against all.

    Parameters
    ----------
    first, second : ndarray of int, shape (p,)
        Row numbers of the two members of every candidate pair, counted from 0 in their own
        tables. No pair occurs twice.
    weights : ndarray of float64, shape (p,)
        Gain of every pair, positive.

    Returns
    -------
    ndarray of int, shape (k,)
        Positions of the chosen candidates, ascending.
    """
    if not len(first):
        return np.empty(0, np.intp)
    n_first = int(first.max()) + 1
    alone = (np.bincount(first)[first] == 1) & (np.bincount(second)[second] == 1)
    chosen = [np.flatnonzero(alone)]
    rest = np.flatnonzero(~alone)
    if len(rest):
        size = n_first + int(second.max()) + 1
        graph = coo_array((np.ones(len(rest)), (first[rest], n_first + second[rest])), (size, size))
        component = connected_components(graph, directed=False)[1][first[rest]]
        order = np.argsort(component, kind="stable")
        cuts = np.flatnonzero(np.diff(component[order])) + 1
        chosen += [_solve(part, first, second, weights) for part in np.split(rest[order], cuts)]
    return np.sort(np.concatenate(chosen))


def _solve(
    part: NDArray[np.intp],
    first: NDArray[np.intp],
    second: NDArray[np.intp],
    weights: NDArray[np.float64],
) -> NDArray[np.intp]:
    rows, row = np.unique(first[part], return_inverse=True)
    cols, col = np.unique(second[part], return_inverse=True)
    gain = np.zeros((len(rows), len(cols)))
    gain[row, col] = weights[part]
    candidate = np.full(gain.shape, -1, np.intp)
    candidate[row, col] = part
    picked = candidate[linear_sum_assignment(gain, maximize=True)]
    found: NDArray[np.intp] = picked[picked >= 0]
    return found
