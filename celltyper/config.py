"""What a run is made of: every section, every default, and how YAML and ``--set`` fill them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, overload

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from celltyper.errors import ConfigError, unknown_name


class Section(BaseModel):
    """One section of the config: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where the annotated images are and how training tiles are drawn from them.

    ``split`` is a file that lists the images of ``train``, ``val`` and other parts by name;
    without ``val`` in it, or with ``val_fraction`` 0, all training images train, nothing is
    validated, and the last model is the result.

    ``mpp`` is the resolution the model works at: images of another one are rescaled, images of
    unknown resolution are taken to have it. By default it is that of the training images.
    """

    root: Path | None = None
    reader: str = "auto"
    taxonomy: Path | None = None
    # splits may be called 1, 2, 3, as those of Lizard
    train: Annotated[str, Field(coerce_numbers_to_str=True)] = "train"
    val: Annotated[str, Field(coerce_numbers_to_str=True)] = "val"
    split: Path | None = None
    val_fraction: float = Field(0.2, ge=0.0, lt=1.0)
    mpp: float | None = Field(None, gt=0.0)
    tile: int = Field(256, ge=32, le=2048)
    balance: float = Field(0.5, ge=0.0, le=1.0)
    workers: int = Field(0, ge=0)


class Lora(Section):
    """Low-rank adaptation of the encoder (Hu 2021, doi:10.48550/arXiv.2106.09685).

    ``adapter`` is a folder in peft's format to start from; rank, alpha and targets are its own.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0.0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    targets: Literal["attention", "attention+output", "attention+mlp"] | tuple[str, ...] = (
        "attention"
    )
    adapter: Path | None = None


class Encoder(Section):
    """Which encoder, from which weights, at which resolution, and what of it is trained.

    ``weights`` is ``model:NAME`` for those of the encoder of a trained model, by name or path.

    ``mpp`` is the resolution at which the network sees the image, "card" the one it was trained
    at; images are scaled to it inside the model. By default they are taken as they are: scaled
    down to most cards' 0.5, a nucleus of 0.25 micrometres per pixel would be one patch.

    ``cache`` is the number of views of every image whose features a frozen encoder computes once
    and keeps on disk: the image itself and augmented versions of it. 0 keeps none: every tile is
    augmented anew, and the encoder runs in every step.
    """

    name: str = "vit_small_patch14_dinov2"
    weights: str = "auto"
    revision: str | None = None
    mpp: Annotated[float, Field(gt=0.0)] | Literal["card"] | None = None
    adapt: Literal["frozen", "lora", "dora", "full", "last-n", "bias", "norm"] = "frozen"
    lora: Lora = Lora()
    last_n: int = Field(4, ge=1)
    layer_decay: float = Field(1.0, gt=0.0, le=1.0)
    checkpointing: bool = False
    cache: int = Field(0, ge=0, le=64)
    cache_gb: float = Field(20.0, gt=0.0)
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> Encoder:
        used_by = {
            "lora": ("lora", "dora"),
            "last_n": ("last-n",),
            "layer_decay": ("full", "last-n"),
            "checkpointing": ("lora", "dora", "full", "last-n", "bias", "norm"),
            "cache": ("frozen",),
        }
        if self.revision is not None and self.weights in ("random", "twin"):
            raise ValueError(f"encoder.revision has no effect with encoder.weights={self.weights}")
        for option, modes in used_by.items():
            unused = self.adapt not in modes
            if unused and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(
                    f"encoder.{option} has no effect with encoder.adapt={self.adapt}; leave it "
                    f"out, or adapt by {' or '.join(modes)}"
                )
        return self


class Decoder(Section):
    """Which decoder; ``options`` go to its constructor.

    ``branches`` says whether phenotype and instance maps share it or have one each; then
    ``instance_options`` replace some of the options for that of the instances.
    """

    name: str = "dpt"
    branches: Literal["shared", "separate"] = "shared"
    options: dict[str, Any] = {}
    instance_options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _instance_options_have_a_decoder(self) -> Decoder:
        if self.instance_options and self.branches == "shared":
            raise ValueError(
                "decoder.instance_options has no effect with decoder.branches=shared; put it "
                "into decoder.options, or set decoder.branches=separate"
            )
        return self


class Instances(Section):
    """How maps become cells; ``options`` go to the instance method."""

    method: str = "hv"
    options: dict[str, Any] = {}


