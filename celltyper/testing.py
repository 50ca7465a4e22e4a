"""Tell the author of an encoder, decoder or instance method whether it fits.

Every function runs the component on small made inputs and raises AssertionError with one line
that says what is wrong; it returns None if all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from celltyper.types import InstanceMethod, Labels, MapSpec

__all__ = ["check_decoder", "check_encoder", "check_instances"]


def check_encoder(encoder: nn.Module) -> None:
    """Check an encoder: attributes, shapes at odd sizes, dtype, batches, gradients.

    Parameters
    ----------
    encoder : nn.Module
        With ``channels``, ``patch_size``, ``forward(images)``; ``strides`` if maps differ in
        size; and, if it is for patch mode, ``embed_dim`` and ``embed(images)``. Its weights are
        not changed.

    Raises
    ------
    AssertionError
        With the first thing that does not fit.
    """
    who = type(encoder).__name__
    module: Any = encoder
    p: Any = getattr(module, "patch_size", None)
    _require(isinstance(p, int) and p > 0, f"{who}.patch_size must be a positive int, got {p!r}")
    channels: Any = getattr(module, "channels", None)
    _require(
        isinstance(channels, (list, tuple)) and bool(channels) and _all_int(channels),
        f"{who}.channels must be a list of int, got {channels!r}",
    )
    strides: Any = getattr(module, "strides", None)
    _require(
        strides is None
        or (
            isinstance(strides, (list, tuple))
            and len(strides) == len(channels)
            and _all_int(strides)
            and not any(p % stride for stride in strides)
        ),
        f"{who}.strides must be a list of {len(channels)} int that divide patch_size {p}, one "
        f"for each map, got {strides!r}",
    )
    with _eval(module), _seeded():
        for rows, cols in ((2 * p, 3 * p), (2 * p + 1, 3 * p - 1), (p - 1 or 1, 2 * p)):
            _check_maps(module, torch.rand(2, 3, rows, cols), who)
        images = torch.rand(2, 3, 2 * p + 3, 2 * p)
        copy = images.clone()
        together = module(images)
        _require(torch.equal(images, copy), f"{who}.forward changes the images it is given")
        alone = module(images[:1])
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            _require(
                torch.allclose(a[:1], b, rtol=1e-3, atol=1e-4),
                f"{who}: map {i} of an image depends on the rest of the batch in eval mode",
            )
        for i in range(len(channels)):
            _require(
                not torch.allclose(together[i][:1], together[i][1:]),
                f"{who}: map {i} is the same for two different images",
            )
        # a frozen encoder without embedding says None
        if hasattr(module, "embed") and getattr(module, "embed_dim", 0) is not None:
            _check_embedding(module, images, who)
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        with _eval(module), _seeded():
            maps = module(torch.rand(1, 3, 2 * p, 2 * p))
            _require(
                all(m.requires_grad for m in maps),
                f"{who}: weights require gradients, but the maps carry none; freeze it instead",
            )


def check_decoder(
    decoder: Callable[..., nn.Module],
    channels: Sequence[int] = (24, 24, 24, 24),
    patch_size: int = 16,
    strides: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Check a decoder: attributes, shapes at odd sizes, place of every patch, gradients.

    Parameters
    ----------
    decoder : callable
        Class or function called as ``decoder(channels, patch_size, **options)``.
    channels : sequence of int
        Channels of the maps that it is given.
    patch_size : int
        Side of a patch in pixels; the coarsest stride of a pyramid.
    strides : sequence of int, optional
        Strides of a pyramid's maps in pixels, from fine to coarse, passed to the decoder as
        ``strides``; by default all are `patch_size` and nothing is passed.
    **options
        Passed to the decoder.

    Raises
    ------
    AssertionError
        With the first thing that does not fit.
    """
    p = patch_size
    maps = list(zip(channels, strides or [p] * len(channels), strict=True))
    if strides is not None:
        options = options | {"strides": list(strides)}
    with _seeded():
        built: Any = decoder(list(channels), p, **options)
        who = type(built).__name__
        _require(isinstance(built, nn.Module), f"{who} is not a torch.nn.Module")
        out = getattr(built, "out_channels", None)
        _require(isinstance(out, int) and out > 0, f"{who}.out_channels must be int, got {out!r}")
        with _eval(built), torch.no_grad():
            sizes = ((2 * p, 3 * p), (2 * p + 1, 4 * p - 1), (p - 1 or 1, 2 * p + 2), (1, 1))
            for rows, cols in sizes:
                features, images = _made_features(maps, p, 2, rows, cols)
                y = built(features, images)
                _require(isinstance(y, Tensor), f"{who} must give one Tensor, got {type(y)}")
                _require(
                    tuple(y.shape) == (2, out, rows, cols),
                    f"{who}: images of {rows} x {cols} px give {tuple(y.shape)} instead of "
                    f"{(2, out, rows, cols)}",
                )
                _require(y.dtype == torch.float32, f"{who}: output is {y.dtype} instead of float32")
                _require(torch.isfinite(y).all(), f"{who}: output is not finite")
            features, images = _made_features(maps, p, 2, 2 * p + 3, 2 * p)
            alone = built([f[:1] for f in features], images[:1])
            _require(
                torch.allclose(built(features, images)[:1], alone, rtol=1e-3, atol=1e-4),
                f"{who}: output of an image depends on the rest of the batch in eval mode",
            )
            _check_place(built, maps, p, who)
        _check_gradients(built, maps, p, who)


