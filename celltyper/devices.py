"""Where a model computes, and in which precision it does so there."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from celltyper.errors import ConfigError


def pick_device(device: str = "auto") -> torch.device:
    """Choose where to compute.

    Parameters
    ----------
    device : str
        ``"auto"`` takes CUDA, then MPS, then the CPU; anything else is torch's name of a device.

    Returns
    -------
    torch.device

    Raises
    ------
    ConfigError
        If the device is unknown or not available.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"device {device!r} is not available here ({first}); use auto or cpu"
        ) from error


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Context of mixed precision, refused where it would be slower than float32.

    Parameters
    ----------
    device : torch.device
    precision : {"fp32", "bf16", "fp16"}

    Returns
    -------
    context manager

    Raises
    ------
    ConfigError
        For fp16 on a CPU, or bf16 on a CPU without the instructions (2 to 9 times slower there).
    """
    if precision == "fp32":
        return nullcontext()
    if device.type == "cpu" and (precision == "fp16" or not _has_bf16_instructions()):
        raise ConfigError(f"precision {precision} is not supported by this CPU; use fp32")
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 itself; emulation is slower than float32.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    bool
    """
    if device.type == "cuda":
        # emulated before Ampere
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or _has_bf16_instructions()


def _has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bf16 itself; emulation is 2 to 9 times slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