class Augment(Section):
    """Strengths of the training augmentation; zero switches a transform off."""

    dihedral: bool = True
    affine_probability: float = Field(1.0, ge=0.0, le=1.0)
    rotate: float = Field(180.0, ge=0.0, le=180.0)
    shift: float = Field(0.1, ge=0.0, le=1.0)
    scale: float = Field(0.2, ge=0.0, lt=1.0)
    elastic: float = Field(1.5, ge=0.0)
    hed_sigma: float = Field(0.025, ge=0.0)
    hed_bias: float = Field(0.05, ge=0.0)
    color: float = Field(0.1, ge=0.0, lt=1.0)
    blur: float = Field(0.7, ge=0.0)
    noise: float = Field(4.0, ge=0.0)


class Loss(Section):
    """Weights of the terms of the loss."""

    cross_entropy: float = Field(1.0, ge=0.0)
    dice: float = Field(1.0, ge=0.0)
    focal: float = Field(0.0, ge=0.0)
    focal_gamma: float = Field(2.0, ge=0.0)
    instances: float = Field(1.0, ge=0.0)
    label_smoothing: float = Field(0.05, ge=0.0, lt=1.0)
    class_weights: Literal["none", "inverse", "sqrt", "effective", "published"] = "effective"


class Train(Section):
    """Optimisation, validation, stopping and logging.

    ``precision`` of ``auto`` is bf16 where the device multiplies it itself, and fp32 elsewhere.
    """

    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(3e-4, gt=0.0)
    encoder_lr: float | None = Field(None, gt=0.0)
    weight_decay: float = Field(0.03, ge=0.0)
    warmup: int = Field(200, ge=0)
    clip: float = Field(2.0, gt=0.0)
    ema: float = Field(0.0, ge=0.0, lt=1.0)
    accumulate: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    compile: bool = False
    validate_every: int = Field(200, ge=1)
    patience: int | None = Field(None, ge=1)
    metric: str = "macro_f1"
    log: Literal["csv", "tensorboard"] = "csv"


class Infer(Section):
    """Tiling of images at inference, and over how many symmetries of a tile maps are averaged.

    ``precision`` is that of the forward pass where the device computes faster in it, and fp32
    elsewhere.
    """

    tile: int | None = Field(None, ge=32, le=4096)
    overlap: int = Field(64, ge=0)
    symmetries: Literal[1, 2, 4, 8] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = Field(8, ge=1)


class Calibrate(Section):
    """How class probabilities are scaled at the end of training (docs/calibration.md).

    With fewer than ``min_cases`` cells, or windows, of validation none is scaled.
    """

    method: Literal["temperature", "vector", "none"] = "temperature"
    min_cases: int = Field(100, ge=2)


class Config(Section):
    """A whole run. Defaults live here only; a YAML holds what a recipe chooses.

    ``start`` is a trained model, by name or path: training starts from all its weights, and
    encoder, decoder, instance method and resolution are its own.
    """

    task: Literal["cells"] = "cells"
    seed: int = Field(0, ge=0)
    start: Annotated[str, Field(min_length=1)] | None = None
    data: Data = Data()
    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()
    instances: Instances = Instances()
    augment: Augment = Augment()
    loss: Loss = Loss()
    train: Train = Train()
    infer: Infer = Infer()
    calibration: Calibrate = Calibrate()

    @model_validator(mode="after")
    def _augmentation_has_an_effect(self) -> Config:
        if self.encoder.cache == 1 and self.augment != Augment():
            raise ValueError(
                "augment has no effect with encoder.cache=1, which keeps the features of the "
                "images as they are: leave it out, or keep more views"
            )
        return self

    @model_validator(mode="after")
    def _something_to_write(self) -> Config:
        tile = self.infer.tile or self.data.tile
        if self.infer.overlap >= tile:
            raise ValueError(
                f"infer.overlap {self.infer.overlap} leaves nothing of a tile of {tile}; "
                "lower it or raise infer.tile"
            )
        return self


TASKS = ("cells", "patches")
"""What a config can be for; the sections of the second are in `celltyper.classification.config`."""


def recipes() -> dict[str, Path]:
    """Recipes that come with celltyper, by name.

    Returns
    -------
    dict of str to Path
        YAML files by stem: those inside the installed package, or ``configs/`` of a checkout.
    """
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((f for f in folders if f.is_dir()), None)
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))} if folder else {}


Model = TypeVar("Model", bound="Section")


@overload
def load_config(source: str | Path, overrides: Iterable[str] = ()) -> Config: ...


@overload
def load_config(source: str | Path, overrides: Iterable[str], model: type[Model]) -> Model: ...


