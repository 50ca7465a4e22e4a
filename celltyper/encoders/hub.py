"""Where weights come from: the Hugging Face hub, its cache, or a local file or folder."""

from __future__ import annotations

import logging
from pathlib import Path

from celltyper.encoders.cards import EncoderCard
from celltyper.errors import CheckpointError

WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "pytorch_model_vision.bin",
)
"""File names that are looked for on the hub, in this order."""


def download_weights(card: EncoderCard) -> Path:
    """Fetch a card's weights from the Hugging Face hub, or find them in its cache.

    Parameters
    ----------
    card : EncoderCard
        With a `hub_id`.

    Returns
    -------
    Path
        The file in the hub's cache.

    Raises
    ------
    CheckpointError
        If the weights are gated, not there, or the hub is out of reach: with what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    own_file = "or give a local file with encoder.weights=PATH"
    if card.hub_id is None:
        raise CheckpointError(
            f"encoder {card.name!r} has no published weights; use encoder.weights=random or PATH"
        )
    where = f"{card.hub_id} (revision {card.revision or 'main'})"
    # Its retries end in the one line that we raise.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for filename in WEIGHTS_FILES:
        try:
            return Path(hf_hub_download(card.hub_id, filename, revision=card.revision))
        except GatedRepoError as error:
            page = card.gate_page or f"huggingface.co/{card.hub_id}"
            raise CheckpointError(
                f"encoder {card.name!r}: weights {where} are gated: accept the terms on {page}, "
                f"run 'hf auth login', {own_file}"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise CheckpointError(
                f"encoder {card.name!r}: the hub has no {where}, or not for you: check the name, "
                f"run 'hf auth login', {own_file}"
            ) from error
        except LocalEntryNotFoundError as error:
            raise _out_of_reach(card, where) from error
        except EntryNotFoundError:
            continue
        except OSError as error:
            raise _out_of_reach(card, where) from error
    raise CheckpointError(
        f"encoder {card.name!r}: {where} has none of {', '.join(WEIGHTS_FILES)}; {own_file}"
    )


def _out_of_reach(card: EncoderCard, where: str) -> CheckpointError:
    return CheckpointError(
        f"encoder {card.name!r}: weights {where} are not in the hub's cache and the hub is out of "
        "reach: go online once, or use encoder.weights=PATH for a local file, or "
        "encoder.weights=random"
    )
