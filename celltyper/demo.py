"""The demonstration: the ordinary commands on two real H&E fields.

The model in the box finds the cells of the test images as it is; then its decoder is trained
further on the training images, and finds them again.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from celltyper.atomic import make_folder, write_text
from celltyper.config import load_config
from celltyper.errors import ConfigError, DataError
from celltyper.evaluation import Summary
from celltyper.inference import infer
from celltyper.library.files import MODEL_FILE, read_header
from celltyper.library.shelf import find_model
from celltyper.readers import open_dataset
from celltyper.readers.hgsc import demo_split, fetch_hgsc
from celltyper.results import evaluate_predictions
from celltyper.training import train

MARK = ".celltyper-demo"
PARTS = ("train", "val", "test")
SCORES = ("detection_f1", "bpq", "macro_f1", "typed_f1")
"""What the table shows; all scores are in the reports."""


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
    """Get data, infer the held-out part, train, infer it again, evaluate, and write reports.

    Parameters
    ----------
    output : str or Path
        Folder to write: ``data``; ``box``, what the model in the box finds; ``run``, the model
        that started from it; and what that finds, ``metrics.json``, ``report.html``.
    data : str or Path or None
        Own annotated images with the parts ``train``, ``val`` and ``test`` as folders; None
        fetches the sample. Where they have other classes than the model in the box, that is only
        started from.
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
    for old in ("run", "box"):
        shutil.rmtree(output / old, ignore_errors=True)
    make_folder(output)
    write_text(output / MARK, "")
    if fields is not None:
        demo_split(fields, source)
    overrides = [f"data.root={source}"]
    if quick:
        overrides += ["train.steps=30", "train.warmup=3", "train.validate_every=10"]
    run, test = output / "run", source / "test"
    dataset = open_dataset(test)
    resolution = () if dataset.mpp is None else ("--mpp", dataset.mpp)
    options: dict[str, Any] = {"mpp": dataset.mpp, "device": device, "progress": progress}
    found = {}

    model = find_model()
    if list(dataset.classes) == read_header(model / MODEL_FILE)["classes"]:
        box = output / "box"
        say(_shown("infer", test / "images", "-o", box, *resolution))
        infer([test], model, box, **options)
        say(_shown("eval", "--pred", box, "--ref", test))
        found["in the box"], _ = evaluate_predictions(box, test)
    settings = [word for o in overrides for word in ("--set", o)]
    say(_shown("train", "finetune", "-o", run, *settings))
    train(load_config("finetune", overrides), run, device=device, progress=progress)
    say(_shown("infer", test / "images", "-m", run, "-o", output, *resolution))
    infer([test], run, output, overwrite=True, **options)
    say(_shown("eval", "--pred", output, "--ref", test))
    found["trained further"], folder = evaluate_predictions(output, test, overwrite=True)
    say(side_by_side(found))
    if data is None:
        say("The labels of this sample are model-made, and all parts come from one study.")
    say(f"report: {folder / 'report.html'}")
    return folder / "report.html"


def side_by_side(found: Mapping[str, Summary]) -> str:
    """Scores of several models on the same images, as a table for a terminal of 80 columns.

    Parameters
    ----------
    found : mapping of str to Summary
        By what the columns are called.

    Returns
    -------
    str
    """
    lines = [f"{'score':17}" + "".join(f"{name:24}" for name in found)]
    first, *_ = found.values()
    rows = {name: [each.scores[name] for each in found.values()] for name in SCORES}
    for name in first.classes:
        rows[f"F1 {name}"] = [each.per_class[name]["f1"] for each in found.values()]
    for name, estimates in rows.items():
        cells = (f"{e.value:.3f}  {e.low:.3f} to {e.high:.3f}" for e in estimates)
        lines.append(f"{name[:16]:17}" + "".join(f"{cell:24}" for cell in cells))
    lines = [line.rstrip() for line in lines]
    lines += wrap(f"95 % intervals: bootstrap over {first.clusters}", 79)
    return "\n".join(lines)


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
