"""Errors that celltyper raises, from general to specific.

::

    CelltyperError (Exception)
    ├── InputError (ValueError)        the user's input is wrong: exit code 2
    │   ├── ConfigError                a config key, value or component name
    │   ├── DataError                  a dataset, image, label or table
    │   └── CheckpointError            a run folder or weights file
    └── RunError (RuntimeError)        the work itself failed: exit code 1
        └── TrainingError              training cannot go on (NaN loss, broken contract)

Every message is one line that says what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CelltyperError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class InputError(CelltyperError, ValueError):
    """Wrong input; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """Wrong config key, value or component name."""


class DataError(InputError):
    """Wrong dataset, image, label or table."""


class CheckpointError(InputError):
    """A run folder or weights file that cannot be used."""


class RunError(CelltyperError, RuntimeError):
    """The work failed although the input was accepted."""


class TrainingError(RunError):
    """Training cannot go on."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not known, with the nearest and all known ones.

    Parameters
    ----------
    kind : str
        What the name stands for, such as ``"decoder"``.
    name : str
        The unknown name.
    known : iterable of str
        All valid names.

    Returns
    -------
    ConfigError
        To be raised by the caller.
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
