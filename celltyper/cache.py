"""Where celltyper keeps what it can get or compute again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder for downloads and features: ``$CELLTYPER_CACHE``, else in the user's cache."""
    own = os.environ.get("CELLTYPER_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "celltyper"
