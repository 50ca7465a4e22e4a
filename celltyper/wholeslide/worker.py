"""What is done to one block: its maps, then its cells. The same in threads, processes, clusters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celltyper.atomic import write_json
from celltyper.calibration import threshold_of
from celltyper.cells.morphology import measure
from celltyper.cells.outlines import Place
from celltyper.cells.table import add_embeddings, cells_table, write_parquet
from celltyper.checkpoints import load_model
from celltyper.devices import pick_device
from celltyper.instances.blocks import decode_block
from celltyper.labels import mean_in_labels
from celltyper.models import CellTyper
from celltyper.outputs import MAPS_FOLDER
from celltyper.slides import Slide, TissueMask
from celltyper.tiling import Region
from celltyper.types import PHENOTYPE, Image, Labels, Prediction
from celltyper.wholeslide.embeddings import (
    FeatureGrid,
    embeddings_at,
    feature_grid,
    the_encoder,
)
from celltyper.wholeslide.forward import forward_tiles
from celltyper.wholeslide.maps import STEPS, MapStore
from celltyper.wholeslide.plan import LIMIT, Block, Plan
from celltyper.wholeslide.turns import Turns

_PREDICTED = "predicted"
_CELLS = "cells"


@dataclass(frozen=True)
class ModelSource:
    """How another process gets the model; see `celltyper.load_model`."""

    run: str
    device: str
    encoder_weights: str | None = None
    allow_code: bool = False

    def load(self) -> CellTyper:
        """The model, in evaluation mode."""
        model = load_model(
            self.run,
            device=pick_device(self.device),
            encoder_weights=self.encoder_weights,
            allow_code=self.allow_code,
        )
        return model.eval()


# A process holds one model, whatever slides its threads are at.
_TURNS = Turns()


@dataclass(eq=False)
class Worker:
    """Does the work on the blocks of one slide. What is done lies in files, so it can be asked.

    It can be sent to another process, see `celltyper.wholeslide.sent`, if it has a `source`, from
    which that one loads the model.

    Parameters
    ----------
    folder : Path
        Where maps and the cells of blocks are kept until the slide is done.
    plan : Plan
    slide : Slide
    tissue : TissueMask
        Cells whose centroid lies outside are left out.
    model : CellTyper or None
    source : ModelSource or None
    batch_size : int
    symmetries : {1, 2, 4, 8}
    precision : {"fp32", "bf16", "fp16"}
    embeddings : bool
        Whether cells get an embedding of the encoder.
    abstain : float or None
        See `celltyper.predict_image`.
    """

    folder: Path
    plan: Plan
    slide: Slide
    tissue: TissueMask
    model: CellTyper | None
    source: ModelSource | None
    batch_size: int
    symmetries: int
    precision: str
    embeddings: bool = False
    abstain: float | None = None
    stop: Event = field(default_factory=Event)
    progress: Callable[[int], None] = lambda _: None
    _turns: Turns = field(default_factory=Turns)

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "stop", "progress", "_turns", "_store")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, model=None, stop=Event(), progress=lambda _: None, _turns=_TURNS)

    def prepare(self) -> None:
        """Make the folders."""
        for name in (_PREDICTED, _CELLS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._maps().create()

    def is_predicted(self, block: Block) -> bool:
        """Whether the maps of a block were written, whole."""
        return self._predicted(block).is_file()

    def is_decoded(self, block: Block) -> bool:
        """Whether the cells of a block were written, whole."""
        return self.cells_file(block).is_file()

    def cells_file(self, block: Block) -> Path:
        """Table of the cells that a block owns."""
        return self.folder / _CELLS / f"{block.name}.parquet"

    def cells_in(self, block: Block) -> int:
        """How many cells were found in a block that is done."""
        return int(pq.read_metadata(self.cells_file(block)).num_rows)

    def damaged(self) -> list[Region]:
        """Damaged tiles of the slide met in all blocks and processes, full resolution."""
        of_blocks = (Region(*each) for notes in self._notes() for each in notes["damaged"])
        return sorted({*self.slide.damaged, *of_blocks})

    def distances(self) -> list[float]:
        """Distances of all tiles from the training images, if the model knows them."""
        return [x for notes in self._notes() for x in notes.get("distances", [])]

    def _notes(self) -> Iterator[dict[str, Any]]:
        """What was written beside the maps of the blocks that have them."""
        # by name: a process that was killed leaves the drafts of files behind
        for block in filter(self.is_predicted, self.plan.blocks):
            yield json.loads(self._predicted(block).read_text(encoding="utf-8"))

    def predict(self, block: Block) -> int:
        """Write the maps of a block; gives the number of its tiles."""
        model, plan = self._model(), self.plan
        tiles = plan.tiles(block)
        found = forward_tiles(
            model,
            self.slide,
            plan.region(block),
            tiles,
            mpp=model.mpp,
            shape=plan.shape,
            batch_size=self.batch_size,
            symmetries=self.symmetries,
            precision=self.precision,
            turns=self._turns,
            stop=self.stop,
            progress=self.progress,
            encoder=the_encoder(model) if self.embeddings else None,
            pool=model.domain is not None,
        )
        with self._turns.beside():
            self._maps().write(block, found.maps)
            if found.features is not None:
                self._maps().write_features(block, tiles, found.features)
        distances: list[float] = []
        if model.domain is not None and found.pooled is not None:
            # rounded: the last bits depend on what else was in the batch
            distances = model.domain.distances(found.pooled).round(3).tolist()
        facts = {
            "tiles": len(tiles),
            "damaged": [list(each) for each in self.slide.damaged],
            "distances": distances,
        }
        write_json(self._predicted(block), facts)
        return len(tiles)

    def decode(self, block: Block) -> int:
        """Write the cells that a block owns; gives their number. Needs the maps around it."""
        with self._turns.beside():
            return self._decode(block)

    def _decode(self, block: Block) -> int:
        model, plan, store = self._model(), self.plan, self._maps()
        names = tuple(model.instances.maps)
        labels, region = decode_block(
            model.instances,
            lambda part: store.read(part, names),
            plan.region(block),
            plan.shape,
            limit=LIMIT,
        )
        image = self.slide.read(region, model.mpp)
        means = mean_in_labels(labels, store.stored(PHENOTYPE, region)) / np.float32(STEPS)
        table = self._table(labels, means, image, region)
        x, y = table["x"].to_numpy(), table["y"].to_numpy()
        inside = self.tissue.contains(x, y)
        table = table.filter(inside)
        grid = self._features()
        if grid is not None:
            # what has its centroid in the tissue lies in a tile that the model saw
            points = np.stack([x / plan.grid.scale_x, y / plan.grid.scale_y], axis=1)[inside]
            table = add_embeddings(table, embeddings_at(points, plan, grid, store.features))
        # One that was taken for dead may come late, when the maps are gone: the first one counts.
        if not self.is_decoded(block):
            write_parquet(self.cells_file(block), table)
        return int(table.num_rows)

    def no_cells(self) -> pa.Table:
        """The table of a block without cells."""
        classes = len(self._model().classes) + 1
        nothing = np.zeros((0, 0), np.int32), np.zeros((0, classes), np.float32)
        table = self._table(*nothing, np.zeros((0, 0, 3), np.uint8), Region(0, 0, 0, 0))
        grid = self._features()
        if grid is None:
            return table
        return add_embeddings(table, np.zeros((0, grid.channels), np.float32))

    def _table(
        self, labels: Labels, means: NDArray[np.float32], image: Image, region: Region
    ) -> pa.Table:
        """Cells of a region in pixels of the slide's full resolution."""
        model, grid, mpp = self._model(), self.plan.grid, self.plan.mpp
        # The table needs the cells' probabilities only, not those of all pixels.
        none = np.zeros((means.shape[1], 0, 0), np.float32)
        return cells_table(
            Prediction(
                labels,
                none,
                means,
                model.classes,
                colors=model.colors,
                calibration=model.calibration,
                threshold=threshold_of(model.calibration, model.classes, self.abstain),
            ),
            mpp,
            place=Place(0, 0, grid.scale_x, grid.scale_y, region.row, region.col),
            measured=measure(labels, image, mpp),
        )

    def forget(self, block: Block) -> None:
        """Remove the maps of a block."""
        self._maps().drop(block)

    def _predicted(self, block: Block) -> Path:
        return self.folder / _PREDICTED / f"{block.name}.json"

    def _model(self) -> CellTyper:
        if self.model is None:
            assert self.source is not None
            self.model = self.source.load()
        return self.model

    def _maps(self) -> MapStore:
        if not hasattr(self, "_store"):
            self._store = MapStore(
                self.folder / MAPS_FOLDER, self.plan, self._model().maps, self._features()
            )
        return self._store

    def _features(self) -> FeatureGrid | None:
        if not self.embeddings:
            return None
        return feature_grid(the_encoder(self._model()), self.plan.tile)
