"""Low-rank adapters: added to an encoder, folded into it, exchanged in peft's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from celltyper.atomic import atomic_path, make_folder
from celltyper.errors import CheckpointError, ConfigError, unknown_name

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

# layers inside a block of timm; older and newer transformers name them differently
_INPUT = r"attn\.(qkv|q|k|v|kv|q_proj|k_proj|v_proj)"
_TARGETS = {
    "attention": _INPUT,
    "attention+output": rf"{_INPUT}|attn\.proj",
    "attention+mlp": rf"{_INPUT}|attn\.proj|mlp\.\w+",
}
# what peft writes before the names of the adapted network
_PREFIX = "base_model.model."
# options of peft that change what an adapter computes, and that are not read here
_FOREIGN = ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")


def trunk(encoder: nn.Module) -> nn.Module:
    """Give the network inside an encoder, such as the timm model; the encoder if it has none."""
    inner: nn.Module = getattr(encoder, "model", encoder)
    return inner


def add_lora(
    encoder: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "attention",
    *,
    dora: bool = False,
) -> nn.Module:
    """Add low-rank adapters (doi:10.48550/arXiv.2106.09685) to the blocks and freeze the rest.

    Only linear layers inside ``blocks.N`` are touched, never the patch embedding, whose layer
    is also called ``proj``.

    Parameters
    ----------
    encoder : nn.Module
        The encoder; changed in place. Until trained, its output stays the same.
    rank : int
        Rank of the update.
    alpha : float
        The update is scaled by ``alpha / rank``.
    dropout : float
        Dropout before the update, in training.
    targets : {"attention", "attention+output", "attention+mlp"} or sequence of str
        Query, key and value; with the attention's output projection too; or all linear layers
        of the block. A sequence names linear layers in full, as timm does.
    dora : bool
        Train the length of every row of the weights apart from its direction
        (doi:10.48550/arXiv.2402.09353).

    Returns
    -------
    nn.Module
        The encoder.

    Raises
    ------
    ConfigError
        If an option is wrong or no layer fits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1 or not 0 <= dropout < 1 or alpha <= 0:
        raise ConfigError(
            f"lora needs rank >= 1, alpha > 0 and 0 <= dropout < 1, got {rank}, {alpha}, {dropout}"
        )
    model = trunk(encoder)
    names = _layers(model, targets)
    card = getattr(encoder, "card", None)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        # a pattern of whole names: peft would match the end of a name otherwise
        target_modules="|".join(re.escape(name) for name in names),
        base_model_name_or_path=card.hub_id if card is not None else None,
        revision=card.revision if card is not None else None,
    )
    encoder.requires_grad_(False)
    for module in model.modules():
        # timm's EVA and BEiT would read the weights of qkv themselves, past the adapter
        if getattr(module, "q_bias", None) is not None and hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    inject_adapter_in_model(config, model)
    return encoder


def merge_lora(encoder: nn.Module) -> nn.Module:
    """Fold adapters into the weights, in place: same output, plain layers, names as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in encoder.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, layer.get_base_layer())
    if layers:
        del trunk(encoder).peft_config
    return encoder


def is_lora(name: str) -> bool:
    """Tell whether a parameter's name belongs to an adapter."""
    return ".lora_" in f".{name}"


