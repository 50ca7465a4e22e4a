"""What the table of a protocol in patch mode says in words: names, rules, warnings, facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

import numpy as np

from celltyper.classification.config import PatchConfig
from celltyper.classification.page import NAMES
from celltyper.config import parse_config
from celltyper.library.files import PROTOCOL_FILE
from celltyper.protocols.patch_table import (
    HEADLINE,
    MIN_CLUSTERS,
    PatchDifference,
    PatchRow,
    PatchTableOfRuns,
)
from celltyper.protocols.protocol import Protocol

PAIRED = (
    "Differences: pooled score of the variant less that of the first one, over the runs that both "
    "have finished, each run at its own threshold; 95 % interval and two-sided p-value of a paired "
    "bootstrap, for which the same patients or slides are drawn on both sides. P-values are not "
    "corrected for the number of comparisons."
)


def title_of(
    table: PatchTableOfRuns, row: PatchRow | PatchDifference, *, variant: bool = True
) -> str:
    """Say what a row is of; empty where all rows would say the same.

    Parameters
    ----------
    table : PatchTableOfRuns
    row : PatchRow or PatchDifference
        Of the table.
    variant : bool
        Whether to name the variant.

    Returns
    -------
    str
    """
    parts = [row.variant] if variant else []
    if isinstance(row, PatchRow):
        if row.trained_on:
            parts.append(f"{row.trained_on} → {row.tested_on}")
        elif row.tested_on:
            parts.append(f"{row.tested_on} left out")
    if several_fractions(table):
        parts.append(f"{100 * row.fraction:g}\N{NO-BREAK SPACE}%")
    return ", ".join(part for part in parts if part)


def several_fractions(table: PatchTableOfRuns) -> bool:
    """Whether runs trained on different shares of the data."""
    return len({row.fraction for row in table.rows}) > 1


def pooled_name(table: PatchTableOfRuns, variant: str) -> str:
    """Name of the pooled windows of a variant."""
    runs = len(set(table.pooled[variant].windows.runs))
    return variant or (f"{runs} runs together" if runs > 1 else "test windows")


def interval_of(table: PatchTableOfRuns) -> str:
    """What the intervals are."""
    return f"95 % interval, bootstrap over {_drawn(table)}"


def warnings_of(table: PatchTableOfRuns) -> list[str]:
    """What a reader must know before the figures: missing runs, too few patients."""
    warnings = []
    if table.missing:
        shown = ", ".join(table.missing[:5])
        more = f" and {len(table.missing) - 5} more" if len(table.missing) > 5 else ""
        warnings.append(
            f"{len(table.missing)} of {len(table.about['runs'])} runs are not finished: "
            f"{shown}{more}"
        )
    few = [row.clusters for row in table.rows if row.clusters < MIN_CLUSTERS]
    if few:
        warnings.append(
            f"Only {min(few)} patients or slides were tested in {len(few)} of {len(table.rows)} "
            f"rows: intervals over fewer than {MIN_CLUSTERS} are too narrow, or missing."
        )
    return warnings


def notes_of(table: PatchTableOfRuns) -> list[str]:
    """How every figure was computed."""
    scores = table.first.scores
    notes = [
        f"Positive class: {table.about['positive']}.",
        _value(table),
        f"Interval: 95 %, of that value; bootstrap over {_drawn(table)}, the same ones for "
        "all runs of a row.",
    ]
    if several_fractions(table):
        of = "whole slides" if table.about["protocol"].get("fraction_of") == "groups" else "windows"
        notes.append(
            f"Training: the share asked for is of the training windows, nested, taken as {of}; the "
            "share that was reached is in table.csv."
        )
    if any(row.trained_on for row in table.rows):
        notes.append("A → B: trained on A, tested on B.")
    if table.differences:
        notes.append(PAIRED)
    notes += [f"{NAMES[name]}: {scores.rules[name]}." for name in HEADLINE]
    return notes


def facts_of(table: PatchTableOfRuns) -> dict[str, str]:
    """What ran on what, as far as it is the same for all variants."""
    about, windows = table.about, table.first.windows
    protocol = Protocol.model_validate(about["protocol"])
    chosen = protocol.model_dump(mode="json", exclude_defaults=True, exclude={"variants"})
    of_name = _labels(table)
    counts = np.bincount(list(of_name.values()), minlength=len(table.classes)).tolist()
    classes = ", ".join(
        f"{name} {n:,} ({100 * n / len(of_name):.0f} %)"
        for name, n in zip(table.classes, counts, strict=True)
    )
    groups = len(set(windows.groups))
    facts = {
        "protocol": "; ".join(f"{key}: {_listed(value)}" for key, value in chosen.items()),
        "data": f"{about['data']['name']}: {about['data']['patches']:,} windows of "
        f"{about['data']['groups']:,} patients or slides",
        "tested": f"{len(of_name):,} windows of {groups:,} patients or slides: {classes}",
        "runs": f"{len(about['runs']) - len(table.missing)} of {len(about['runs'])} finished",
        "seeds": ", ".join(str(seed) for seed in sorted({e["seed"] for e in about["runs"]})),
        "threshold": _thresholds(table),
    }
    first, *others = map(_made_of, configs_of(table).values())
    facts |= {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    facts |= cost_of(table)
    for name in ("torch", "device", "threads"):
        values = _values(table, name)
        if values:
            facts[name] = values
    return facts | {"celltyper": str(about["celltyper"])}


def _made_of(config: PatchConfig) -> dict[str, str]:
    data, encoder, view, head = config.data, config.encoder, config.view, config.head
    wide = f" at {data.mpp:g} µm: {(data.size or 0) * data.mpp:g} µm wide" if data.mpp else ""
    shown = {
        "encoder": f"{encoder.name}, {encoder.adapt}",
        "weights": PurePath(str(encoder.weights)).name,
        "window": f"{data.size} px{wide}",
        "input of the encoder": f"{view.input} px" if view.input else "that of its card",
        "embedding": view.pool,
        "symmetries": str(view.symmetries),
        "head": f"{head.name} ({_listed(head.options)})" if head.options else head.name,
    }
    if head.by_gradient:
        train = config.train
        shown["training"] = (
            f"{train.steps} steps of {train.batch_size} windows, learning rate {train.lr:g}"
        )
    return shown | {f"loss.{key}": _listed(value) for key, value in config.loss}


def lead_of(table: PatchTableOfRuns) -> str:
    """What was done, in two sentences for the head of the page."""
    of_name, runs = _labels(table), len(table.facts)
    groups = len(set(table.first.windows.groups))
    count = sum(label == table.positive for label in of_name.values())
    # a single row has no table that would name it
    title = title_of(table, table.rows[0]) if len(table.rows) == 1 else ""
    return (
        f"{title}{': ' if title else ''}{runs} run{'s' * (runs > 1)}, tested on {len(of_name):,} "
        f"windows of {groups:,} patients or slides. Positive class: {table.about['positive']}, "
        f"{count:,} of these windows ({100 * count / len(of_name):.0f} %). {_value(table)}"
    )


def cost_of(table: PatchTableOfRuns) -> dict[str, str]:
    """Passes of the encoder and seconds, as far as the finished runs say.

    Parameters
    ----------
    table : PatchTableOfRuns

    Returns
    -------
    dict of str to str
        Empty where a run does not say it. Heads on embeddings are set against a script that runs
        the encoder in every run.
    """
    configs = configs_of(table)
    kept: dict[str, int] = {}
    embedded: dict[str, float] = {}
    trained, each, seconds = 0, 0, 0.0
    for entry in table.about["runs"]:
        facts = table.facts.get(entry["path"])
        if facts is None:
            continue
        config = configs[entry["variant"]]
        if "encoder_passes" not in facts:
            return {}
        steps = config.train.steps * config.train.batch_size if config.head.by_gradient else 0
        trained += steps
        # runs that show the encoder the same share its embeddings
        key = _shown(config)
        kept[key] = int(facts["encoder_passes"]) - steps
        each += config.view.symmetries * (entry["train"] + entry["val"] + entry["test"])
        spent = facts.get("seconds") or {}
        embedded[key] = max(embedded.get(key, 0.0), float(spent.get("embed", 0.0)))
        seconds += float(spent.get("fit", 0.0))
    runs, total = len(table.facts), sum(kept.values()) + trained
    text = f"{total:,} for all {runs} runs"
    if not trained:
        text += (
            f"; a script that runs the encoder in every run needs {each:,} for one epoch, "
            f"{each / total:.1f} times as many"
        )
    found = {"encoder passes": text}
    if seconds:
        first = f"{sum(embedded.values()):.1f} for embeddings, " if any(embedded.values()) else ""
        found["seconds"] = f"{first}{seconds:.1f} to train all {runs} runs"
    return found


def configs_of(table: PatchTableOfRuns) -> dict[str, PatchConfig]:
    """Resolved config of every variant."""
    file = str(table.path / PROTOCOL_FILE)
    return {
        name: parse_config(values, (), PatchConfig, where=file)
        for name, values in table.about["variants"].items()
    }


def _shown(config: PatchConfig) -> str:
    """What decides the embeddings of windows, as one string."""
    data, encoder, view = config.data, config.encoder, config.view
    of_encoder = encoder.name, encoder.weights, encoder.revision, encoder.options
    of_view = data.size, data.mpp, view.input, view.pool, view.symmetries
    return repr((of_encoder, of_view, config.head.by_gradient))


def _labels(table: PatchTableOfRuns) -> dict[str, int]:
    """Class of every window that was tested, each once."""
    windows = table.first.windows
    return dict(zip(windows.names, windows.labels.tolist(), strict=True))


def _value(table: PatchTableOfRuns) -> str:
    if all(row.runs == 1 for row in table.rows):
        return "Value: of one run."
    return "Value: mean ± standard deviation (n - 1) over runs (test parts x seeds)."


def _drawn(table: PatchTableOfRuns) -> str:
    """How many patients or slides the intervals are over."""
    clusters = sorted({row.clusters for row in table.rows})
    upto = f" to {clusters[-1]:,}" if len(clusters) > 1 else ""
    return f"{clusters[0]:,}{upto} patients or slides"


def _thresholds(table: PatchTableOfRuns) -> str:
    """From which probability windows were called positive, and who said so."""
    if len(table.classes) > 2:
        return "none: the most probable class is called"
    used = {t for pooled in table.pooled.values() for t in pooled.windows.thresholds.tolist()}
    low, high = min(used), max(used)
    values = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}, each run its own"
    sources = {facts.get("threshold_from") for facts in table.facts.values()}
    if sources == {"validation"}:
        return f"{values}, chosen on validation windows"
    return f"{values}, not chosen on data" if sources == {"one half"} else values


def _values(table: PatchTableOfRuns, name: str) -> str:
    """What all runs say of themselves; empty if none does."""
    found = {str(facts[name]) for facts in table.facts.values() if name in facts}
    return ", ".join(sorted(found))


def _listed(value: object) -> str:
    """Value of a config in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_listed(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_listed, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