def load_config(
    source: str | Path, overrides: Iterable[str] = (), model: type[Any] | None = None
) -> Any:
    """Read a config from a YAML file or a recipe's name and apply overrides.

    Parameters
    ----------
    source : str or Path
        Path of a YAML file, or the name of a recipe (see `recipes`).
    overrides : iterable of str
        Assignments ``section.key=value``; the value is parsed as YAML.
    model : type of Section
        What it is to be; by default a `Config`.

    Returns
    -------
    Config
        Or what `model` says.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, it is of another task, a key is unknown or a value is
        out of bounds; the message names the key.
    """
    path, values = _read(source)
    overrides, model = list(overrides), model or Config
    task = model.model_fields["task"].default
    if values.get("task", "cells") != task:
        raise ConfigError(f"{path} is a config of task {values['task']!r}, here it must be {task}")
    where = "--set" if overrides and _is_valid(values, model) else str(path)
    return parse_config(values, overrides, model, where=where)


def task_of(source: str | Path) -> str:
    """What a config is for: "cells" or "patches".

    Parameters
    ----------
    source : str or Path
        As in `load_config`.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, or its task is unknown.
    """
    path, values = _read(source)
    task = values.get("task", "cells")
    if task not in TASKS:
        raise ConfigError(f"{path}: {unknown_name('task', str(task), TASKS)}")
    return str(task)


def _read(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path of a config, and its values as they are written there."""
    return read_named(source, "recipe", recipes(), "sections such as 'encoder:'")


def read_named(
    source: str | Path, kind: str, known: Mapping[str, Path], holds: str
) -> tuple[Path, dict[str, Any]]:
    """Read a YAML file, or one that comes with celltyper by its name.

    Parameters
    ----------
    source : str or Path
    kind : str
        What it is: "recipe", "protocol".
    known : mapping of str to Path
        Those that come along.
    holds : str
        What a file of this kind must hold.

    Returns
    -------
    path : Path
        Where it was read.
    values : dict

    Raises
    ------
    ConfigError
        If it is missing or unknown, or not YAML.
    """
    path = Path(source)
    if not path.is_file():
        if path.suffix in {".yaml", ".yml", ".json"}:
            raise ConfigError(
                f"{kind} {path} does not exist; those that come along: {', '.join(sorted(known))}"
            )
        if str(source) not in known:
            raise unknown_name(kind, str(source), known)
        path = known[str(source)]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold {holds}, got {values!r}")
    return path, values


@overload
def parse_config(
    values: Mapping[str, Any], overrides: Iterable[str] = (), *, where: str = "config"
) -> Config: ...


@overload
def parse_config(
    values: Mapping[str, Any],
    overrides: Iterable[str],
    model: type[Model],
    *,
    where: str = "config",
) -> Model: ...


def parse_config(
    values: Mapping[str, Any],
    overrides: Iterable[str] = (),
    model: type[Any] | None = None,
    *,
    where: str = "config",
) -> Any:
    """Validate nested values as a config, after applying ``section.key=value`` overrides.

    Parameters
    ----------
    values : mapping
        Sections by name, as read from YAML.
    overrides : iterable of str
        Assignments ``section.key=value``.
    model : type of Section
        What they are to be; by default a `Config`.
    where : str
        Names the source in error messages.

    Returns
    -------
    Config
        Or what `model` says.

    Raises
    ------
    ConfigError
        Naming the first key that is unknown or out of bounds.
    """
    model, merged = model or Config, _copy(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {override!r}: expected section.key=value")
        *sections, last = key.strip().split(".")
        target = merged
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: {one_line(error)}") from error
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error, model)}") from error


def _is_valid(values: Mapping[str, Any], model: type[Section]) -> bool:
    try:
        model.model_validate(_copy(values))
    except ValidationError:
        return False
    return True


def dump_config(config: Section) -> str:
    """Write a config as YAML with every value, defaults included.

    Parameters
    ----------
    config : Section
        A whole config.

    Returns
    -------
    str
        YAML that `load_config` reads back as an equal config.
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def one_line(error: Exception) -> str:
    """Squeeze the message of an exception into one line."""
    return " ".join(str(error).split())


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """First problem of a validation in one line, naming the key.

    Parameters
    ----------
    error : ValidationError
    model : type of BaseModel
        What was validated; an unknown key lists those of its section.

    Returns
    -------
    str
    """
    first = error.errors()[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    # pydantic names the kinds that a value may be of as if they were keys
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    if first["type"] == "extra_forbidden":
        section: Any = model
        for part in first["loc"][:-1]:
            if get_origin(section) is dict:
                section = get_args(section)[1]
            else:
                section = section.model_fields[str(part)].annotation
        problem = unknown_name("key", str(first["loc"][-1]), section.model_fields)
        return f"{key}: {problem}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key}: {first['msg'].lower()}, got {first['input']!r}{more}"