def save_lora(encoder: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of an encoder as peft does, for ``PeftModel.from_pretrained``.

    Parameters
    ----------
    encoder : nn.Module
        With adapters that are not folded in; ``load_model(run, merge=False).encoder``, say.
    folder : str or Path
        Gets ``adapter_config.json`` and ``adapter_model.safetensors``, whose names are those of
        the network inside (the timm model). No base weight is written.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        If the encoder has no adapters.
    """
    from peft import get_peft_model_state_dict

    model: Any = trunk(encoder)
    if not hasattr(model, "peft_config"):
        raise ConfigError("the encoder has no adapters to save: use adapt 'lora' or 'dora'")
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {f"{_PREFIX}{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    folder = Path(folder)
    make_folder(folder)
    model.peft_config["default"].save_pretrained(str(folder))
    with atomic_path(folder / TENSORS_FILE) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Adapter:
    """What a folder in peft's format holds.

    Parameters
    ----------
    rank : int
    alpha : float
    targets : tuple of str
        The adapted layers, by their full names in the network.
    dora : bool
    tensors : dict of str to Tensor
        By peft's names, without ``base_model.model.``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dora: bool
    tensors: dict[str, Tensor]


def read_adapter(folder: str | Path) -> Adapter:
    """Read adapters that peft or `save_lora` wrote.

    Parameters
    ----------
    folder : str or Path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Adapter

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the adapter is of a kind that is not supported.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        named = load_file(folder / TENSORS_FILE)
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no adapter in {folder}: it must hold {CONFIG_FILE} and {TENSORS_FILE}, as peft's "
            "save_pretrained writes them"
        ) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"adapter in {folder} is damaged or was not written by peft ({error})"
        ) from error
    foreign = [key for key in _FOREIGN if config.get(key)]
    if config.get("bias", "none") != "none":
        foreign.append("bias")
    if kind != "LORA" or foreign:
        raise CheckpointError(
            f"adapter in {folder} is no plain LoRA or DoRA ({', '.join(foreign) or kind}): merge "
            "it with peft and use the merged weights"
        )
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in named.items()}
    targets = tuple(n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n)
    return Adapter(rank, alpha, targets, bool(config.get("use_dora")), tensors)


def load_lora(
    encoder: nn.Module, folder: str | Path, dropout: float = 0.0, *, dora: bool = False
) -> nn.Module:
    """Add the adapters that a folder in peft's format holds; they can be trained further.

    Parameters
    ----------
    encoder : nn.Module
        The encoder; changed in place. Its network must name its layers as the adapter does.
    folder : str or Path
        See `read_adapter`.
    dropout : float
        Dropout before the update, in training.
    dora : bool
        Which kind of adapter is expected.

    Returns
    -------
    nn.Module
        The encoder.

    Raises
    ------
    ConfigError
        If it is the other kind, or adapts layers that the encoder does not have.
    CheckpointError
        If the adapter cannot be read or is of another shape.
    """
    from peft import set_peft_model_state_dict

    found = read_adapter(folder)
    if found.dora != dora:
        kind = "dora" if found.dora else "lora"
        raise ConfigError(f"adapter in {folder} is made by {kind}: use adapt {kind!r}")
    add_lora(encoder, found.rank, found.alpha, dropout, found.targets, dora=dora)
    wrong = _misfits(trunk(encoder), found.tensors)
    if wrong:
        raise CheckpointError(f"adapter in {folder} does not fit the encoder: {'; '.join(wrong)}")
    set_peft_model_state_dict(trunk(encoder), found.tensors)
    return encoder


def _misfits(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [f"{name} is missing" for name in own if name not in tensors]
    wrong += [f"{name} is left over" for name in tensors if name not in own]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    return wrong[:5] + ([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])


def _layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not isinstance(targets, str):
        lacking = [name for name in targets if name not in linear]
        if lacking or not targets:
            raise ConfigError(f"lora targets {lacking} are no linear layers of the encoder")
        return list(targets)
    if targets not in _TARGETS:
        raise unknown_name("lora targets", targets, _TARGETS)
    inside = re.compile(rf"(^|\.)blocks\.\d+\.({_TARGETS[targets]})$")
    found = [name for name in linear if inside.search(name)]
    if found:
        return found
    if any(re.search(r"(^|\.)blocks\.\d+\.mlp\.", name) for name in linear):
        raise ConfigError(
            f"lora targets {targets!r}: the encoder has no attention; use 'attention+mlp', which "
            "takes its MLPs"
        )
    raise ConfigError(
        f"lora targets {targets!r}: the encoder has no such linear layers in blocks.N, as timm "
        "names them; name its linear layers in full, or use adapt 'last-n', 'norm' or 'full'"
    )
