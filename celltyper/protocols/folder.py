"""The folder of a protocol: what is to be run, and whether it may be gone on with."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from celltyper.atomic import is_draft, make_folder, write_json
from celltyper.classification.config import PatchConfig
from celltyper.config import Config, one_line, parse_config
from celltyper.datasets import Dataset
from celltyper.errors import ConfigError, DataError, RunError
from celltyper.library.files import PROTOCOL_FILE
from celltyper.parts import read_splits
from celltyper.protocols.plan import PlannedRun
from celltyper.protocols.protocol import Protocol
from celltyper.protocols.scores import SCORES_FILE
from celltyper.protocols.table import read_plan
from celltyper.protocols.writing import FILES
from celltyper.runs import LOCK_FILE, SPLIT_FILE, difference

logger = logging.getLogger("celltyper")

TEST = "test"
"""Name of the test images in the split file of a run."""


def entry_of(run: PlannedRun) -> dict[str, Any]:
    """A run as ``protocol.json`` holds it; names are in its split file."""
    fields = asdict(run)
    return fields | {part: len(fields[part]) for part in ("train", "val", "test")}


def splits_of(run: PlannedRun, config: Config | PatchConfig) -> dict[str, list[str]]:
    """Names of a run's images by part, for its split file."""
    data = config.data
    return {data.train: list(run.train), data.val: list(run.val), TEST: list(run.test)}


def check_folder(
    output: Path,
    about: Mapping[str, Any],
    runs: Sequence[PlannedRun],
    whole: Dataset,
    configs: Mapping[str, Config] | Mapping[str, PatchConfig],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Refuse a folder that holds something else than the protocol to be continued."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder for the protocol")
    # another process may be about to write the first file
    if not output.is_dir() or all(map(is_draft, output.iterdir())):
        return
    if not (output / PROTOCOL_FILE).is_file():
        raise ConfigError(f"{output} holds other files; give an empty or new folder")
    if overwrite:
        return
    if not resume:
        raise ConfigError(
            f"{output} already holds a protocol; pass --resume to go on with it, --overwrite to "
            "start over, or another folder"
        )
    old = read_plan(output)
    was, now = (Protocol.model_validate(side["protocol"]) for side in (old, about))
    changed = difference(was, now)
    for name, config in configs.items():
        if not changed and name in old["variants"]:
            changed = difference(parse_config(old["variants"][name], (), type(config)), config)
    if changed:
        raise ConfigError(
            f"{output} was started with another protocol or config ({changed}); resume with the "
            "same ones, or give another folder"
        )
    if old["runs"] != about["runs"] or old["classes"] != about["classes"]:
        raise DataError(
            f"{whole.path} gives other splits than when {output} was started: its images, groups "
            "or classes have changed; put them back, or give another folder"
        )
    for run in runs:
        file = output / run.path / SPLIT_FILE
        if file.is_file():
            kept = {part: list(names) for part, names in read_splits(file).items()}
            if kept != splits_of(run, configs[run.variant]):
                raise DataError(
                    f"{file} lists other images than the data give now: put the data back, or "
                    "give another folder"
                )


def start_protocol(output: Path, about: Mapping[str, Any], *, overwrite: bool) -> None:
    """Create the folder and write what is to be run; runs of an earlier protocol go."""
    make_folder(output)
    if overwrite and (output / PROTOCOL_FILE).is_file():
        for entry in read_plan(output)["runs"]:
            folder = (output / entry["path"]).resolve()
            if folder != output.resolve() and folder.is_relative_to(output.resolve()):
                shutil.rmtree(folder, ignore_errors=True)
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    write_json(output / PROTOCOL_FILE, about)


def say_plan(runs: Sequence[PlannedRun], whole: Dataset) -> None:
    """Log how many runs there are, images that take no part, and fractions that are the same."""
    used = {n for run in runs for n in (*run.train, *run.val, *run.test)}
    logger.info("%d run%s on %d images", len(runs), "s" * (len(runs) > 1), len(used))
    if len(used) < len(whole):
        logger.info("%d images of %s take no part", len(whole) - len(used), whole.path)
    same: dict[tuple[Any, ...], float] = {}
    for run in runs:
        key = run.variant, run.part, run.seed, run.train
        other = same.setdefault(key, run.fraction)
        if other != run.fraction:
            logger.warning(
                "%s: fraction %g trains on the same images as %g, %.2g %% of all",
                run.path,
                run.fraction,
                other,
                100 * run.reached,
            )


def claim_runs(runs: Sequence[PlannedRun], output: Path) -> Iterator[PlannedRun]:
    """Runs that are left to do, each locked while it is worked on.

    Several processes, on one machine or on several that share the folder, so divide the runs of a
    protocol among them. The lock of a process that dies goes with it.
    """
    busy = 0
    for run in runs:
        folder = output / run.path
        make_folder(folder)
        try:
            with FileLock(folder / LOCK_FILE, timeout=0):
                if not (folder / SCORES_FILE).is_file():
                    yield run
        except Timeout:
            busy += 1
    if busy:
        logger.info(
            "%d run%s in the hands of other processes", busy, " is" if busy == 1 else "s are"
        )


@contextmanager
def kept_failure(failed: dict[str, Exception], path: str, *, keep_going: bool) -> Iterator[None]:
    """Keep the error of a run, so that the others can be done, if they are to be."""
    try:
        yield
    except Exception as error:
        if not keep_going:
            raise
        logger.warning("%s failed: %s", path, one_line(error))
        failed[path] = error


def raise_failures(failed: Mapping[str, Exception], runs: int) -> None:
    """Say at the end which runs failed.

    Raises
    ------
    RunError
        With the first error; none if there is none.
    """
    for path, error in failed.items():
        text = one_line(error) or type(error).__name__
        raise RunError(f"{len(failed)} of {runs} runs failed, the first {path}: {text}") from error
