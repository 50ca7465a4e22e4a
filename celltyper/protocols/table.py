"""The table of a protocol: mean and deviation over runs, intervals, differences of variants."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.evaluation import BLOCK_PX, MIN_GROUPS, SCORES, ImageScores, summarise
from celltyper.library.files import CONFIG_FILE, PROTOCOL_FILE
from celltyper.metrics.bootstrap import PairedDifference, cluster_bootstrap, paired_bootstrap
from celltyper.metrics.ratios import mean_of_known
from celltyper.protocols.pooling import (
    HEADLINE,
    PER_CLASS,
    Score,
    Tested,
    find_clusters,
    pool,
)
from celltyper.protocols.protocol import Protocol
from celltyper.protocols.scores import SCORES_FILE, read_scores

MEAN = "mean"
"""Stands for the domain in the row that averages them."""

CLASS_RULES = {
    "typed_f1": "end to end: F_c of HoVer-Net on cells paired by centroid",
    "f1": "reference instances: mean class probability in each annotated nucleus, argmax "
    "including background",
}


@dataclass(frozen=True)
class Figure:
    """A score over several runs; NaN where it cannot be computed.

    Parameters
    ----------
    mean, deviation : float
        Over runs, the deviation with n - 1; in the row of the mean, over domains.
    pooled, low, high : float
        Of all test images together, with its 95 % interval.
    """

    mean: float
    deviation: float
    pooled: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """Scores of one variant, fraction and domain.

    Parameters
    ----------
    variant : str
        "" if the protocol lists none.
    fraction, reached : float
        Share of the training nuclei that was asked for, and its mean over runs.
    domain : str
        The domain that was left out, `MEAN` for the mean over all, "" without domains.
    runs, planned : int
        Runs that are finished, and that there are to be.
    clusters : str
        What was resampled for the intervals.
    blocks : bool
        Whether it was blocks of images, for want of patients or fields.
    scores : dict of str to Figure
        By `celltyper.protocols.pooling.HEADLINE`.
    per_class : dict of str to dict of str to Figure
        By class, then by `celltyper.protocols.pooling.PER_CLASS`.
    """

    variant: str
    fraction: float
    reached: float
    domain: str
    runs: int
    planned: int
    clusters: str
    blocks: bool
    scores: dict[str, Figure]
    per_class: dict[str, dict[str, Figure]]


@dataclass(frozen=True)
class Difference:
    """Scores of a variant less those of the first one, on the runs that both have finished."""

    variant: str
    first: str
    fraction: float
    domain: str
    runs: int
    clusters: str
    scores: dict[str, PairedDifference]


@dataclass(frozen=True)
class ProtocolTable:
    """What `celltyper report` shows.

    Parameters
    ----------
    path : Path
        Folder of the protocol.
    about : dict
        What ``protocol.json`` holds.
    rows : list of Row
    differences : list of Difference
        Empty with fewer than two variants.
    missing : list of str
        Folders of runs that are not finished.
    rules : dict of str to str
        Rule of every score.
    """

    path: Path
    about: dict[str, Any]
    rows: list[Row]
    differences: list[Difference]
    missing: list[str]
    rules: dict[str, str]

    @property
    def classes(self) -> list[str]:
        """Phenotypes."""
        return list(self.about["classes"])

    @property
    def clusters(self) -> str:
        """What was resampled for the intervals."""
        texts = {row.clusters for row in self.rows}
        if len(texts) == 1:
            return texts.pop()
        blocks = f", blocks of {BLOCK_PX} px in rows of fewer than {MIN_GROUPS}"
        some = any(row.blocks for row in self.rows)
        return f"patients or fields{blocks if some else ''}"


@dataclass(frozen=True)
class ScoredRun:
    """A run of the plan, and what it found if it is finished."""

    path: str
    variant: str
    part: str
    domain: str
    fraction: float
    reached: float
    seed: int
    images: list[ImageScores] | None = None
    scores: dict[str, float] | None = None
    per_class: dict[str, dict[str, float]] | None = None

    @property
    def key(self) -> tuple[str, float, int]:
        """What the runs of two variants have in common."""
        return self.part, self.fraction, self.seed


def protocol_table(output: str | Path, *, resamples: int = 1000) -> ProtocolTable:
    """Collect the scores of a protocol, finished or not.

    Parameters
    ----------
    output : str or Path
        What `celltyper.protocols.run_protocol` wrote.
    resamples : int
        Bootstrap resamples of the intervals; 0 leaves them out.

    Returns
    -------
    ProtocolTable

    Raises
    ------
    DataError
        If the folder holds no protocol, none of its runs is finished, or a file is damaged.
    """
    output = Path(output)
    about = read_plan(output)
    classes = about["classes"]
    runs = [load_run(output, entry, classes) for entry in about["runs"]]
    if all(run.images is None for run in runs):
        raise DataError(f"{output}: none of {len(runs)} runs is finished yet")
    domains = list(dict.fromkeys(run.domain for run in runs))
    variants = list(dict.fromkeys(run.variant for run in runs))
    rows, differences = [], []
    for variant in variants:
        for fraction in dict.fromkeys(run.fraction for run in runs):
            chosen = [r for r in runs if (r.variant, r.fraction) == (variant, fraction)]
            first = [r for r in runs if (r.variant, r.fraction) == (variants[0], fraction)]
            for domain in [*domains, *([MEAN] if len(domains) > 1 else [])]:
                own = [r for r in chosen if domain in (r.domain, MEAN)]
                row = _row(own, domain, domains, classes, resamples)
                rows += [row] if row else []
                if variant != variants[0]:
                    base = [r for r in first if domain in (r.domain, MEAN)]
                    found = _difference(own, base, domain, domains, classes, resamples)
                    differences += [found] if found else []
    radius = " or ".join(sorted({image.radius for run in runs for image in run.images or ()}))
    return ProtocolTable(
        path=output,
        about=about,
        rows=rows,
        differences=differences,
        missing=[run.path for run in runs if run.images is None],
        rules={name: SCORES[name].format(radius=radius) for name in HEADLINE},
    )


def read_plan(output: Path) -> dict[str, Any]:
    """Read ``protocol.json``.

    Parameters
    ----------
    output : Path

    Returns
    -------
    dict

    Raises
    ------
    DataError
        If there is none, or it is damaged; an ordinary run is said to be one.
    """
    file = output / PROTOCOL_FILE
    if not file.is_file():
        if (output / CONFIG_FILE).is_file():
            raise DataError(
                f"{output} is a single run, not a protocol: celltyper eval {output} DATA scores "
                "it and writes its report"
            )
        raise DataError(f"{output} holds no protocol: celltyper train --protocol writes one")
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        Protocol.model_validate(about["protocol"])
        if not about["runs"] or not about["classes"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged, or of another version of celltyper") from error
    return about


def load_run(output: Path, entry: dict[str, Any], classes: Sequence[str]) -> ScoredRun:
    """Read what a run of the plan found, if it is finished.

    Parameters
    ----------
    output : Path
        Folder of the protocol.
    entry : dict
        Of ``runs`` in `read_plan`.
    classes : sequence of str
        Of the protocol.

    Returns
    -------
    ScoredRun

    Raises
    ------
    DataError
        If its scores are damaged, or of other classes.
    """
    known = ("path", "variant", "part", "domain", "fraction", "reached", "seed")
    run = ScoredRun(**{key: entry[key] for key in known})
    file = output / run.path / SCORES_FILE
    if not file.is_file():
        return run
    images, found = read_scores(file)
    if list(found) != list(classes):
        raise DataError(f"{file}: classes {', '.join(found)}, the protocol has other ones")
    summary = summarise(images, classes, resamples=0)
    return ScoredRun(
        **{key: entry[key] for key in known},
        images=images,
        scores={name: summary.scores[name].value for name in HEADLINE},
        per_class={
            name: {key: row[key].value for key in PER_CLASS}
            for name, row in summary.per_class.items()
        },
    )


def _row(
    runs: Sequence[ScoredRun],
    domain: str,
    domains: Sequence[str],
    classes: Sequence[str],
    resamples: int,
) -> Row | None:
    """Row of the table, or None without a finished run (in every domain, for the mean)."""
    done = [run for run in runs if run.images is not None]
    averaged = list(domains) if domain == MEAN else [domain]
    if {run.domain for run in done} != set(averaged):
        return None
    tested = _tested(done, averaged)
    clusters = find_clusters([t.image for t in tested])
    headline, per_class = pool(tested, len(classes), clusters)

    def figure(
        of_run: Callable[[ScoredRun], float],
        score: Score,
        statistic: Callable[..., NDArray[np.float64]],
    ) -> Figure:
        by_domain = [[of_run(run) for run in done if run.domain == d] for d in averaged]
        values = [mean_of_known(v) for v in by_domain] if domain == MEAN else by_domain[0]
        low, high = np.nan, np.nan
        if resamples:
            low, high = cluster_bootstrap(score.counts, statistic, n=resamples)
        return Figure(
            float(mean_of_known(values)),
            _deviation(values),
            float(statistic(score.counts.sum(0))),
            low,
            high,
        )

    def of_headline(name: str) -> Callable[[ScoredRun], float]:
        return lambda run: (run.scores or {})[name]

    def of_class(name: str, key: str) -> Callable[[ScoredRun], float]:
        return lambda run: (run.per_class or {})[name][key]

    return Row(
        variant=runs[0].variant,
        fraction=runs[0].fraction,
        reached=float(np.mean([run.reached for run in runs])),
        domain=domain,
        runs=len(done),
        planned=len(runs),
        clusters=clusters.text,
        blocks=clusters.blocks,
        scores={n: figure(of_headline(n), s, s.of) for n, s in headline.items()},
        per_class={
            name: {
                key: figure(of_class(name, key), score, score.of_class(number))
                for key, score in per_class.items()
            }
            for number, name in enumerate(classes)
        },
    )


def _difference(
    runs: Sequence[ScoredRun],
    first: Sequence[ScoredRun],
    domain: str,
    domains: Sequence[str],
    classes: Sequence[str],
    resamples: int,
) -> Difference | None:
    """Difference to the first variant, or None if there is no run that both have finished."""
    done = [{r.key: r for r in side if r.images is not None} for side in (runs, first)]
    both = [key for key in done[0] if key in done[1]]
    averaged = list(domains) if domain == MEAN else [domain]
    if {done[0][key].domain for key in both} != set(averaged):
        return None
    tested = [_tested([side[key] for key in both], averaged) for side in done]
    clusters = find_clusters([t.image for side in tested for t in side])
    own, base = (pool(side, len(classes), clusters)[0] for side in tested)
    return Difference(
        runs[0].variant,
        first[0].variant,
        runs[0].fraction,
        domain,
        len(both),
        clusters.text,
        {name: _paired(score, base[name], resamples) for name, score in own.items()},
    )


def _paired(score: Score, base: Score, resamples: int) -> PairedDifference:
    if not resamples:
        values = [float(s.of(s.counts.sum(0))) for s in (score, base)]
        return PairedDifference(values[0] - values[1], np.nan, np.nan, np.nan)
    return paired_bootstrap(score.counts, base.counts, score.of, n=resamples)


def _tested(runs: Iterable[ScoredRun], averaged: Sequence[str]) -> list[Tested]:
    return [Tested(image, averaged.index(run.domain)) for run in runs for image in run.images or ()]


def _deviation(values: Sequence[float | NDArray[np.float64]]) -> float:
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")
