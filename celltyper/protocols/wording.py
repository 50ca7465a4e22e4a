"""What the table of a protocol says in words: names, rules, warnings."""

from __future__ import annotations

from celltyper.protocols.pooling import HEADLINE
from celltyper.protocols.table import MEAN, Difference, ProtocolTable, Row

NAMES = {
    "macro_f1": "macro F1",
    "detection_f1": "F1 det.",
    "typed_f1": "F_c mean",
    "bpq": "bPQ",
    "mpq": "mPQ",
    "aji": "AJI",
}
CLASS_NAMES = {"typed_f1": "F_c", "f1": "F1 (reference)"}

PAIRED = (
    "Differences: pooled score of the variant less that of the first one, over the runs that both "
    "have finished, with the 95 % interval of a paired bootstrap: both see the same drawn patients "
    "or fields, and all seeds of an image are drawn together."
)


def title_of(row: Row | Difference) -> str:
    """What a row is of, in full."""
    domain = "mean over domains" if row.domain == MEAN else row.domain
    parts = (row.variant, domain, f"{100 * row.fraction:g}\N{NO-BREAK SPACE}%")
    return ", ".join(part for part in parts if part)


def rules_of(table: ProtocolTable) -> list[str]:
    """How every figure was computed."""
    over = "mean ± standard deviation (n - 1) over runs (test parts x seeds)"
    if any(row.domain == MEAN for row in table.rows):
        over += "; in the row 'mean', unweighted mean and deviation over the domains"
    notes = [
        f"Value: {over}.",
        f"Interval: 95 %, of the pooled test images of all these runs (table.csv holds the pooled "
        f"value), bootstrap over {table.clusters}; all seeds of an image are drawn together.",
        "Training: the share asked for is of the nuclei of the training groups, nested; whole "
        "groups make it a little more or less; test and validation images are the same for all.",
        *([PAIRED] if table.differences else []),
        *(f"{NAMES[name]}: {table.rules[name]}." for name in HEADLINE),
    ]
    return [note.replace("..", ".") for note in notes]


def warnings_of(table: ProtocolTable) -> list[str]:
    """What a reader must know before the figures: missing runs, too few patients."""
    warnings = []
    if table.missing:
        shown = ", ".join(table.missing[:5])
        more = f" and {len(table.missing) - 5} more" if len(table.missing) > 5 else ""
        warnings.append(
            f"{len(table.missing)} of {len(table.about['runs'])} runs are not finished: "
            f"{shown}{more}"
        )
    if any(row.blocks for row in table.rows):
        warnings.append(
            "There are too few patients or fields for some intervals, so that blocks of images "
            "were drawn: these say how sure the figures are for these images, not for other "
            "patients."
        )
    return warnings
