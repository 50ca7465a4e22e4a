"""Instance methods: labels to training targets, predicted maps to labels."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from celltyper.errors import ConfigError, unknown_name
from celltyper.instances.centers import Centers
from celltyper.instances.distance import Distance
from celltyper.instances.hv import HV
from celltyper.types import InstanceMethod

__all__ = ["HV", "METHODS", "Centers", "Distance", "build_instances"]

METHODS: dict[str, type[InstanceMethod]] = {
    "hv": HV,
    "distance": Distance,
    "centers": Centers,
}
"""Instance methods by name; a new one is one file and one line here."""


def build_instances(name: str, **options: Any) -> InstanceMethod:
    """Build an instance method by name.

    Parameters
    ----------
    name : str
        A key of `METHODS`, or ``"package.module:Class"`` for a class of your own that has
        ``maps``, ``encode`` and ``decode`` (`celltyper.types.InstanceMethod`).
    **options
        Parameters of the class.

    Returns
    -------
    InstanceMethod
        The method.

    Raises
    ------
    ConfigError
        If the name or an option is unknown, the class cannot be imported, or it does not fit.

    Examples
    --------
    >>> build_instances("hv", min_area=20).min_area
    20
    """
    build = _load(name) if ":" in name else METHODS.get(name)
    if build is None:
        raise unknown_name("instance method", name, METHODS)
    if is_dataclass(build):
        known = [field.name for field in fields(build) if field.init]
        for option in options:
            if option not in known:
                raise unknown_name(f"option of instance method {name!r}:", option, known)
    try:
        method: object = build(**options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"instance method {name!r} cannot be built: {error}") from error
    if not isinstance(method, InstanceMethod):
        raise ConfigError(f"instance method {name!r} must have maps, encode and decode")
    return method


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"instance method {name!r} cannot be imported ({error}); give package.module:Class"
        ) from error
