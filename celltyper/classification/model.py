"""A trained model of patch mode: what it shows the encoder, its head, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from celltyper import __version__
from celltyper.cache import cache_folder
from celltyper.calibration import Calibration, calibration_of
from celltyper.checkpoints import load_state, read_tensors, trained_state, write_tensors
from celltyper.classification.config import PatchConfig
from celltyper.classification.embedding import Embedder, embed_table
from celltyper.classification.network import PatchNetwork, build_network
from celltyper.config import parse_config
from celltyper.encoders import load_encoder
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import CheckpointError
from celltyper.library.files import FORMAT, MODEL_FILE, check_format, model_folders
from celltyper.library.shelf import weights_of
from celltyper.patches.table import PatchTable
from celltyper.probes import Probe, load_probe


class Predictor(Protocol):
    """What turns windows into class probabilities."""

    @property
    def embedder(self) -> Embedder:
        """What the encoder is shown."""
        ...

    def probabilities(
        self,
        table: PatchTable,
        *,
        size: int,
        mpp: float | None,
        symmetries: int,
        batch_size: int,
        progress: bool,
    ) -> NDArray[np.float64]:
        """Probabilities (n, K), averaged over symmetries of the square."""
        ...


@dataclass(frozen=True, eq=False)
class EmbeddingProbe:
    """A probe on the embeddings of a frozen encoder, which are kept on disk.

    Parameters
    ----------
    embedder : Embedder
    probe : Probe
    """

    embedder: Embedder
    probe: Probe

    def probabilities(
        self,
        table: PatchTable,
        *,
        size: int,
        mpp: float | None,
        symmetries: int,
        batch_size: int,
        progress: bool,
    ) -> NDArray[np.float64]:
        """Probabilities (n, K), averaged over symmetries of the square."""
        found = self.embed(
            table,
            size=size,
            mpp=mpp,
            symmetries=symmetries,
            batch_size=batch_size,
            progress=progress,
        )
        return mean_probabilities(self.probe, found)

    def embed(self, table: PatchTable, **how: Any) -> NDArray[np.float32]:
        """Embeddings (n, symmetries, D), from the cache or computed now."""
        return embed_table(self.embedder, table, cache_folder() / "embeddings", **how)


@dataclass(frozen=True, eq=False)
class PatchModel:
    """Types windows.

    Parameters
    ----------
    predictor : Predictor
        A probe on embeddings, or a network that was trained by gradient.
    config : PatchConfig
        As resolved when it was trained.
    classes : tuple of str
        The K names.
    positive : int
        Index of the positive class.
    threshold : float
        Probability from which a window is called positive; with more than two classes the most
        probable one is called.
    size : int
        Side of a window in pixels at `mpp`.
    mpp : float or None
        Micrometres per pixel, None if unknown.
    calibration : Calibration or None
        By which its probabilities are scaled, as fitted on validation windows.
    """

    predictor: Predictor
    config: PatchConfig
    classes: tuple[str, ...]
    positive: int
    threshold: float
    size: int
    mpp: float | None
    calibration: Calibration | None = None

    def probabilities(
        self, table: PatchTable, *, symmetries: int | None = None, progress: bool = True
    ) -> NDArray[np.float64]:
        """Class probabilities of windows.

        Parameters
        ----------
        table : PatchTable
        symmetries : int or None
            Average over so many symmetries of the square; None takes those of the config.
        progress : bool
            Show a progress bar on a terminal.

        Returns
        -------
        ndarray of float64, shape (n, K)
        """
        return self.calibrated(
            self.predictor.probabilities(
                table, **self.how(symmetries=symmetries, progress=progress)
            )
        )

    def calibrated(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities (n, K) of its predictor, scaled if the model is calibrated."""
        if self.calibration is None:
            return probabilities
        return self.calibration.scaling.apply(probabilities)

    def how(self, *, symmetries: int | None, progress: bool) -> dict[str, Any]:
        """Settings under which its predictor sees windows."""
        view = self.config.view
        return {
            "size": self.size,
            "mpp": self.mpp,
            "symmetries": symmetries or view.symmetries,
            "batch_size": view.batch_size,
            "progress": progress,
        }


def ensemble_probabilities(
    models: Sequence[PatchModel],
    table: PatchTable,
    *,
    symmetries: int | None = None,
    progress: bool = True,
    calibrated: bool = True,
) -> NDArray[np.float64]:
    """Class probabilities of windows by each of several models.

    Parameters
    ----------
    models : sequence of PatchModel, of length M
        Those that share an encoder and a view see every window once together.
    table : PatchTable
    symmetries, progress
        As in `PatchModel.probabilities`.
    calibrated : bool
        Whether each model's probabilities are scaled by its own calibration.

    Returns
    -------
    ndarray of float64, shape (M, n, K)
        Their mean over M is the ensemble.
    """
    probes = [model.predictor for model in models]
    first = probes[0]
    if isinstance(first, EmbeddingProbe) and all(p.embedder is first.embedder for p in probes):
        found = first.embed(table, **models[0].how(symmetries=symmetries, progress=progress))
        heads = [p.probe for p in probes if isinstance(p, EmbeddingProbe)]
        each = [mean_probabilities(probe, found) for probe in heads]
    else:
        each = [
            model.predictor.probabilities(
                table, **model.how(symmetries=symmetries, progress=progress)
            )
            for model in models
        ]
    if calibrated:
        each = [model.calibrated(own) for model, own in zip(models, each, strict=True)]
    return np.stack(each)


