"""The demonstration: the ordinary commands, one after the other, on two real H&E fields."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from celltyper.atomic import make_folder, write_text
from celltyper.config import load_config
from celltyper.errors import ConfigError, DataError
from celltyper.inference import infer
from celltyper.readers import open_dataset
from celltyper.readers.hgsc import demo_split, fetch_hgsc
from celltyper.results import evaluate_predictions, summary_text
from celltyper.training import train

MARK = ".celltyper-demo"
PARTS = ("train", "val", "test")


def run_demo(
    output: str | Path,
    *,
    data: str | Path | None = None,
    quick: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Get data, train, infer the held-out part, evaluate, and write a report.

    Parameters
    ----------
    output : str or Path
        Folder to write: ``data``, ``run``, the cells, ``metrics.json``, ``report.html``.
    data : str or Path or None
        Own annotated images with the parts ``train``, ``val`` and ``test`` as folders; None
        fetches the sample.
    quick : bool
        A tenth of the training steps.
    overwrite : bool
        Replace an earlier demonstration in `output`.
    device, progress
        See `celltyper.train`.
    say : callable
        Told every command and result, a line or a table at a time.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    DataError
        Without network, or if own data lack a part.
    ConfigError
        If `output` holds something else.
    """
    output = Path(output)
    _check_room(output, overwrite)
    if data is None:
        source, fields = output / "data", fetch_hgsc()
    else:
        source, fields = Path(data), None
        missing = [part for part in PARTS if not (source / part).is_dir()]
        if missing:
            raise DataError(
                f"{source} lacks the folder {missing[0]}: the demo needs {', '.join(PARTS)}"
            )
    # Nothing of an earlier demonstration goes before its successor has what it needs.
    shutil.rmtree(output / "run", ignore_errors=True)
    make_folder(output)
    write_text(output / MARK, "")
    if fields is not None:
        demo_split(fields, source)
    overrides = [f"data.root={source}"]
    if quick:
        overrides += ["train.steps=40", "train.warmup=4", "train.validate_every=20"]
    run, test = output / "run", source / "test"
    mpp = open_dataset(test).mpp

    settings = [word for o in overrides for word in ("--set", o)]
    say(_shown("train", "demo", "-o", run, *settings))
    train(load_config("demo", overrides), run, device=device, progress=progress)
    resolution = () if mpp is None else ("--mpp", mpp)
    say(_shown("infer", test / "images", "-m", run, "-o", output, *resolution))
    infer([test], run, output, mpp=mpp, overwrite=True, device=device, progress=progress)
    say(_shown("eval", "--pred", output, "--ref", test))
    summary, folder = evaluate_predictions(output, test, overwrite=True)
    say(summary_text(summary))
    if data is None:
        say("The labels of this sample are model-made, and all parts come from one study.")
    say(f"report: {folder / 'report.html'}")
    return folder / "report.html"


def _check_room(output: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier demonstration to be replaced."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARK).is_file():
            raise ConfigError(f"{output} holds other files; give an empty or new folder")
        if not overwrite:
            raise ConfigError(
                f"{output} already holds a demonstration; pass --overwrite or another folder"
            )


def _shown(*words: object) -> str:
    return "$ " + shlex.join(["celltyper", *map(str, words)])
