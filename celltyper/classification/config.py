"""What a run of patch mode is made of: every section and every default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from celltyper.config import Augment, Calibrate, Encoder, Section

Text = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]


class PatchData(Section):
    """Where the annotated windows are, and which part of their surroundings belongs to them.

    ``size`` is the side of a window in pixels at ``mpp``, around the annotated point or the middle
    of the patch; by default it is the whole patch. ``positive`` is the class that sensitivity,
    precision and the threshold are about; by default the rarer of two.

    ``split`` is a file that lists the patches of ``train``, ``val`` and other parts by name.
    """

    root: Path | None = None
    reader: str = "auto"
    images: Path | None = None
    classes: tuple[Text, ...] = ()
    positive: Text | None = None
    mpp: float | None = Field(None, gt=0.0)
    size: int | None = Field(None, ge=8, le=4096)
    train: Text = "train"
    val: Text = "val"
    split: Path | None = None
    val_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    skip_bad: bool = False


class View(Section):
    """What the encoder is shown of a window, and what is taken of what it gives.

    ``input`` is the side in pixels to which a window is scaled; by default it is the card's.
    ``pool`` joins any of ``cls`` (class token), ``mean`` (of all patch tokens) and ``center`` (mean
    of the middle quarter of them) with ``+``, or is the card's rule.
    ``symmetries`` is over how many symmetries of the square a window is seen: in training as so
    many cases, at inference averaged.
    """

    input: int | None = Field(None, ge=14, le=2048)
    pool: Annotated[str, Field(pattern=r"^(card|(cls|mean|center)(\+(cls|mean|center))*)$")] = (
        "card"
    )
    symmetries: Literal[1, 2, 4, 8] = 1
    batch_size: int = Field(32, ge=1)


class Head(Section):
    """What turns an embedding into probabilities; ``options`` go to it.

    The first four are fitted to the embeddings of a frozen encoder; ``linear`` and ``attention``
    (over the patch tokens) are trained by gradient, and with them what ``encoder.adapt`` says.
    """

    name: Literal["logistic", "mlp", "knn", "prototype", "linear", "attention"] = "logistic"
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def by_gradient(self) -> bool:
        """Whether it is trained step by step, on augmented windows."""
        return self.name in ("linear", "attention")


class PatchLoss(Section):
    """Weights of classes and cases.

    ``targets`` is the label, or the share of the experts that chose each class. ``agreement``
    weighs a case by the share of the experts that agree with its label.
    """

    class_weights: Literal["balanced", "sqrt", "none"] = "balanced"
    targets: Literal["label", "votes"] = "label"
    agreement: bool = False


class PatchTrain(Section):
    """Optimisation of a head that is trained by gradient.

    The last weights are kept, averaged with decay ``ema`` over steps (0: not averaged).
    ``encoder_lr`` is that of the adapted part of the encoder; by default it is ``lr``.
    """

    steps: int = Field(400, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-4, gt=0.0)
    encoder_lr: float | None = Field(None, gt=0.0)
    weight_decay: float = Field(0.05, ge=0.0)
    warmup: int = Field(20, ge=0)
    clip: float = Field(1.0, gt=0.0)
    ema: float = Field(0.99, ge=0.0, lt=1.0)
    save_every: int = Field(100, ge=1)


class PatchConfig(Section):
    """A whole run of patch mode. Defaults live here only; a YAML holds what a recipe chooses."""

    task: Literal["patches"] = "patches"
    seed: int = Field(0, ge=0)
    data: PatchData = PatchData()
    encoder: Encoder = Encoder()
    view: View = View()
    head: Head = Head()
    loss: PatchLoss = PatchLoss()
    augment: Augment = Augment()
    train: PatchTrain = PatchTrain()
    calibration: Calibrate = Calibrate()

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> PatchConfig:
        if self.encoder.mpp is not None:
            raise ValueError("encoder.mpp has no effect on patches: set data.size and view.input")
        if self.encoder.cache:
            raise ValueError("encoder.cache has no effect on patches: embeddings are always kept")
        if self.encoder.adapt != "frozen" and not self.head.by_gradient:
            raise ValueError(
                f"encoder.adapt={self.encoder.adapt}: head {self.head.name!r} is fitted to the "
                "embeddings of a frozen encoder; take head.name=linear or attention"
            )
        for name, section in (("train", self.train), ("augment", self.augment)):
            if not self.head.by_gradient and section != type(section)():
                raise ValueError(
                    f"{name} has no effect on head {self.head.name!r}, which is fitted to "
                    "embeddings at once; take head.name=linear or attention"
                )
        if self.head.name == "attention" and self.view.pool != "card":
            raise ValueError("view.pool has no effect on head 'attention', which weighs all tokens")
        if len(set(parts := self.view.pool.split("+"))) < len(parts):
            raise ValueError(f"view.pool names a part twice: {self.view.pool}")
        return self
