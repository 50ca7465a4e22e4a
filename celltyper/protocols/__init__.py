"""Protocols: one model trained on every fold, fraction, domain and seed, and the table of it."""

from __future__ import annotations

from celltyper.protocols.patches import run_patch_protocol
from celltyper.protocols.protocol import Protocol, load_protocol
from celltyper.protocols.running import run_protocol
from celltyper.protocols.table import protocol_table
from celltyper.protocols.writing import report_protocol

__all__ = [
    "Protocol",
    "load_protocol",
    "protocol_table",
    "report_protocol",
    "run_patch_protocol",
    "run_protocol",
]
