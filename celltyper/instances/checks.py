"""Checks that instance methods share: their parameters, and the maps they are given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import ConfigError, DataError
from celltyper.types import Maps, MapSpec


def check_bounds(method: str, **values: tuple[float, float, float]) -> None:
    """Refuse parameters outside of their bounds.

    Parameters
    ----------
    method : str
        Name of the instance method, for the message.
    **values
        ``(value, lowest, highest)`` by parameter, bounds included.

    Raises
    ------
    ConfigError
        At the first parameter outside of its bounds, or not a number.
    """
    for name, (value, low, high) in values.items():
        if not low <= value <= high:
            limits = f"from {low:g} to {high:g}" if high < np.inf else f"at least {low:g}"
            raise ConfigError(f"instance method {method!r}: {name} must be {limits}, got {value}")


def checked_maps(maps: Maps, specs: Mapping[str, MapSpec]) -> dict[str, NDArray[np.float32]]:
    """Maps that a decoder needs, as contiguous float32 arrays of one size.

    Parameters
    ----------
    maps : mapping of str to ndarray of float32, shape (C, H, W)
        Activated maps; more than needed is fine.
    specs : mapping of str to MapSpec
        What the instance method needs.

    Returns
    -------
    dict
        The needed maps; copied only where they are not contiguous float32.

    Raises
    ------
    DataError
        If a map is missing or has another shape.
    """
    size = None
    found = {}
    for name, spec in specs.items():
        if name not in maps:
            raise DataError(f"map {name!r} is missing (given: {', '.join(sorted(maps))})")
        values = np.ascontiguousarray(maps[name], np.float32)
        size = values.shape[-2:] if size is None else size
        if values.shape != (spec.channels, *size) or len(size) != 2:
            wanted = f"({spec.channels}, H, W)" if len(size) != 2 else (spec.channels, *size)
            raise DataError(f"map {name!r} must be {wanted}, got {values.shape}")
        found[name] = values
    return found
