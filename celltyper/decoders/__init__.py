"""Decoders: modules that turn an encoder's maps into one map at the image's resolution.

A decoder is any ``nn.Module`` built as ``Decoder(channels, patch_size, **options)`` with an
``out_channels`` and ``forward(features, images) -> (B, out_channels, H, W)``. Nothing to subclass
and nothing to register: ``"package.module:Class"`` names one of your own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from celltyper.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import nn

DECODERS: dict[str, str] = {
    "linear": "celltyper.decoders.linear:LinearDecoder",
    "unetr": "celltyper.decoders.unetr:UnetrDecoder",
    "dpt": "celltyper.decoders.dpt:DptDecoder",
    "unet": "celltyper.decoders.unet:UnetPyramidDecoder",
}
"""Known decoders: name to ``module:Class``, imported on use (MONAI alone takes seconds)."""


def build_decoder(name: str, channels: Sequence[int], patch_size: int, **options: Any) -> nn.Module:
    """Build a decoder for an encoder.

    Parameters
    ----------
    name : str
        A key of `DECODERS`, or ``"package.module:Class"`` of your own.
    channels : sequence of int
        The encoder's `channels`.
    patch_size : int
        The encoder's `patch_size`.
    **options
        Passed to the decoder.

    Returns
    -------
    nn.Module
        With ``out_channels`` and ``forward(features, images) -> (B, out_channels, H, W)``.

    Raises
    ------
    ConfigError
        If the name or an option is not known; the known ones are listed.
    """
    factory = find_decoder(name)
    _check_options(name, factory, options)
    try:
        decoder: nn.Module = factory(list(channels), patch_size, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ConfigError(f"decoder {name!r} cannot be built with ({given}): {error}") from error
    if not isinstance(getattr(decoder, "out_channels", None), int):
        raise ConfigError(f"decoder {name!r} has no integer attribute out_channels")
    return decoder


def find_decoder(name: str) -> Callable[..., Any]:
    """Import the class behind a decoder's name; see `build_decoder`."""
    target = DECODERS.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not colon:
        raise unknown_name("decoder", name, [*DECODERS, "package.module:Class"])
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"decoder {name!r}: cannot import {module_name!r} ({error}); is it installed or on "
            "PYTHONPATH?"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"decoder {name!r}: module {module_name!r} has no class {attribute!r}")
    factory: Callable[..., Any] = found
    return factory


def _check_options(name: str, factory: Callable[..., Any], options: dict[str, Any]) -> None:
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError:  # a builtin says nothing about its parameters
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters[2:] if p.kind is not inspect.Parameter.VAR_POSITIONAL}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of decoder {name!r}", option, known)
