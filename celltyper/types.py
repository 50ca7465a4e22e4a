"""The arrays and records that travel between the parts of celltyper.

Arrays are ``(row, column)``; tables are ``x, y`` with ``x`` the column. Pixel centres lie on
integers plus one half in tables and outlines, so that the outline of pixel ``[0, 0]`` is the unit
square from ``(0, 0)`` to ``(1, 1)``: QuPath's and OpenSlide's convention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from celltyper.calibration import Calibration, class_probabilities
from celltyper.domain import Distance, Domain
from celltyper.errors import DataError

Image = NDArray[np.uint8]
"""RGB image, ``(H, W, 3)`` uint8."""

Labels = NDArray[np.int32]
"""Instance labels, ``(H, W)`` int32, 0 is background, ids need not be contiguous."""

UNKNOWN = 255
"""Phenotype of a nucleus whose class the annotation leaves open."""

PHENOTYPE = "phenotype"
"""Name of the map of class logits or probabilities, background first."""

Maps = Mapping[str, NDArray[np.float32]]
"""Pixel maps by name, each ``(C, H, W)`` float32, activated (probabilities, not logits)."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    labels : ndarray of int32, shape (H, W)
        Instance ids, 0 is background.
    phenotypes : ndarray of uint8, shape (labels.max() + 1,)
        Class of every label id, as a lookup table: ``phenotypes[labels]`` is the phenotype map.
        Entry 0 is background; foreground classes count from 1; `UNKNOWN` is a nucleus without
        a class, which takes part in everything but its typing. Ids that are not in the image
        hold 0.
    name : str
        Unique name within its dataset; the stem of the image file.
    group : str
        Patient, slide or field that the image belongs to; splits and intervals respect it.
    mpp : float or None
        Micrometres per pixel, None if unknown.
    unannotated : tuple of int
        Class ids, ascending, that the annotation of this image does not cover: what is background
        there may be such a cell.

    Raises
    ------
    DataError
        If shapes or dtypes do not fit together, naming the sample.
    """

    image: Image
    labels: Labels
    phenotypes: NDArray[np.uint8]
    name: str = ""
    group: str = ""
    mpp: float | None = None
    unannotated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"sample {self.name!r}"
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise DataError(
                f"{where}: image must be (H, W, 3) uint8, got {self.image.shape} {self.image.dtype}"
            )
        if self.labels.shape != self.image.shape[:2]:
            raise DataError(
                f"{where}: labels are {self.labels.shape}, but the image is "
                f"{self.image.shape[:2]}; both must have the same height and width"
            )
        if self.labels.dtype != np.int32:
            raise DataError(f"{where}: labels must be int32, got {self.labels.dtype}")
        top = int(self.labels.max(initial=0))
        if len(self.phenotypes) != top + 1 or self.phenotypes[0] != 0:
            raise DataError(
                f"{where}: phenotypes must be a lookup table of {top + 1} entries "
                f"with 0 first, got {len(self.phenotypes)} entries"
            )

    @property
    def known_phenotypes(self) -> NDArray[np.uint8]:
        """`phenotypes` with 0 where the class is `UNKNOWN`."""
        return np.where(self.phenotypes == UNKNOWN, 0, self.phenotypes).astype(np.uint8)


MapActivation = Literal["sigmoid", "tanh", "relu", "identity", "softmax"]
MapLoss = Literal["bce_dice", "mse", "hv", "smooth_l1", "smooth_l1_inside"]


@dataclass(frozen=True)
class MapSpec:
    """What an instance method needs from the network for one map.

    Parameters
    ----------
    channels : int
        Number of channels, at least 1.
    activation : {"sigmoid", "tanh", "relu", "identity", "softmax"}
        Applied to the raw output before decoding. Losses see the raw output.
    loss : {"bce_dice", "mse", "hv", "smooth_l1", "smooth_l1_inside"}
        Loss against the encoded target; ``hv`` is MSE plus MSE of gradients inside nuclei
        (HoVer-Net, doi:10.1016/j.media.2019.101563), ``smooth_l1_inside`` counts nuclei only.
    vector : bool
        Channels are pairs of a horizontal component, positive to the right, and a vertical one,
        positive downwards: where the image is turned, they turn with it.
    """

    channels: int
    activation: MapActivation
    loss: MapLoss
    vector: bool = False


@runtime_checkable
class InstanceMethod(Protocol):
    """Turns instance labels into training targets and predicted maps into instance labels.

    Nothing to subclass: any object with these three members will do. See
    ``celltyper.testing.check_instances``.

    Two more members are optional. Slides are decoded in blocks, and what is promised of the cells
    depends on them (`celltyper.instances.blocks.decode_block`). ``foreground(maps)`` gives a mask,
    bool (H, W). A cell starts, in raster order, in a 4-connected component of it, and has no pixel
    outside of that but in its holes. ``reach``, int, says that what lies further than so many
    pixels outside of the bounding box of a component changes nothing about the cells in it.
    """

    @property
    def maps(self) -> Mapping[str, MapSpec]:
        """Maps by name; every name is one 1x1 head of the model."""
        ...

    def encode(self, labels: Labels) -> dict[str, NDArray[np.float32]]:
        """Targets ``(C, H, W)`` float32 by map name for labels ``(H, W)`` int32."""
        ...

    def decode(self, maps: Maps) -> Labels:
        """Labels for activated maps.

        Parameters
        ----------
        maps : mapping of str to ndarray of float32, each (C, H, W)
            By the names in `maps`; others are passed over.

        Returns
        -------
        ndarray of int32, shape (H, W)
            Labels 1..n, in celltyper's own methods in the raster order of their first pixels.

        Raises
        ------
        DataError
            In celltyper's own methods, if a map is missing or has another shape.
        """
        ...


class OfTiles(NamedTuple):
    """What a model gives for a batch of tiles."""

    maps: Mapping[str, NDArray[np.float32]]
    """Activated, each (B, C, H, W)."""
    embeddings: NDArray[np.float32] | None
    """Mean of the encoder's last feature map over each tile, (B, C), if it was asked for."""


