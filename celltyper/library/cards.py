"""Model cards: what a model was trained on, how good it is, what it must not be used for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from celltyper.config import Section, one_line
from celltyper.errors import CheckpointError

CARD_FILE = "card.yaml"


class TrainedOn(Section):
    """Data that a model was trained on.

    Parameters
    ----------
    source : str
        Name of the dataset.
    licence : str
        Licence of the data.
    what : str
        What of it, such as "497 images, 25,915 nuclei".
    labels : str
        Who made the labels: "by hand", "by a model, corrected", "none".
    """

    source: str
    licence: str
    what: str
    labels: str


class Figure(Section):
    """A score on data that training did not see.

    Parameters
    ----------
    source : str
        Name of the dataset.
    images : int
        How many of its images.
    score : str
        Name of the score, as ``celltyper eval`` prints it.
    value, low, high : float
        The score and its 95 % interval.
    apart : {"source", "left out", "patients", "slides", "images"}
        How far these images are from training: nothing of this source was trained on; the source
        was, but the figure is of a model trained alike without it; nothing of these patients or
        slides was, or just not these images.
    """

    source: str
    images: int = Field(ge=1)
    score: str
    value: float
    low: float
    high: float
    apart: Literal["source", "left out", "patients", "slides", "images"]

    @model_validator(mode="after")
    def _value_lies_in_its_interval(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value:g} is not between {self.low:g} and {self.high:g}")
        return self


class ModelCard(Section):
    """What the user of a model must know.

    Parameters
    ----------
    summary : str
        What the model does, in a sentence or two.
    licence : str
        Licence of the model.
    trained_on : tuple of TrainedOn
        All data of training, those of a teacher's too.
    figures : tuple of Figure
        How good it is where it was not trained.
    limits : tuple of str
        Where it fails.
    not_for : tuple of str
        What it must not be used for.
    """

    summary: str
    licence: str
    trained_on: tuple[TrainedOn, ...] = Field(min_length=1)
    figures: tuple[Figure, ...] = ()
    limits: tuple[str, ...] = Field(min_length=1)
    not_for: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> Self:
        trained = {data.source for data in self.trained_on}
        for figure in self.figures:
            if figure.apart == "source" and figure.source in trained:
                raise ValueError(f"{figure.source} is in trained_on, so not apart as a source")
            if figure.apart == "left out" and figure.source not in trained:
                raise ValueError(f"{figure.source} is not in trained_on, so apart as a source")
        return self


def read_card(run: Path) -> ModelCard | None:
    """Read the card of a model.

    Parameters
    ----------
    run : Path
        Folder of the model, or its file.

    Returns
    -------
    ModelCard or None
        None if there is no ``card.yaml`` beside the model.

    Raises
    ------
    CheckpointError
        If the file is damaged, or a field is missing, unknown or wrong.
    """
    path = (run if run.is_dir() else run.parent) / CARD_FILE
    if not path.is_file():
        return None
    try:
        return ModelCard.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"{key}: {first['msg']}" if key else first["msg"]
        raise CheckpointError(f"model card {path}: {what} (docs/models.md)") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"model card {path} cannot be read: {one_line(error)}") from error


def card_line(run: Path) -> str | None:
    """Say in one line what the reader of a report must know of the model.

    Parameters
    ----------
    run : Path
        Folder of the model, or its file.

    Returns
    -------
    str or None
        None without a card. A wrong card is said to be wrong: it is no reason to lose the work.
    """
    try:
        card = read_card(run)
    except CheckpointError as error:
        return str(error)
    if card is None:
        return None
    name = run.name if run.is_dir() else run.parent.name
    trained = ", ".join(data.source for data in card.trained_on)
    return (
        f"{name} ({card.licence}), trained on {trained}; not for {', '.join(card.not_for)}; "
        f"celltyper models show {name}"
    )
