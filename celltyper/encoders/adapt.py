"""What training may change in an encoder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from celltyper.encoders.lora import add_lora, is_lora, load_lora, read_adapter, trunk
from celltyper.errors import ConfigError, unknown_name

Adapt = Literal["frozen", "lora", "dora", "full", "last-n", "bias", "norm"]

ADAPTS: tuple[str, ...] = get_args(Adapt)
_LORA_OPTIONS = ("rank", "alpha", "dropout", "targets", "adapter")


class Adapted(nn.Module):
    """An encoder of which training changes a named part, or nothing.

    ``requires_grad_(False)`` alone would leave dropout, drop-path and norm statistics of the
    rest running in training.

    Parameters
    ----------
    encoder : nn.Module
        Any encoder; its parameters require gradients if named in `trained`, and only then.
    trained : collection of str
        Parameters, and norm statistics, that training may change.
    active : collection of str
        Modules that are put in training mode; the rest always stays in evaluation mode.

    Attributes
    ----------
    trained : frozenset of str
        The names, as in ``named_parameters()`` of this module.
    """

    def __init__(
        self, encoder: nn.Module, trained: Collection[str] = (), active: Collection[str] = ()
    ) -> None:
        super().__init__()
        plain: Any = encoder
        self.encoder = plain.eval()
        self.trained = frozenset(f"encoder.{name}" for name in trained)
        self.active = tuple(active)
        self.channels: list[int] = list(plain.channels)
        self.patch_size: int = plain.patch_size
        self.embed_dim: int | None = getattr(plain, "embed_dim", None)
        self.card = getattr(plain, "card", None)
        if getattr(plain, "strides", None) is not None:
            self.strides: list[int] = list(plain.strides)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.training = False

    @property
    def model(self) -> nn.Module:
        """The network inside."""
        return trunk(self.encoder)

    def train(self, mode: bool = True) -> Adapted:
        """Put what is trained in training mode; the rest stays in evaluation mode."""
        self.training = mode and bool(self.trained)
        self.encoder.eval()
        for name in self.active:
            self.encoder.get_submodule(name).train(mode)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the encoder, without gradient if nothing is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trained)):
            maps: list[Tensor] = self.encoder(images)
        return maps

    def embed(self, images: Tensor) -> Tensor:
        """Pooled embedding of the encoder, without gradient if nothing is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trained)):
            embedding: Tensor = self.encoder.embed(images)
        return embedding

    def embed_whole(self, images: Tensor) -> Tensor:
        """As `embed`, of images that are neither scaled nor cut."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trained)):
            embedding: Tensor = self.encoder.embed_whole(images)
        return embedding

    def tokens(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token, if any, and patch tokens (B, C, h, w), of images taken as they are."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trained)):
            first, patches = self.encoder.tokens(images)
        return first, patches


def freeze(encoder: nn.Module) -> Adapted:
    """Freeze an encoder: no gradient, no dropout, no running statistics. Use what it returns."""
    return Adapted(encoder.encoder if isinstance(encoder, Adapted) else encoder)


def check_adapt(adapt: str, lora: Mapping[str, Any] | None = None) -> None:
    """Refuse an unknown mode or LoRA option, before a large encoder is built.

    Raises
    ------
    ConfigError
        Listing what is known.
    """
    if adapt not in ADAPTS:
        raise unknown_name("adapt", adapt, ADAPTS)
    for key in lora or {}:
        if key not in _LORA_OPTIONS:
            raise unknown_name("lora option", key, _LORA_OPTIONS)


def adapt_encoder(
    encoder: nn.Module,
    adapt: Adapt = "frozen",
    *,
    lora: Mapping[str, Any] | None = None,
    last_n: int = 4,
    checkpointing: bool = False,
) -> nn.Module:
    """Say what of an encoder training may change.

    Parameters
    ----------
    encoder : nn.Module
        The encoder; changed in place. Use what is returned.
    adapt : {"frozen", "lora", "dora", "full", "last-n", "bias", "norm"}
        Nothing; low-rank adapters (`celltyper.encoders.lora.add_lora`), of plain or of weight-
        decomposed kind; everything; the last blocks with the final norm; all biases (BitFit,
        doi:10.18653/v1/2022.acl-short.1); or scale and shift of all normalisation layers.
    lora : mapping, optional
        rank, alpha, dropout, targets; or ``adapter``, a folder in peft's format to start from.
        Used with "lora" and "dora" only.
    last_n : int
        Number of blocks for "last-n".
    checkpointing : bool
        Recompute the blocks in the backward pass instead of keeping what they gave: less memory,
        about a third more time.

    Returns
    -------
    nn.Module
        In evaluation mode. For "full" the encoder itself, else an `Adapted`.

    Raises
    ------
    ConfigError
        If `adapt` or an option is unknown or has nothing to act on.
    CheckpointError
        If the adapter to start from cannot be read or does not fit.
    """
    check_adapt(adapt, lora)
    if checkpointing:
        _checkpoint(encoder, adapt)
    if adapt == "full":
        return encoder.requires_grad_(True).eval()
    trained: set[str] = set()
    active: list[str] = []
    if adapt in ("lora", "dora"):
        _add_adapters(encoder, lora or {}, dora=adapt == "dora")
        # the layer around the base, whose dropout it holds
        modules = [name for name, _ in encoder.named_modules()]
        active = [n.removesuffix(".lora_dropout") for n in modules if n.endswith(".lora_dropout")]
        trained = {name for name, _ in encoder.named_parameters() if is_lora(name)}
    elif adapt == "last-n":
        trained = _last_blocks(encoder, last_n)
        active = _whole_modules(encoder, trained)
        trained |= {n for n, _ in encoder.named_buffers() if n.startswith(tuple(active))}
    elif adapt != "frozen":
        trained = _biases_or_norms(encoder, adapt)
    return Adapted(encoder, trained, active)


def depths(encoder: nn.Module) -> dict[str, int]:
    """Depth of every weight on the way to the feature maps, as timm groups them.

    Parameters
    ----------
    encoder : nn.Module
        An encoder around a timm model.

    Returns
    -------
    dict of str to int
        0 for the embedding of the image, then 1 to L for the blocks; the final norm belongs to
        the last. Weights that no map depends on (pooling, classifier, final norm of a pyramid)
        are left out.

    Raises
    ------
    ConfigError
        If the model does not tell its blocks.
    """
    from timm.models import group_parameters

    model: Any = trunk(encoder)
    if not hasattr(model, "group_matcher"):
        raise ConfigError(
            "the encoder does not tell its blocks (timm's group_matcher): adapt 'last-n' and "
            "layer_decay need a timm model"
        )
    prefix = _prefix(encoder, model)
    # what chooses the maps is the module around the model, whatever is around that one
    inner = next((m for m in encoder.modules() if any(c is model for c in m.children())), encoder)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    # a map of a pyramid leaves its level as it is
    in_maps = re.compile(r"\.\d+\." if hasattr(inner, "strides") else r"^norm\.|\.\d+\.")
    found = {f"{prefix}{n}": d for n, d in groups.items() if not d or in_maps.search(n)}
    blocks = getattr(inner, "blocks", None)
    if not isinstance(blocks, list):
        return found
    # blocks behind the last map are never run, so the final norm follows on an earlier one
    last = blocks[-1] + 1
    norm = f"{prefix}norm."
    return {n: min(d, last) for n, d in found.items() if d <= last or n.startswith(norm)}


def _prefix(encoder: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in encoder.named_modules() if module is model)
    return f"{name}." if name else ""


def _add_adapters(encoder: nn.Module, lora: Mapping[str, Any], *, dora: bool) -> None:
    options = dict(lora)
    folder = options.pop("adapter", None)
    if folder is None:
        add_lora(encoder, **options, dora=dora)
        return
    found, dropout = read_adapter(folder), options.pop("dropout", 0.0)
    for key, value in options.items():
        has = getattr(found, key)
        if (tuple(value) if key == "targets" else value) != has:
            raise ConfigError(
                f"lora {key} is {value!r}, but the adapter in {folder} has its own: leave it out"
            )
    load_lora(encoder, folder, dropout, dora=dora)


def _last_blocks(encoder: nn.Module, count: int) -> set[str]:
    depth_of = depths(encoder)
    last = max(depth_of.values())
    if not 1 <= count <= last:
        raise ConfigError(f"last_n is {count}, but the encoder has {last} blocks: use 1 to {last}")
    return {name for name, depth in depth_of.items() if depth > last - count}


def _whole_modules(encoder: nn.Module, trained: Collection[str]) -> list[str]:
    """Largest modules of which every parameter is trained."""
    whole: list[str] = []
    for name, module in encoder.named_modules():
        names = [f"{name}.{n}" if name else n for n, _ in module.named_parameters()]
        inside = any(name.startswith(f"{above}.") for above in whole)
        if names and not inside and all(n in trained for n in names):
            whole.append(name)
    return whole


def _biases_or_norms(encoder: nn.Module, adapt: str) -> set[str]:
    found: set[str] = set()
    for name, module in encoder.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        if adapt == "bias":
            # EVA has biases called q_bias and v_bias
            found |= {n for n in own if n.endswith((".bias", "_bias"))}
        elif "norm" in type(module).__name__.lower():
            # by name: timm has norms of its own beside those of torch
            found |= set(own)
    if hasattr(trunk(encoder), "group_matcher"):
        found &= depths(encoder).keys()
    if not found:
        raise ConfigError(f"adapt {adapt!r}: the encoder has no such parameters")
    return found


def _checkpoint(encoder: nn.Module, adapt: str) -> None:
    if adapt == "frozen":
        raise ConfigError("checkpointing has no effect with adapt 'frozen': leave it out")
    try:
        trunk(encoder).set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            "the encoder cannot recompute its blocks (timm's set_grad_checkpointing): set "
            "checkpointing to false"
        ) from error