class TileModel(Protocol):
    """What cells are predicted with.

    `celltyper.CellTyper` computes in torch, `celltyper.exported.ExportedModel` in ONNX Runtime. The
    attributes are those of `celltyper.CellTyper`.
    """

    classes: tuple[str, ...]
    colors: tuple[str, ...]
    mpp: float | None
    tile: int
    overlap: int
    batch_size: int
    symmetries: int
    maps: dict[str, MapSpec]
    instances: InstanceMethod
    calibration: Calibration | None
    domain: Domain | None

    def predict_tiles(
        self,
        pixels: NDArray[np.uint8],
        *,
        symmetries: int = 1,
        precision: str | None = None,
        features: Sequence[Any] | None = None,
        embed: bool = False,
    ) -> OfTiles:
        """Activated maps of tiles.

        Parameters
        ----------
        pixels : ndarray of uint8, shape (B, H, W, 3)
            RGB at the model's resolution.
        symmetries, precision
            See `celltyper.predict.predict_maps`.
        features : sequence or None
            Of every tile what the encoder gives, if that is known.
        embed : bool
            Whether embeddings are wanted.

        Returns
        -------
        OfTiles
        """
        ...


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one image, in the image's own pixels.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance ids ``1..n``, 0 is background.
    probabilities : ndarray of float32, shape (K + 1, H, W)
        Softmax over background and the K phenotypes.
    cell_probabilities : ndarray of float32, shape (n, K + 1)
        Mean softmax inside every cell; row i belongs to label i + 1.
    classes : tuple of str
        Names of the K phenotypes; class k of the maps is ``classes[k - 1]``.
    mpp : float or None
        Micrometres per pixel of the image.
    name : str
        Name of the image.
    colors : tuple of str
        ``#rrggbb`` per phenotype; empty if the model has none of its own.
    calibration : Calibration or None
        By which mean softmax becomes `class_probabilities`; None takes it as it is.
    threshold : float
        Cells whose largest class probability is below have no phenotype.
    distance : Distance or None
        How far the image is from those that the model was trained on; None if that is not known.
    """

    labels: Labels
    probabilities: NDArray[np.float32]
    cell_probabilities: NDArray[np.float32]
    classes: tuple[str, ...]
    mpp: float | None = None
    name: str = ""
    colors: tuple[str, ...] = field(default=())
    calibration: Calibration | None = None
    threshold: float = 0.0
    distance: Distance | None = None

    @property
    def class_probabilities(self) -> NDArray[np.float64]:
        """Probability of each phenotype given that there is a cell, (n, K), rows sum to 1."""
        scaling = None if self.calibration is None else self.calibration.scaling
        return class_probabilities(self.cell_probabilities, scaling)

    @property
    def phenotypes(self) -> NDArray[np.uint8]:
        """Most probable class (1..K) of every cell, 0 below the threshold; over labels."""
        if not len(self):
            return np.zeros(1, np.uint8)
        found = self.class_probabilities
        named = found.max(axis=1) >= self.threshold
        return np.concatenate([[0], (1 + found.argmax(axis=1)) * named]).astype(np.uint8)

    @property
    def phenotype_map(self) -> NDArray[np.uint8]:
        """Phenotype (1..K) of the cell at every pixel, (H, W) uint8, 0 where there is none."""
        return self.phenotypes[self.labels]

    def __len__(self) -> int:
        return len(self.cell_probabilities)