def check_instances(method: InstanceMethod) -> None:
    """Check an instance method: names, shapes and dtypes of maps, and that cells come back.

    Parameters
    ----------
    method : InstanceMethod
        Any object with ``maps``, ``encode`` and ``decode``, and perhaps ``foreground`` and
        ``reach``.

    Raises
    ------
    AssertionError
        With the first thing that does not fit.
    """
    who = type(method).__name__ if not isinstance(method, type) else method.__name__
    specs = method.maps
    _require(len(specs) > 0, f"{who}.maps is empty")
    for name, spec in specs.items():
        _require(isinstance(spec, MapSpec), f"{who}.maps[{name!r}] must be a MapSpec, got {spec!r}")
    for labels, what in ((_made_cells(), "made cells"), (_made_cells()[:61, :47], "odd size")):
        kept = labels.copy()
        targets = method.encode(labels)
        _require(np.array_equal(labels, kept), f"{who}.encode changes the labels it is given")
        _check_targets(targets, specs, labels.shape, f"{who}.encode ({what})")
        found = method.decode(targets)
        _check_labels(found, labels.shape, f"{who}.decode ({what})")
    cells = _made_cells()
    found = method.decode(method.encode(cells))
    _check_same_cells(cells, found, who)
    empty = np.zeros((40, 52), np.int32)
    targets = method.encode(empty)
    _check_targets(targets, specs, empty.shape, f"{who}.encode (no cells)")
    n = len(np.unique(method.decode(targets))) - 1
    _require(n == 0, f"{who}: an image without cells comes back with {n}")
    # an artefact far away must not change the cells: no statistics of the tile inside decode
    wide = np.zeros((cells.shape[0], cells.shape[1] + 120), np.int32)
    wide[:, : cells.shape[1]] = cells
    wide[5:90, -95:-5] = cells.max() + 1
    beside = method.decode(method.encode(wide))[:, : cells.shape[1]]
    _require(
        np.array_equal(beside > 0, found > 0) and _same_partition(beside, found),
        f"{who}: cells change when something large lies 30 px away; decode must use fixed "
        "constants, not statistics of the tile",
    )
    if hasattr(method, "foreground"):
        for spread in (0.5, 0.8):
            _check_foreground(method, method.encode(cells), spread, who)
    else:
        _require(not hasattr(method, "reach"), f"{who} has reach, but no foreground it counts from")


