"""Optimiser, learning-rate schedule, weight averaging, and their state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from celltyper.encoders.adapt import depths


class Rates(Protocol):
    """Learning rates and weight decay; the ``train`` section of a config."""

    @property
    def lr(self) -> float:
        """Of all but the encoder."""
        ...

    @property
    def encoder_lr(self) -> float | None:
        """Of the encoder; None for `lr`."""
        ...

    @property
    def weight_decay(self) -> float:
        """On matrices and kernels."""
        ...


def make_optimizer(model: nn.Module, train: Rates, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov 2019, doi:10.48550/arXiv.1711.05101) over everything that is trainable.

    Parameters
    ----------
    model : nn.Module
        With an ``encoder``; its parameters get ``train.encoder_lr``, times `layer_decay` for
        every block that lies behind them (doi:10.48550/arXiv.2003.10555): the last block gets it
        all, the embedding least.
    train : Rates
    layer_decay : float

    Returns
    -------
    torch.optim.AdamW
        Vectors and scalars (biases, norms, layer scales) have no weight decay.
    """
    depth_of = depths(model.get_submodule("encoder")) if layer_decay < 1 else {}
    last = max(depth_of.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = train.lr
            part, _, inner = name.partition(".")
            if part == "encoder":
                lr = (train.encoder_lr or lr) * layer_decay ** (last - depth_of.get(inner, last))
            weight_decay = train.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]
    )


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step.

    Parameters
    ----------
    step : int
        Counts from 0.
    warmup, steps : int
        Length of the warm-up and of the whole training, in steps.

    Returns
    -------
    float
        Factor in (0, 1] on every group's learning rate.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Average:
    """Exponential moving average of trained state (weights and norm statistics).

    Parameters
    ----------
    state : mapping of str to Tensor
        The tensors to follow, which the optimiser changes in place.
    decay : float
        In (0, 1). The first steps average over fewer: ``min(decay, (1 + t) / (10 + t))``.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Move the average towards the present state."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in state.items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor.detach().to(self.state[name]), 1 - decay)
            else:
                self.state[name].copy_(tensor)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Give the optimiser's state as tensors by name, to be stored without pickle."""
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = list(_parameters(optimizer))
    for name, tensor in tensors.items():
        kind, index, key = name.split(".", 2)
        if kind == "optimizer":
            parameter = parameters[int(index)]
            # AdamW keeps its step count on the CPU, its moments beside the parameter.
            place = tensor.device if tensor.ndim == 0 else parameter.device
            optimizer.state[parameter][key] = tensor.clone().to(place)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
