"""Decoders: modules that turn an encoder's maps into one map at the image's resolution.

A decoder is any ``nn.Module`` built as ``Decoder(channels, patch_size, **options)`` with an
``out_channels`` and ``forward(features, images) -> (B, out_channels, H, W)``. Nothing to subclass
and nothing to register: ``"package.module:Class"`` names one of your own. One that takes
``strides``, a list of int, is told the stride of every map where they differ, and so also fits
encoders whose maps get coarser with depth.
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


def build_decoder(
    name: str,
    channels: Sequence[int],
    patch_size: int,
    strides: Sequence[int] | None = None,
    /,
    **options: Any,
) -> nn.Module:
    """Build a decoder for an encoder.

    Parameters
    ----------
    name : str
        A key of `DECODERS`, or ``"package.module:Class"`` of your own.
    channels : sequence of int
        The encoder's `channels`.
    patch_size : int
        The encoder's `patch_size`.
    strides : sequence of int, optional
        The encoder's `strides`, if it has any.
    **options
        Passed to the decoder.

    Returns
    -------
    nn.Module
        With ``out_channels`` and ``forward(features, images) -> (B, out_channels, H, W)``.

    Raises
    ------
    ConfigError
        If the name or an option is not known; the known ones are listed. If the maps have
        several strides and the decoder takes none.
    """
    factory = find_decoder(name)
    _check_options(name, factory, options)
    where = stride_option(name, factory, patch_size, strides)
    try:
        decoder: nn.Module = factory(list(channels), patch_size, **where, **options)
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


def stride_option(
    name: str, factory: Callable[..., Any], patch_size: int, strides: Sequence[int] | None
) -> dict[str, list[int]]:
    """What a decoder is told of strides: nothing where every map has that of the patches.

    Parameters
    ----------
    name : str
        The decoder's name, for messages.
    factory : callable
        Its class.
    patch_size : int
        The encoder's `patch_size`.
    strides : sequence of int or None
        The encoder's `strides`.

    Returns
    -------
    dict of str to list of int
        Keyword arguments for `factory`.

    Raises
    ------
    ConfigError
        If strides differ and the decoder takes none.
    """
    if strides is None or set(strides) == {patch_size}:
        return {}
    parameters = _parameters(factory)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if parameters and not takes_any and not any(p.name == "strides" for p in parameters):
        raise ConfigError(
            f"decoder {name!r} takes maps of one grid only, the encoder's have strides "
            f"{list(strides)}; give its constructor an argument 'strides', or take a ViT"
        )
    return {"strides": list(strides)}


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except ValueError:  # a builtin says nothing about its parameters
        return []


def _check_options(name: str, factory: Callable[..., Any], options: dict[str, Any]) -> None:
    parameters = _parameters(factory)
    # strides are the encoder's to say
    known = {p.name for p in parameters[2:] if p.kind is not inspect.Parameter.VAR_POSITIONAL}
    known -= {"strides"}
    if not parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        known |= options.keys() - {"strides"}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of decoder {name!r}", option, known)
