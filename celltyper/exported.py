"""A model that ``celltyper export`` wrote as ONNX, run by ONNX Runtime: torch is never loaded.

Without torch a command starts in a second or two and takes a third of the memory.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.calibration import calibration_of
from celltyper.config import one_line
from celltyper.domain import unpacked_domain
from celltyper.errors import CheckpointError, ConfigError
from celltyper.instances import build_instances
from celltyper.library.shelf import box_folder
from celltyper.transforms.geometry import ORDER
from celltyper.types import PHENOTYPE, MapSpec, OfTiles

EXPORTED_FILE = "model.onnx"
FACTS = "celltyper"
"""Key of the facts in the metadata of the file, see ``docs/export.md``."""
SIDE_BY_SIDE = 4
"""Tiles that are computed at a time at most: each takes memory, of the box 40 MB."""
EMBEDDING = "embedding"
"""Output that follows the maps, if the model knows its training images."""


class ExportedModel:
    """A model in ONNX Runtime, on the CPU; `celltyper.predict_image` takes it.

    Tiles are computed each for itself, so that what is found in one does not depend on the others,
    which the scales of int8 would otherwise do, and side by side, which costs a tenth less than
    one after the other on as many processors. Attributes are those of `celltyper.CellTyper`.

    Parameters
    ----------
    path : str or Path
        File that `celltyper.exporting.export_model` wrote as ONNX.
    threads : int or None
        None takes as many as the process may use processors.
    allow_code : bool
        Whether an instance method named ``package.module:Class`` may be imported. Only for files
        you trust.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, not of celltyper, or names code that was not allowed.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, allow_code: bool = False
    ) -> None:
        self.path = Path(path)
        threads = threads or processors()
        each = -(-threads // SIDE_BY_SIDE)
        self._side_by_side = threads // each
        self._session, facts = _opened(self.path, each)
        self._outputs = [output.name for output in self._session.get_outputs()]
        method, options = facts["instances"]["method"], facts["instances"]["options"]
        if ":" in method and not allow_code:
            raise CheckpointError(
                f"{path} names code of its author ({method}); if you trust it, pass --allow-code "
                "(allow_code=True in Python)"
            )
        self.instances = build_instances(method, **(options or {}))
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        self.colors: tuple[str, ...] = tuple(facts["colors"])
        self.mpp: float | None = facts["mpp"]
        self.tile, self.overlap = int(facts["tile"]), int(facts["overlap"])
        self.batch_size = 4 * SIDE_BY_SIDE
        # files of earlier versions say nothing of the rest
        self.symmetries = int(facts.get("symmetries", 1))
        self.precision = str(facts.get("precision", "fp32"))
        self.calibration = calibration_of(facts.get("calibration"))
        self.domain = unpacked_domain(facts.get("domain"))
        phenotype = MapSpec(len(self.classes) + 1, "softmax", "bce_dice")
        self.maps: dict[str, MapSpec] = {PHENOTYPE: phenotype, **self.instances.maps}

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu"

    def predict_tiles(
        self,
        pixels: NDArray[np.uint8],
        *,
        symmetries: int = 1,
        precision: str | None = None,
        features: Sequence[Any] | None = None,
        embed: bool = False,
    ) -> OfTiles:
        """Activated maps of tiles; see `celltyper.types.TileModel.predict_tiles`.

        Raises
        ------
        ConfigError
            If the tiles or the precision are not those that the file was made for, or features
            are given.
        """
        if precision not in (None, self.precision):
            raise ConfigError(f"{self.path} computes in {self.precision}, not in {precision}")
        if pixels.shape[1:3] != (self.tile, self.tile) or features is not None:
            raise ConfigError(
                f"{self.path} takes tiles of {self.tile} px and no kept features: to choose, take "
                "the model that it was made of"
            )
        with ThreadPoolExecutor(self._side_by_side) as pool:
            found = list(pool.map(self._one, pixels, repeat(symmetries)))
        maps = {name: np.stack([each[name] for each in found]) for name in self.maps}
        embeddings = np.stack([each[EMBEDDING] for each in found]) if embed else None
        return OfTiles(maps, embeddings)

    def _one(self, tile: NDArray[np.uint8], symmetries: int) -> dict[str, NDArray[np.float32]]:
        """Maps of a tile (H, W, 3), each (C, H, W), and its embedding as it is."""
        image = tile.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        total: dict[str, NDArray[np.float32]] = {}
        for which in ORDER[:symmetries]:
            turned = np.ascontiguousarray(_turned(image, which))
            given = dict(
                zip(self._outputs, self._session.run(None, {"images": turned}), strict=True)
            )
            if not total:
                total = {name: values[0] for name, values in given.items()}
                continue
            for name, spec in self.maps.items():
                total[name] = total[name] + _turned_back(given[name], which, vector=spec.vector)[0]
        for name in self.maps:
            total[name] = total[name] / np.float32(symmetries)
        return total


def exported_for(run: Path, device: str, precision: str | None) -> Path | None:
    """Exported file that stands for a model on this machine.

    Parameters
    ----------
    run : Path
        What was asked for.
    device, precision
        As they were asked for.

    Returns
    -------
    Path or None
        `run` itself if it is such a file. That beside the weights of a model of the box, where
        there is no GPU and nothing was said of the precision. None stands for torch.

    Raises
    ------
    ConfigError
        If `run` is such a file, which computes on the CPU alone, and a device is asked for.
    """
    if run.suffix == Path(EXPORTED_FILE).suffix:
        if device not in ("auto", "cpu"):
            raise ConfigError(f"{run} computes on the CPU: leave --device out, or give the run")
        return run
    # only the box has both of one making: a run may have been trained on since it was exported
    beside = run / EXPORTED_FILE
    of_box = run.parent == box_folder() and beside.is_file()
    on_cpu = device == "cpu" or (device == "auto" and not may_have_gpu())
    return beside if of_box and on_cpu and precision is None else None


def may_have_gpu() -> bool:
    """Whether this machine may have a GPU that torch can use, told without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32/nvcuda.dll").is_file()
    return any(Path("/dev", name).exists() for name in ("nvidia0", "nvidiactl", "kfd", "dxg"))


def _turned(images: NDArray[np.float32], which: int) -> NDArray[np.float32]:
    """As `celltyper.symmetries.turn`."""
    turned = np.rot90(images, which % 4, (2, 3))
    return turned[..., ::-1] if which >= 4 else turned


def _turned_back(maps: NDArray[np.float32], which: int, *, vector: bool) -> NDArray[np.float32]:
    """As `celltyper.symmetries.turn_back`."""
    back = np.rot90(maps[..., ::-1] if which >= 4 else maps, -(which % 4), (2, 3))
    if not vector:
        return back
    right, down = back[:, 0::2], back[:, 1::2]
    if which >= 4:
        right = -right
    for _ in range(which % 4):
        right, down = -down, right
    return np.stack((right, down), axis=2).reshape(back.shape)


def _opened(path: Path, threads: int) -> tuple[Any, dict[str, Any]]:
    """Session and facts of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        facts = json.loads(session.get_modelmeta().custom_metadata_map[FACTS])
    except KeyError:
        raise CheckpointError(f"{path} was not written by 'celltyper export'") from None
    except Exception as error:  # its errors have no class in common but this one
        raise CheckpointError(f"{path} cannot be loaded: {one_line(error)}") from error
    return session, dict(facts)


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
