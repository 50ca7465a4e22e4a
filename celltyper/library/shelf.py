"""Which models can be called by name, and which folder a name stands for.

The box is a folder of the package, ``celltyper/box``; the cache is ``models`` in the folder of
`celltyper.cache.cache_folder`. In both, a model is a folder with a ``model.safetensors``, and the
name of the folder is its name.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from celltyper.cache import cache_folder
from celltyper.errors import CheckpointError, ConfigError
from celltyper.library.files import CONFIG_FILE, MODEL_FILE, PROTOCOL_FILE, read_header

_OF_A_RUN = (MODEL_FILE, PROTOCOL_FILE, CONFIG_FILE)
"""What tells a folder of a run, finished or not, from any other."""
OF_MODEL = "model:"
"""How weights begin in a config that are those of a model."""
HOW = "'celltyper models fetch URL_OR_HUB_ID' gets one, 'celltyper train' makes one"
"""How to come by a model, for messages."""


class Kept(NamedTuple):
    """A model that can be called by name."""

    name: str
    place: Literal["box", "cache"]
    folder: Path


def box_folder() -> Path:
    """Folder of the models that are part of celltyper."""
    return Path(str(files("celltyper").joinpath("box")))


def models_folder() -> Path:
    """Folder of the user's cache that ``celltyper models fetch`` fills; need not exist."""
    return cache_folder() / "models"


def list_models() -> list[Kept]:
    """List the models of the box, then those of the cache, each by name.

    Returns
    -------
    list of Kept
    """
    return [*_models_in("box", box_folder()), *_models_in("cache", models_folder())]


def find_model(model: str | Path | None = None) -> Path:
    """Find the folder or file of a model.

    Parameters
    ----------
    model : str, Path or None
        A plain word is the name of a model, or a folder here. What has a slash in it, ``./NAME``
        say, or is a Path, is a path. None is the first model of the box that finds cells.

    Returns
    -------
    Path
        What was given, if it is a path; it need not exist.

    Raises
    ------
    CheckpointError
        If a word means nothing, or two things; if there is no model in the box.
    """
    if model is None:
        return _default()
    path = Path(model)
    if isinstance(model, Path) or path.name != model:
        return path
    named = [kept for kept in list_models() if kept.name == model]
    here = path.is_file() or any((path / name).is_file() for name in _OF_A_RUN)
    if here and named:
        raise CheckpointError(
            f"{model} is a run in this folder and a model of the {named[0].place}: write "
            f"./{model} for the run, {named[0].folder} for the model"
        )
    if len(named) > 1:
        raise CheckpointError(
            f"both box and cache have a model {model}: write {named[0].folder} or "
            f"{named[1].folder}, or run 'celltyper models remove {model}'"
        )
    if not named and not path.exists():
        near = get_close_matches(model, [kept.name for kept in list_models()], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"no model at {model}: give a folder that 'celltyper train' wrote, or a name that "
            f"'celltyper models' lists{hint}"
        )
    return named[0].folder if named else path


def weights_of(weights: str) -> str:
    """Say which file the weights are in, if they are those of a model.

    Parameters
    ----------
    weights : str
        ``encoder.weights`` or ``decoder.weights`` of a config: ``model:NAME`` is the model that
        `find_model` finds by this name or path; anything else stays as it is.

    Returns
    -------
    str

    Raises
    ------
    CheckpointError
        If there is no such model.
    """
    if not weights.startswith(OF_MODEL):
        return weights
    found = find_model(weights.removeprefix(OF_MODEL))
    return str(found / MODEL_FILE if found.is_dir() else found)


def pinned(weights: str) -> str:
    """Write down weights so that they are found from any folder.

    Parameters
    ----------
    weights : str
        As in `weights_of`.

    Returns
    -------
    str
        A path becomes absolute; the name of a model of box or cache stays, wherever they lie.
    """
    file = Path(weights_of(weights))
    if any(kept.folder == file.parent for kept in list_models()):
        return weights
    return str(file.absolute()) if file.exists() else weights


def results_folder(run: Path) -> Path:
    """Folder of a run, for results that are to lie in it.

    Parameters
    ----------
    run : Path
        Run folder or the file of a model, from `find_model`.

    Returns
    -------
    Path

    Raises
    ------
    ConfigError
        If it is a model of the box or cache, where nothing else belongs.
    """
    folder = run if run.is_dir() else run.parent
    for kept in list_models():
        if kept.folder.resolve() == folder.resolve():
            raise ConfigError(
                f"{kept.name} is a model of the {kept.place}: say with -o where results go"
            )
    return folder


def _default() -> Path:
    for kept in _models_in("box", box_folder()):
        if read_header(kept.folder / MODEL_FILE).get("task", "cells") == "cells":
            return kept.folder
    names = ", ".join(kept.name for kept in list_models())
    here = f"by name there are {names}; " if names else ""
    raise CheckpointError(
        "no model is in the box of this celltyper: give one with -m, in Python as the first "
        f"argument; {here}{HOW}"
    )


def _models_in(place: Literal["box", "cache"], folder: Path) -> list[Kept]:
    # a dot begins what is being fetched or removed
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{MODEL_FILE}"))
    return [Kept(path.name, place, path) for path in found]