def _check_foreground(
    method: Any, targets: Mapping[str, NDArray[np.float32]], spread: float, who: str
) -> None:
    """Check that cells keep to components of the foreground, and see no further than `reach`."""
    random = np.random.default_rng(0)

    def noise(amount: float) -> dict[str, NDArray[np.float32]]:
        drawn = {name: random.standard_normal(m.shape) for name, m in targets.items()}
        smooth = {name: ndimage.gaussian_filter(m, (0, 2, 2)) for name, m in drawn.items()}
        return {name: (amount / m.std() * m).astype(np.float32) for name, m in smooth.items()}

    # noise gives components of many shapes and many cells
    maps = {name: targets[name] + m for name, m in noise(spread).items()}
    found, mask = method.decode(maps), method.foreground(maps)
    _require(
        mask.shape == found.shape and mask.dtype == np.bool_,
        f"{who}.foreground gives {mask.shape} {mask.dtype} instead of {found.shape} bool",
    )
    components = ndimage.label(mask)[0]
    for i in np.unique(found[found > 0]):
        cell = found == i
        k = components[cell][0]
        _require(k > 0, f"{who}: a cell starts outside of foreground")
        filled = ndimage.binary_fill_holes(components == k)
        _require(filled[cell].all(), f"{who}: a cell leaves its component of foreground")
    if not hasattr(method, "reach"):
        return
    reach = method.reach
    _require(
        isinstance(reach, int) and reach >= 0,
        f"{who}.reach must be an int, at least 0, got {reach!r}",
    )
    for k, box in enumerate(ndimage.find_objects(components), 1):
        # at least 1, because foreground beside a component would be part of it
        near = tuple(slice(max(s.start - max(reach, 1), 0), s.stop + max(reach, 1)) for s in box)
        other = noise(10)
        for name, m in maps.items():
            other[name][(slice(None), *near)] = m[(slice(None), *near)]
        own, again = (_starting_in(components == k, m) for m in (found, method.decode(other)))
        _require(
            np.array_equal(again > 0, own > 0) and _same_partition(again, own),
            f"{who}: cells change with what lies further than reach ({reach} px) outside of the "
            "bounding box of their component of foreground",
        )


