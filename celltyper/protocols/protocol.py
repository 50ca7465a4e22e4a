"""What a protocol is made of, and how its YAML file is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from celltyper.config import Section, first_problem, parse_config, read_named, recipes
from celltyper.errors import ConfigError

FIXED = (
    *("root", "reader", "images", "skip_bad", "taxonomy", "classes", "positive"),
    *("train", "val", "split", "val_fraction"),
)
"""Keys of ``data`` that decide which images and classes there are, the same for all variants."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
Text = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]
"""YAML reads the name of a split or domain such as 1 as a number."""
Whole = TypeVar("Whole", bound=Section)

WAYS = ("folds", "leave_out", "train_on", "hold_out", "test", "splits")


class Protocol(Section):
    """Which runs there are: every test part x fraction x seed x variant.

    Exactly one of these says what is tested: ``folds`` (number of folds of whole groups),
    ``leave_out`` (an axis of the data's domains, such as centre, or some ``domains`` of it),
    ``train_on`` (an axis, or some ``domains`` of it: each trains a model that all others test),
    ``hold_out`` (a share of the images, in whole groups), ``test`` (a split that the data, or
    ``data.split``, name) and ``splits`` (which splits train, validate and test, several times).

    ``fractions`` are of the training images, nested. They are made of whole ``groups`` or, in
    patch mode, of single ``windows`` of the training groups, as ``fraction_of`` says; by default
    of windows in patch mode. ``seeds`` decide weights, order and augmentation, and which groups
    are in which fold, fraction and validation; by default it is the seed of the config.
    ``variants`` are values of ``section.key`` in place of the config's.
    """

    folds: int | None = Field(None, ge=2)
    leave_out: Text | None = None
    train_on: Text | None = None
    hold_out: float | None = Field(None, gt=0.0, lt=1.0)
    domains: tuple[Text, ...] = ()
    test: Text | None = None
    splits: tuple[dict[Literal["train", "val", "test"], Text], ...] = ()
    fractions: tuple[Share, ...] = Field((1.0,), min_length=1)
    fraction_of: Literal["groups", "windows"] | None = None
    seeds: tuple[Seed, ...] = ()
    variants: dict[Name, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way_to_test(self) -> Protocol:
        given = [key for key in WAYS if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(WAYS[:-1])} and {WAYS[-1]}, got "
                + (", ".join(given) or "none")
            )
        if self.domains and self.leave_out is None and self.train_on is None:
            raise ValueError(
                "domains has no effect without leave_out or train_on, whose domains it lists"
            )
        if self.fraction_of is not None and self.fractions == (1.0,):
            raise ValueError("fraction_of has no effect without fractions below 1")
        if any(not {"train", "test"} <= names.keys() for names in self.splits):
            raise ValueError("each of splits names train and test, and may name val")
        for key in ("fractions", "seeds", "domains", "splits"):
            values = getattr(self, key)
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"{key} lists a value twice: {', '.join(map(str, values))}")
        same = {"seed", "task", "data", *(f"data.{key}" for key in FIXED)}
        for name, values in self.variants.items():
            fixed = [key for key in values if key.strip() in same]
            if fixed:
                raise ValueError(
                    f"variant {name!r} sets {fixed[0]}: variants are compared on the same images, "
                    "classes and seeds; set it in the config"
                )
        return self


def protocol_files() -> dict[str, Path]:
    """Protocols that come with celltyper, by name."""
    folder = next(iter(recipes().values())).parent / "protocols"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_protocol(source: str | Path) -> Protocol:
    """Read a protocol.

    Parameters
    ----------
    source : str or Path
        YAML file, or the name of a protocol that comes with celltyper (see `protocol_files`).

    Returns
    -------
    Protocol

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, a key is unknown or a value is out of bounds.
    """
    path, values = read_named(source, "protocol", protocol_files(), "keys such as 'folds:'")
    try:
        return Protocol.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, Protocol)}") from error


def variant_configs(protocol: Protocol, config: Whole) -> dict[str, Whole]:
    """Config of every variant.

    Parameters
    ----------
    protocol : Protocol
    config : Config
        Or a `PatchConfig`.

    Returns
    -------
    dict of str to Config
        By name; one of the name "" if the protocol lists none.

    Raises
    ------
    ConfigError
        Naming the variant, and the key that is unknown or out of bounds.
    """
    values = config.model_dump(mode="json")
    return {
        name: parse_config(
            values,
            [f"{key}={json.dumps(value)}" for key, value in own.items()],
            type(config),
            where=f"variant {name!r}",
        )
        for name, own in (protocol.variants or {"": {}}).items()
    }