def mean_probabilities(probe: Probe, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities (n, K) of embeddings (n, symmetries, D), averaged over symmetries."""
    n, symmetries, _ = embeddings.shape
    flat = probe.probabilities(embeddings.reshape(n * symmetries, -1))
    mean: NDArray[np.float64] = flat.reshape(n, symmetries, -1).mean(axis=1)
    return mean


def build_embedder(config: PatchConfig, device: str | torch.device = "cpu") -> Embedder:
    """Load the encoder of a config, and say what it is shown.

    Raises
    ------
    ConfigError, CheckpointError
        If the encoder, its weights, or what the config takes of it cannot be had.
    """
    encoder = load_encoder(
        config.encoder.name,
        weights=weights_of(config.encoder.weights),
        adapt="frozen",
        seed=config.seed,
        revision=config.encoder.revision,
        **config.encoder.options,
    )
    return Embedder(encoder.to(device), config.view.pool, config.view.input)


def _bare(config: PatchConfig) -> PatchConfig:
    """Leave out of a config what the checkpoint replaces: all weights, or the first adapter."""
    encoder = config.encoder
    own: dict[str, Any] = {"lora": encoder.lora.model_copy(update={"adapter": None})}
    if encoder.adapt == "full" and encoder.weights != "twin":
        own["weights"] = "random"
    return config.model_copy(update={"encoder": encoder.model_copy(update=own)})


def save_patch_model(folder: Path, model: PatchModel) -> None:
    """Write what was trained and what it needs to know, never the weights it started from."""
    predictor = model.predictor
    header = {
        "task": "patches",
        "format": FORMAT,
        "celltyper_version": __version__,
        "config": model.config.model_dump(mode="json"),
        "classes": list(model.classes),
        "positive": model.positive,
        "threshold": model.threshold,
        "size": model.size,
        "mpp": model.mpp,
        "encoder_fingerprint": fingerprint(predictor.embedder.encoder),
        "calibration": None if model.calibration is None else model.calibration.facts(),
    }
    if isinstance(predictor, PatchNetwork):
        write_tensors(folder / MODEL_FILE, trained_state(predictor), header)
    else:
        assert isinstance(predictor, EmbeddingProbe)
        header["probe"] = predictor.probe.facts()
        write_tensors(folder / MODEL_FILE, predictor.probe.tensors(), header)


def load_patch_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    encoder_weights: str | None = None,
    embedder: Embedder | None = None,
) -> PatchModel:
    """Load a trained model of patch mode.

    Parameters
    ----------
    path : str or Path
        Run folder, or the ``model.safetensors`` in it.
    device : str or torch.device
        Where to put the encoder.
    encoder_weights : str or None
        File or folder of the encoder's weights, if not where they were.
    embedder : Embedder or None
        Of another model with the same encoder and view, to be shared.

    Returns
    -------
    PatchModel

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of the other task, or of another encoder.
    """
    path = Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no model at {path}: give a run that 'celltyper train' wrote")
    tensors, header = read_tensors(file)
    if header.get("task") != "patches":
        raise CheckpointError(f"{file} finds cells on images: it does not type patches")
    check_format(header, file)
    return _made(file, tensors, header, device, encoder_weights, embedder)


def load_patch_models(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    encoder_weights: str | None = None,
) -> tuple[PatchModel, ...]:
    """Load the model of a run, or those of all runs of a protocol.

    Parameters
    ----------
    path : str or Path
        As `celltyper.checkpoints.model_folders` takes it.
    device, encoder_weights
        As in `load_patch_model`.

    Returns
    -------
    tuple of PatchModel
        They share one encoder in memory where it is frozen.

    Raises
    ------
    CheckpointError
        As `load_patch_model`, or if the models do not have the same classes and windows.
    """
    models: list[PatchModel] = []
    for folder in model_folders(path):
        first_one = models[0].predictor if models else None
        shared = first_one.embedder if isinstance(first_one, EmbeddingProbe) else None
        model = load_patch_model(
            folder, device=device, encoder_weights=encoder_weights, embedder=shared
        )
        first = models[0] if models else model
        if _kind(model) != _kind(first):
            raise CheckpointError(
                f"{folder} has other classes or windows than the rest of {path}: name one run"
            )
        models.append(model)
    return tuple(models)


def _kind(model: PatchModel) -> tuple[object, ...]:
    return model.classes, model.positive, model.size, model.mpp


def _made(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
    device: str | torch.device,
    encoder_weights: str | None,
    embedder: Embedder | None,
) -> PatchModel:
    overrides = [] if encoder_weights is None else [f"encoder.weights={encoder_weights!r}"]
    config = parse_config(header["config"], overrides, PatchConfig, where=str(file))
    whole = config.encoder.adapt == "full"
    if whole and encoder_weights is not None:
        raise CheckpointError(f"{file} holds the whole encoder (adapt: full): leave out --weights")
    shared = embedder is not None
    if embedder is None:
        embedder = build_embedder(_bare(config) if whole else config, device)
    predictor: Predictor
    if "probe" in header:
        predictor = EmbeddingProbe(embedder, load_probe(header["probe"], tensors))
    else:
        classes = len(header["classes"])
        predictor = build_network(_bare(config), embedder, classes, config.seed, shared=shared)
        load_state(predictor, tensors, where=str(file))
        predictor.eval()
    found = fingerprint(predictor.embedder.encoder)
    if not whole and found != header["encoder_fingerprint"]:
        raise CheckpointError(
            f"{file} was trained on other weights of {config.encoder.name} than "
            f"{config.encoder.weights}: pass those with --weights"
        )
    return PatchModel(
        predictor=predictor,
        config=config,
        classes=tuple(header["classes"]),
        positive=int(header["positive"]),
        threshold=float(header["threshold"]),
        size=int(header["size"]),
        mpp=header["mpp"],
        calibration=calibration_of(header.get("calibration")),
    )