def _check_maps(module: Any, images: Tensor, who: str) -> None:
    p, channels = module.patch_size, list(module.channels)
    strides = getattr(module, "strides", None) or [p] * len(channels)
    rows, cols = images.shape[2:]
    maps = module(images)
    where = f"{who}: images of {rows} x {cols} px"
    _require(
        isinstance(maps, (list, tuple)) and len(maps) == len(channels),
        f"{where} must give a list of {len(channels)} maps, one for each of channels",
    )
    for i, m in enumerate(maps):
        grid = (-(-side // p) * p // strides[i] for side in (rows, cols))
        expected = (len(images), channels[i], *grid)
        _require(
            tuple(m.shape) == expected,
            f"{where}: map {i} is {tuple(m.shape)} instead of {expected}",
        )
        _require(m.dtype == torch.float32, f"{where}: map {i} is {m.dtype} instead of float32")
        _require(torch.isfinite(m).all(), f"{where}: map {i} is not finite")


def _check_embedding(module: Any, images: Tensor, who: str) -> None:
    size = getattr(module, "embed_dim", None)
    _require(isinstance(size, int), f"{who}.embed_dim must be int beside embed, got {size!r}")
    vectors = module.embed(images)
    _require(
        tuple(vectors.shape) == (len(images), size),
        f"{who}.embed gives {tuple(vectors.shape)} instead of {(len(images), size)}",
    )
    _require(torch.isfinite(vectors).all(), f"{who}.embed is not finite")
    _require(
        torch.allclose(vectors[:1], module.embed(images[:1]), rtol=1e-3, atol=1e-4),
        f"{who}.embed of an image depends on the rest of the batch in eval mode",
    )


def _check_place(decoder: Any, maps: Sequence[tuple[int, int]], p: int, who: str) -> None:
    """Check that a changed patch shows at its place, also where the last patch is cut."""
    # sixteen draws, because chance weights alone move the centre of one
    features, images = _made_features(maps, p, 16, 9 * p + 1, 9 * p + 1)
    before = decoder(features, images)
    for f, (_, stride) in zip(features, maps, strict=True):
        changed = slice(6 * p // stride, 8 * p // stride)
        f[:, :, changed, changed] += 1.0
    change = (decoder(features, images) - before).square().sum(dim=(0, 1)).double()
    _require(change.sum() > 0, f"{who}: the output does not depend on the features")
    weight = change / change.sum()
    for axis, name in ((1, "rows"), (0, "columns")):
        centre = float((weight.sum(dim=axis) * (torch.arange(len(weight)) + 0.5)).sum())
        _require(
            abs(centre - 7 * p) < p / 3,
            f"{who}: patches around {name} {7 * p} px show at {centre:.0f} px; enlarge maps to "
            "(h * patch_size, w * patch_size), then cut to the image",
        )


def _check_gradients(decoder: Any, maps: Sequence[tuple[int, int]], p: int, who: str) -> None:
    decoder.train()
    features, images = _made_features(maps, p, 2, 2 * p, 2 * p)
    features = [f.requires_grad_() for f in features]
    y = decoder(features, images)
    _require(y.requires_grad, f"{who}: the output carries no gradient")
    (y * torch.randn_like(y)).mean().backward()
    _require(
        any(f.grad is not None and bool(f.grad.any()) for f in features),
        f"{who}: no gradient reaches the features",
    )
    idle = [n for n, q in decoder.named_parameters() if q.requires_grad and q.grad is None]
    _require(
        not idle, f"{who}: no gradient reaches {idle[:3]}; unused weights break distributed runs"
    )
    bad = [n for n, q in decoder.named_parameters() if q.requires_grad and q.grad.isnan().any()]
    _require(not bad, f"{who}: the gradient of {bad[:3]} is not a number")
    decoder.zero_grad()


def _check_targets(targets: Any, specs: Any, shape: tuple[int, ...], where: str) -> None:
    _require(
        set(targets) == set(specs),
        f"{where} gives maps {sorted(targets)} instead of {sorted(specs)}",
    )
    for name, spec in specs.items():
        m = targets[name]
        _require(
            m.shape == (spec.channels, *shape),
            f"{where}: map {name!r} is {m.shape} instead of {(spec.channels, *shape)}",
        )
        _require(m.dtype == np.float32, f"{where}: map {name!r} is {m.dtype} instead of float32")
        _require(np.isfinite(m).all(), f"{where}: map {name!r} is not finite")


def _check_labels(labels: Any, shape: tuple[int, ...], where: str) -> None:
    _require(labels.shape == shape, f"{where} gives {labels.shape} instead of {shape}")
    _require(labels.dtype == np.int32, f"{where} gives {labels.dtype} instead of int32")
    _require(int(labels.min(initial=0)) >= 0, f"{where} gives negative labels")


def _check_same_cells(cells: Labels, found: Labels, who: str) -> None:
    expected, n = len(np.unique(cells)) - 1, len(np.unique(found)) - 1
    _require(n == expected, f"{who}: {expected} made cells come back as {n}")
    for i in np.unique(cells[cells > 0]):
        inside = cells == i
        best = np.bincount(found[inside]).argmax()
        overlap = np.count_nonzero(inside & (found == best)) if best else 0
        iou = overlap / np.count_nonzero(inside | ((found == best) & (best > 0)))
        _require(iou > 0.7, f"{who}: made cell {i} comes back with an IoU of {iou:.2f} only")


def _same_partition(a: NDArray[Any], b: NDArray[Any]) -> bool:
    pairs = np.unique(np.stack([a[a > 0], b[a > 0]]), axis=1)
    return bool(len(np.unique(pairs[0])) == pairs.shape[1] == len(np.unique(pairs[1])))


def _starting_in(mask: NDArray[np.bool_], labels: Labels) -> Labels:
    """Labels whose first pixel lies in the mask."""
    ids, first = np.unique(labels, return_index=True)
    return np.where(np.isin(labels, ids[mask.flat[first]]), labels, 0)


def _made_cells() -> Labels:
    """Ellipses alone, touching, and cut by the border; ids with gaps."""
    rows, cols = np.mgrid[:96, :110]
    labels = np.zeros((96, 110), np.int32)
    ellipses = (
        (20, 20, 9, 9), (20, 38, 9, 9), (50, 25, 7, 12), (70, 60, 12, 8),
        (70, 77, 11, 9), (25, 80, 10, 10), (92, 20, 9, 9), (45, 106, 9, 9),
    )  # fmt: skip
    for i, (r, c, height, width) in enumerate(ellipses):
        inside = ((rows - r) / height) ** 2 + ((cols - c) / width) ** 2 <= 1
        labels[inside & (labels == 0)] = 3 * i + 2
    return labels


def _made_features(
    maps: Sequence[tuple[int, int]], p: int, batch: int, rows: int, cols: int
) -> tuple[list[Tensor], Tensor]:
    """Maps of as many channels and such strides as `maps` says, and images."""
    high, wide = -(-rows // p) * p, -(-cols // p) * p
    features = [torch.randn(batch, c, high // s, wide // s) for c, s in maps]
    return features, torch.rand(batch, 3, rows, cols)


def _all_int(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def _require(condition: Any, message: str) -> None:
    # not an assert statement: python -O would skip it
    if not condition:
        raise AssertionError(message)


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def _seeded() -> Iterator[None]:
    """Repeatable numbers, and the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
