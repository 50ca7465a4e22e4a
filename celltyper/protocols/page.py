"""The table of a protocol as a page that needs nothing beside it."""

from __future__ import annotations

import math

import yaml

from celltyper import __version__
from celltyper.cells.colors import default_colors
from celltyper.metrics.bootstrap import PairedDifference
from celltyper.protocols.pooling import HEADLINE, PER_CLASS
from celltyper.protocols.table import CLASS_RULES, MEAN, Figure, ProtocolTable
from celltyper.protocols.wording import CLASS_NAMES, NAMES, PAIRED, rules_of, title_of, warnings_of
from celltyper.report.data import Curves, Metric, Report, Table


def protocol_report(table: ProtocolTable) -> Report:
    """Page of a protocol.

    Parameters
    ----------
    table : ProtocolTable

    Returns
    -------
    Report
    """
    about = table.about
    tables = {
        "Scores": Table(
            ["", "runs", "share", *NAMES.values()],
            [
                [
                    title_of(row),
                    f"{row.runs} of {row.planned}",
                    row.reached,
                    *(_metric(NAMES[name], row.scores[name]) for name in HEADLINE),
                ]
                for row in table.rows
            ],
            "\n".join(rules_of(table)),
        )
    }
    if table.differences:
        tables["Differences to the first variant"] = Table(
            ["", "runs", *NAMES.values()],
            [
                [
                    f"{title_of(d)}, less {d.first}",
                    d.runs,
                    *(_metric_of_difference(NAMES[name], d.scores[name]) for name in HEADLINE),
                ]
                for d in table.differences
            ],
            PAIRED,
        )
    tables["Per class"] = Table(
        ["", "class", *CLASS_NAMES.values()],
        [
            [title_of(row), name, *(_metric(CLASS_NAMES[key], scores[key]) for key in PER_CLASS)]
            for row in table.rows
            for name, scores in row.per_class.items()
        ],
        "\n".join(f"{CLASS_NAMES[key]}: {rule}." for key, rule in CLASS_RULES.items()),
    )
    first = next(iter(about["variants"].values()))
    return Report(
        title=f"celltyper protocol: {about['data']['name']}",
        classes=table.classes,
        colors=about["colors"] or default_colors(table.classes),
        notice=about["data"]["notice"],
        warnings=warnings_of(table),
        interval=f"95 % interval, bootstrap over {table.clusters}",
        tables=tables,
        curves=_curves(table),
        facts={
            "protocol": yaml.safe_dump(about["protocol"], sort_keys=False, default_flow_style=True),
            "data": f"{about['data']['name']}, {about['data']['images']} images",
            "runs": f"{len(about['runs']) - len(table.missing)} of {len(about['runs'])}",
            "celltyper": __version__,
        },
        config=yaml.safe_dump(first, sort_keys=False),
    )


def _curves(table: ProtocolTable) -> Curves | None:
    """Scores over the share of the training data, if there are several shares."""
    rows = [row for row in table.rows if row.domain in ("", MEAN)]
    if len({row.fraction for row in rows}) < 2:
        return None
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in ("macro_f1", "typed_f1", "bpq"):
        for row in sorted(rows, key=lambda row: row.reached):
            if math.isfinite(row.scores[name].mean):
                line = charts.setdefault(NAMES[name], {}).setdefault(row.variant or "mean", [])
                line.append((100 * row.reached, row.scores[name].mean))
    return Curves("Share of the training data", "% of the training nuclei", charts)


def _metric(name: str, f: Figure) -> Metric:
    return Metric(name, f.mean, f.low, f.high, "", f.deviation)


def _metric_of_difference(name: str, p: PairedDifference) -> Metric:
    return Metric(name, p.difference, p.low, p.high, "")
