"""The model: an encoder, one decoder for all maps or two, and one 1x1 head per map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from celltyper.calibration import Calibration
from celltyper.config import Config, Encoder
from celltyper.decoders import build_decoder, stride_option
from celltyper.devices import autocast, multiplies_bf16
from celltyper.domain import Domain
from celltyper.encoders import find_card, load_encoder
from celltyper.encoders.adapt import Adapted
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError
from celltyper.instances import build_instances
from celltyper.library.shelf import weights_of
from celltyper.symmetries import turn, turn_back
from celltyper.transforms.geometry import ORDER
from celltyper.types import PHENOTYPE, InstanceMethod, MapActivation, MapSpec, OfTiles


class CellTyper(nn.Module):
    """Dense cell phenotyping: images to phenotype logits and the maps that cells are cut from.

    Parameters
    ----------
    encoder : nn.Module
        With ``channels``, ``patch_size``, ``strides`` if maps differ in size, and
        ``forward(images) -> list[(B, C_i, h_i, w_i)]``; see `celltyper.load_encoder` and
        `celltyper.testing.check_encoder`.
    decoder : str, type or nn.Module
        A name (``"linear"``, ``"unetr"``, ``"dpt"``, ``"unet"``, ``"package.module:Class"``), a
        class built as ``decoder(channels, patch_size)`` (for an encoder with ``strides``, with
        those by keyword), or a module with ``out_channels`` and ``forward(features, images) ->
        (B, out_channels, H, W)``.
    classes : sequence of str
        Names of the K phenotypes, without background.
    instances : str or InstanceMethod
        How maps become cells.
    instance_decoder : str, type, nn.Module or None
        A decoder of their own for the instance maps, on the same features of the encoder, as in
        HoVer-Net (doi:10.1016/j.media.2019.101563) and HoVer-NeXt (Baumann 2024, MIDL, PMLR 250);
        `decoder` then gives the phenotype map alone. By default all maps share `decoder`.
    mpp : float or None
        Micrometres per pixel the model works at; images of another resolution are rescaled to
        it. None if the training data's resolution is unknown: images are then taken as they are.
    colors : sequence of str
        ``#rrggbb`` per phenotype, for overlays and exports; defaults by name if empty.
    tile, overlap : int
        Side in pixels of the tiles an image is cut into, and how much neighbours share.
    batch_size : int
        Tiles per forward pass at inference.
    symmetries : {1, 2, 4, 8}
        Over how many symmetries of a tile maps are averaged at inference.
    precision : {"fp32", "bf16", "fp16"}
        Of the forward pass at inference, where the device computes faster in it.
    calibration : Calibration or None
        How mean softmax inside a cell becomes probabilities of its class, if that is known.
    domain : Domain or None
        What the encoder sees of the training images, if that is known.

    Attributes
    ----------
    maps : dict of str to MapSpec
        Every output map; ``"phenotype"`` has K + 1 channels, background first.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: str | type[nn.Module] | nn.Module = "dpt",
        classes: Sequence[str] = ("nucleus",),
        instances: str | InstanceMethod = "hv",
        *,
        instance_decoder: str | type[nn.Module] | nn.Module | None = None,
        mpp: float | None = None,
        colors: Sequence[str] = (),
        tile: int = 256,
        overlap: int = 64,
        batch_size: int = 8,
        symmetries: int = 1,
        precision: str = "fp32",
        calibration: Calibration | None = None,
        domain: Domain | None = None,
    ) -> None:
        super().__init__()
        if len(set(classes)) != len(classes) or not classes:
            raise ConfigError(f"classes must be distinct names, at least one, got {list(classes)}")
        if "background" in classes:
            raise ConfigError("a phenotype cannot be called 'background': that is class 0")
        if isinstance(decoder, nn.Module) and instance_decoder is decoder:
            raise ConfigError(
                "instance_decoder is the decoder itself: leave it out, or give it a copy"
            )
        self.encoder = encoder
        self.decoder = _decoder_on(encoder, decoder)
        self.instance_decoder = (
            None if instance_decoder is None else _decoder_on(encoder, instance_decoder)
        )
        self.classes = tuple(classes)
        self.instances = build_instances(instances) if isinstance(instances, str) else instances
        self.mpp = mpp
        self.colors = tuple(colors)
        self.tile = tile
        self.overlap = overlap
        self.batch_size = batch_size
        self.symmetries = symmetries
        self.precision = precision
        self.calibration = calibration
        self.domain = domain
        phenotype = MapSpec(len(self.classes) + 1, "softmax", "bce_dice")
        self.maps: dict[str, MapSpec] = {PHENOTYPE: phenotype, **self.instances.maps}
        first = int(self.decoder.out_channels)  # type: ignore[arg-type]
        second = first
        if self.instance_decoder is not None:
            second = int(self.instance_decoder.out_channels)  # type: ignore[arg-type]
        self.heads = nn.ModuleDict(
            {
                name: nn.Conv2d(first if name == PHENOTYPE else second, spec.channels, 1)
                for name, spec in self.maps.items()
            }
        )
        # the convolutions of the decoders run up to half as fast again with channels innermost
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Tensor, features: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compute raw maps (logits), before any activation.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W), float32
            RGB in [0, 1]; the encoder applies its own normalisation.
        features : sequence of Tensor, optional
            What the encoder gives for these images, if it is known already.

        Returns
        -------
        dict of str to Tensor, each (B, C, H, W) float32
        """
        features = self.encoder(images) if features is None else features
        first = second = self.decoder(features, images)
        if self.instance_decoder is not None:
            second = self.instance_decoder(features, images)
        return {
            name: head(first if name == PHENOTYPE else second).float()
            for name, head in self.heads.items()
        }

    def activate(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn raw maps into what `instances` decodes: softmax, sigmoid, as its `maps` say."""
        return {name: _activate(raw[name], spec.activation) for name, spec in self.maps.items()}

    @torch.inference_mode()
    def predict_tiles(
        self,
        pixels: NDArray[np.uint8],
        *,
        symmetries: int = 1,
        precision: str | None = None,
        features: Sequence[Sequence[Tensor]] | None = None,
        embed: bool = False,
    ) -> OfTiles:
        """Activated maps of tiles of pixels; see `celltyper.types.TileModel.predict_tiles`.

        Runs in evaluation mode; the previous mode is restored.
        """
        with _evaluating(self):
            batch, known = self._batch_of(pixels, features)
            with autocast(self.device, pick_precision(self, precision)):
                if embed and known is None:
                    known = list(self.encoder(batch))
                maps = activated_maps(self, batch, symmetries, known)
        return OfTiles(
            {name: values.cpu().numpy() for name, values in maps.items()},
            mean_of_tiles(known) if embed and known is not None else None,
        )

    @torch.inference_mode()
    def embed_tiles(
        self,
        pixels: NDArray[np.uint8],
        *,
        precision: str = "fp32",
        features: Sequence[Sequence[Tensor]] | None = None,
    ) -> NDArray[np.float32]:
        """Mean of the encoder's last feature map over each tile, (B, C); no decoder runs."""
        with _evaluating(self):
            batch, known = self._batch_of(pixels, features)
            with autocast(self.device, precision):
                return mean_of_tiles(list(self.encoder(batch)) if known is None else known)

    def _batch_of(
        self, pixels: NDArray[np.uint8], features: Sequence[Sequence[Tensor]] | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Tiles as the network takes them, and what the encoder gives if that is known."""
        batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        if features is None:
            return batch, None
        return batch, [torch.stack(x).to(self.device) for x in zip(*features, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device


class Ensemble(CellTyper):
    """Several models as one, which gives the mean of their activated maps.

    Parameters
    ----------
    models : sequence of CellTyper
        Of the same classes, resolution and instance method. Where all have the same frozen
        encoder, it is kept once and runs once for all. Their maps are averaged before there are
        cells, so what calibrates each of them does not fit the mean: it is not calibrated. Nor
        has it a domain, for its models were trained on different images.

    Raises
    ------
    ConfigError
        If the models do not fit together.
    """

    def __init__(self, models: Sequence[CellTyper]) -> None:
        nn.Module.__init__(self)
        first = models[0]
        for model in models[1:]:
            if (model.classes, model.mpp, model.maps) != (first.classes, first.mpp, first.maps):
                raise ConfigError("models of other classes, resolution or maps make no ensemble")
        self.shares = len({(fingerprint(m.encoder), _is_frozen(m.encoder)) for m in models}) == 1
        self.shares &= _is_frozen(first.encoder)
        if self.shares:
            for model in models[1:]:
                model.encoder = first.encoder
        self.models = nn.ModuleList(models)
        self.instances, self.maps = first.instances, first.maps
        self.classes, self.colors, self.mpp = first.classes, first.colors, first.mpp
        self.tile, self.overlap = first.tile, first.overlap
        self.batch_size, self.symmetries = first.batch_size, first.symmetries
        self.precision = first.precision
        self.calibration = None
        self.domain = None

    def forward(
        self, images: Tensor, features: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Mean of the models' maps, activated; see `CellTyper.forward`."""
        members: Any = self.models
        if features is None and self.shares:
            features = members[0].encoder(images)
        each = [model.activate(model(images, features)) for model in members]
        return {name: torch.stack([maps[name] for maps in each]).mean(dim=0) for name in each[0]}

    def activate(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the maps back, which are activated already."""
        return raw


def pick_precision(model: CellTyper, precision: str | None) -> str:
    """Precision of the forward pass.

    Parameters
    ----------
    model : CellTyper
        On the device that it is to run on.
    precision : {"fp32", "bf16", "fp16"} or None
        None takes ``model.precision`` where the device computes faster in it, fp32 elsewhere.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        See `autocast`.
    """
    if precision is not None:
        autocast(model.device, precision)
        return precision
    faster = {"bf16": multiplies_bf16(model.device), "fp16": model.device.type != "cpu"}
    return model.precision if faster.get(model.precision) else "fp32"


def activated_maps(
    model: CellTyper, batch: Tensor, symmetries: int = 1, features: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Activated maps of tiles, averaged over their first symmetries.

    Parameters
    ----------
    model : CellTyper
    batch : Tensor, shape (B, 3, H, W), float32
        RGB in [0, 1].
    symmetries : {1, 2, 4, 8}
        See `predict_maps`.
    features : list of Tensor, optional
        What the encoder gives for these tiles as they are, if it is known already.

    Returns
    -------
    dict of str to Tensor, each (B, C, H, W)
    """
    if symmetries == 1:
        return model.activate(model(batch, features))
    total: dict[str, Tensor] = {}
    for which in ORDER[:symmetries]:
        # the first of them is the tile as it is
        known = None if total else features
        maps = model.activate(model(turn(batch, which), known))
        for name, values in maps.items():
            back = turn_back(values, which, vector=model.maps[name].vector)
            total[name] = total[name] + back if name in total else back
    return {name: values / symmetries for name, values in total.items()}


def mean_of_tiles(features: Sequence[Tensor]) -> NDArray[np.float32]:
    """Mean of the last feature map (B, C, h, w) over each tile: (B, C)."""
    mean: NDArray[np.float32] = features[-1].float().mean(dim=(2, 3)).cpu().numpy()
    return mean


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the previous one afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _is_frozen(encoder: nn.Module) -> bool:
    return isinstance(encoder, Adapted) and not encoder.trained


def _decoder_on(encoder: nn.Module, decoder: str | type[nn.Module] | nn.Module) -> nn.Module:
    """Build a decoder for an encoder, unless it is built already."""
    if isinstance(decoder, str):
        return build_decoder(decoder, *_grid_of(encoder))
    if isinstance(decoder, type):
        channels, patch_size, strides = _grid_of(encoder)
        where = stride_option(decoder.__name__, decoder, patch_size, strides)
        return decoder(channels, patch_size, **where)
    return decoder


def _grid_of(encoder: nn.Module) -> tuple[list[int], int, list[int] | None]:
    """Read what a decoder is built from: channels of the maps, patch size and strides if any."""
    strides: Any = getattr(encoder, "strides", None)
    try:
        return (
            list(encoder.channels),  # type: ignore[arg-type]
            int(encoder.patch_size),  # type: ignore[arg-type]
            None if strides is None else list(strides),
        )
    except AttributeError as error:
        raise ConfigError(
            f"{type(encoder).__name__} is no encoder: it needs 'channels' and 'patch_size' "
            "(see celltyper.testing.check_encoder)"
        ) from error


def _activate(raw: Tensor, how: MapActivation) -> Tensor:
    match how:
        case "softmax":
            return F.softmax(raw, dim=1)
        case "sigmoid":
            return torch.sigmoid(raw)
        case "tanh":
            return torch.tanh(raw)
        case "relu":
            return F.relu(raw)
        case "identity":
            return raw


def _magnification(encoder: Encoder, mpp: float | None) -> float:
    """Pixels that the network sees per pixel of the model, along a side."""
    if encoder.mpp is None:
        return 1.0
    wanted = find_card(encoder.name).mpp if encoder.mpp == "card" else encoder.mpp
    if wanted is None:
        raise ConfigError(
            f"encoder.mpp=card: the card of {encoder.name} states no resolution; give a number"
        )
    if mpp is None:
        raise ConfigError(
            f"encoder.mpp={encoder.mpp} needs the resolution of the images, which they do not "
            "state: set data.mpp"
        )
    return mpp / wanted


def build_model(
    config: Config, classes: Sequence[str], mpp: float | None, colors: Sequence[str] = ()
) -> CellTyper:
    """Build the model that a config describes; random parts depend on ``config.seed`` only.

    Parameters
    ----------
    config : Config
    classes : sequence of str
        Names of the phenotypes, without background.
    mpp : float or None
        Working resolution in micrometres per pixel.
    colors : sequence of str
        ``#rrggbb`` per phenotype.

    Returns
    -------
    CellTyper

    Raises
    ------
    ConfigError
        For unknown components or options.
    CheckpointError
        If the encoder's weights cannot be had.
    """
    encoder = load_encoder(
        config.encoder.name,
        weights=weights_of(config.encoder.weights),
        adapt=config.encoder.adapt,
        seed=config.seed,
        revision=config.encoder.revision,
        magnify=_magnification(config.encoder, mpp),
        lora=config.encoder.lora.model_dump(),
        last_n=config.encoder.last_n,
        checkpointing=config.encoder.checkpointing,
        **config.encoder.options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        grid, settings = _grid_of(encoder), config.decoder
        options = [settings.options]
        if settings.branches == "separate":
            options.append(settings.options | settings.instance_options)
        decoder, *more = (build_decoder(settings.name, *grid, **own) for own in options)
        return CellTyper(
            encoder,
            decoder,
            classes,
            build_instances(config.instances.method, **config.instances.options),
            instance_decoder=more[0] if more else None,
            mpp=mpp,
            colors=colors,
            tile=config.infer.tile or config.data.tile,
            overlap=config.infer.overlap,
            batch_size=config.infer.batch_size,
            symmetries=config.infer.symmetries,
            precision=config.infer.precision,
        )
