"""Heads on kept embeddings, fitted in seconds; settings are chosen inside the training part."""

from __future__ import annotations

from celltyper.probes.probe import PROBES, Probe, fit_probe, load_probe

__all__ = ["PROBES", "Probe", "fit_probe", "load_probe"]
