"""A network of one hidden layer on embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from celltyper.probes.cases import (
    CHOSEN,
    DEFAULT,
    Array,
    Cases,
    Fitted,
    Float,
    softmax,
    standard_of,
)

_UNCHOSEN = 10
"""Epochs; on embeddings of mitotic figures about the best for 8 to 60 cases, and for one slide."""


def fit_perceptron(
    cases: Cases,
    *,
    hidden: int = 256,
    dropout: float = 0.5,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    batch_size: int = 256,
    epochs: int = 200,
    patience: int = 20,
    folds: int = 5,
    seed: int = 0,
) -> Fitted:
    """Train by AdamW and keep the epoch that is best on groups held out of the training part.

    Where the cases are of too few groups to hold some out, all cases train, and no longer than ten
    epochs.

    Parameters
    ----------
    cases : Cases
    hidden : int
        Units of the hidden layer, rectified.
    dropout : float
        Of the hidden units.
    learning_rate, weight_decay : float
        Of AdamW.
    batch_size : int
        Cases a step.
    epochs : int
        At most.
    patience : int
        Epochs without a better loss on the held-out groups after which training ends.
    folds : int
        One of so many folds (fewer if the groups do not allow them) is held out.
    seed : int
        Of the folds, the first weights, the order of the cases and dropout. The global random
        state is left alone.

    Returns
    -------
    Fitted
        Arrays ``weight1`` (D, hidden), ``bias1``, ``weight2`` (hidden, K), ``bias2`` of
        embeddings that are not standardised.

    Raises
    ------
    ValueError
        If there are fewer than two folds.
    """
    fold = cases.inner_folds(folds, seed)
    if fold is None:
        rows, epochs = np.ones(len(cases), np.bool_), min(epochs, _UNCHOSEN)
    else:
        rows = fold != 0
    standard = standard_of(cases.embeddings[rows])
    x = torch.from_numpy(standard.apply(cases.embeddings).astype(np.float32))
    train, held = torch.from_numpy(rows), torch.from_numpy(~rows)
    # Weights of both parts are of the training part: the held-out one may lack a class.
    factors = _factors(cases, rows)
    weights = torch.from_numpy(factors.astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1], hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, cases.targets.shape[1]),
        )
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=learning_rate, weight_decay=weight_decay
        )
        best, best_epoch, state, losses = float("inf"), 0, network.state_dict(), []
        for epoch in range(1, epochs + 1):
            network.train()
            order = torch.randperm(int(train.sum()))
            for batch in torch.split(torch.nonzero(train)[order, 0], batch_size):
                loss = _loss(network(x[batch]), weights[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
            if fold is None:
                best_epoch, state = epoch, network.state_dict()
                continue
            network.eval()
            with torch.no_grad():
                losses.append(float(_loss(network(x[held]), weights[held])))
            if losses[-1] < best:
                best, best_epoch = losses[-1], epoch
                state = {name: t.clone() for name, t in network.state_dict().items()}
            elif epoch - best_epoch >= patience:
                break
    chosen: dict[str, object] = {"chosen_by": DEFAULT}
    if fold is not None:
        chosen = {
            "chosen_by": CHOSEN,
            "score": "log_loss",
            "scores": [-loss for loss in losses],
            "inner_folds": int(fold.max()) + 1,
        }
    w1, b1, w2, b2 = (state[n].numpy().astype(np.float64) for n in _STATE)
    weight1 = w1.T / standard.scale[:, None]
    arrays = {
        "weight1": weight1,
        "bias1": b1 - standard.mean @ weight1,
        "weight2": np.ascontiguousarray(w2.T),
        "bias2": b2,
    }
    return Fitted(
        arrays,
        {
            "hidden": hidden,
            "dropout": dropout,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "epochs": len(losses) or best_epoch,
            "best_epoch": best_epoch,
            **chosen,
        },
    )


_STATE = ("0.weight", "0.bias", "3.weight", "3.bias")


def perceptron_probabilities(
    arrays: Mapping[str, Array], embeddings: Array, facts: Mapping[str, Any]
) -> Float:
    """Softmax of the network; (n, K)."""
    units = np.maximum(embeddings @ arrays["weight1"] + arrays["bias1"], 0)
    return softmax(units @ arrays["weight2"] + arrays["bias2"])


def _factors(cases: Cases, rows: Array) -> Float:
    """Weights of the loss for all cases, with the class weights of some."""
    share = cases.targets * cases.weights[:, None]
    mass = share[rows].sum(0)
    found: Float = share * (cases.loss_weights(rows).sum(0) / mass)
    return found


def _loss(logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cross-entropy."""
    return -(weights * logits.log_softmax(1)).sum() / weights.sum().clamp(min=1e-12)
