"""Heads on kept embeddings, fitted in seconds; settings are chosen inside the training part."""

from __future__ import annotations

from celltyper.probes.cases import DEFAULT
from celltyper.probes.probe import PROBES, Probe, check_options, fit_probe, load_probe

__all__ = ["DEFAULT", "PROBES", "Probe", "check_options", "fit_probe", "load_probe"]
