"""A worker on its way to other processes, each of which opens slide and model once."""

from __future__ import annotations

import hashlib
import json
import pickle
import secrets
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock

from celltyper import __version__
from celltyper.encoders.trainability import parameter_digest
from celltyper.errors import ConfigError
from celltyper.models import CellTyper
from celltyper.wholeslide.plan import Block
from celltyper.wholeslide.worker import ModelSource, Worker

_KEPT = 2
"""Slides that a process keeps open: those of two cohorts that share a cluster."""

_here: OrderedDict[str, Worker] = OrderedDict()
_opening = Lock()


@dataclass(frozen=True)
class Sent:
    """What is sent with every task: a few kilobytes, unpacked by the first task in a process.

    Parameters
    ----------
    key : str
        Of this very run. A process may outlive it, and another run on a slide of the same path
        opens the slide anew.
    packed : bytes
    version : str
        Of celltyper.
    """

    key: str
    packed: bytes = field(repr=False)
    version: str = __version__

    @classmethod
    def of(cls, worker: Worker) -> Sent:
        """Pack a worker.

        Raises
        ------
        ConfigError
            If its slide or model cannot be got by another process.
        """
        if worker.source is None or worker.model is None:
            raise ConfigError(
                "other processes cannot get this model: pass source=ModelSource(RUN, ...) to "
                "infer_slide, or no pool"
            )
        try:
            packed = pickle.dumps((worker, digest_of(worker.model)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{worker.slide.path}: this slide or model cannot be sent to other processes "
                f"({error}); open it from a file, or work in one process"
            ) from error
        # masks and tiles are long runs of the same
        return cls(secrets.token_hex(8), zlib.compress(packed, 6))

    def predict(self, block: Block) -> int:
        """See `Worker.predict`."""
        return self.worker().predict(block)

    def decode(self, block: Block) -> int:
        """See `Worker.decode`."""
        return self.worker().decode(block)

    def worker(self) -> Worker:
        """The worker of this process, the same for all threads and tasks.

        Raises
        ------
        ConfigError
            If this process runs another celltyper, whose cells may be others.
        DataError, CheckpointError
            If slide or model cannot be opened here.
        """
        if self.version != __version__:
            raise ConfigError(
                f"this worker has celltyper {__version__}, the command was given with "
                f"{self.version}: install the same everywhere"
            )
        with _opening:
            if self.key not in _here:
                worker, digest = pickle.loads(zlib.decompress(self.packed))
                worker.model = _model(worker.source, digest)
                _here[self.key] = worker
                # Left to the garbage collector: another thread may still read it.
                while len(_here) > _KEPT:
                    _here.popitem(last=False)
            _here.move_to_end(self.key)
            return _here[self.key]


def leave(key: str) -> None:
    """Stop what this process does for a run between two batches, and close what it opened."""
    worker = _here.pop(key, None)
    if worker is not None:
        worker.stop.set()


def digest_of(model: CellTyper) -> str:
    """SHA-256 of all weights, and of how maps become cells and their probabilities."""
    what = [parameter_digest(model), repr(model.instances), model.classes, model.mpp]
    if model.calibration is not None:
        what.append(repr(model.calibration))
    if model.domain is not None:
        what.append(repr(model.domain.facts()))
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@lru_cache(maxsize=1)
def _model(source: ModelSource, digest: str) -> CellTyper:
    # By its digest too: the run may have been trained again since. Not compared with what is
    # loaded, for other processors merge adapters to other last bits.
    return source.load()
