"""What a dataset holds, and what is wrong with it, as text of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from celltyper.datasets.checking import Check, Description, Place, Problem, division_of

WIDTH = 80
EXAMPLES = 3
_TABLE_SPLITS = 3


def check_text(check: Check, layout: str) -> str:
    """Problems first, errors before warnings, then what the dataset holds.

    Parameters
    ----------
    check : Check
    layout : str
        Name of the reader.

    Returns
    -------
    str
        Lines of at most 80 columns, unless a name or path is longer.
    """
    lines: list[str] = []
    for problem in check.problems:
        lines += [*_problem(problem), ""]
    warnings = len(check.problems) - check.errors
    lines += [*description_text(check.description, layout).splitlines(), ""]
    lines.append(f"{_count(check.errors, 'error')}, {_count(warnings, 'warning')}")
    return "\n".join(lines)


def description_text(about: Description, layout: str) -> str:
    """Name, layout, sizes, resolution, groups, domains, and classes by split.

    Parameters
    ----------
    about : Description
    layout : str
        Name of the reader.

    Returns
    -------
    str
        Lines of at most 80 columns, unless a name or path is longer.
    """
    facts = {
        "name": about.name,
        "path": about.path,
        "layout": layout,
        "images": f"{about.images:,}",
        "size": _counted({f"{h} x {w} px": n for (h, w), n in about.sizes.items()}) or "unknown",
        "mpp": _counted({f"{m:g}" if m else "unknown": n for m, n in about.mpp.items()}),
        "groups": f"{about.groups:,}",
        **{name: _counted(values) for name, values in about.domains.items()},
    }
    if about.unannotated:
        facts["not annotated"] = ", ".join(
            f"{name} (in {n} of {about.images} images)" for name, n in about.unannotated.items()
        )
    if any(name != _short(name) for name in about.nuclei):
        facts["splits"] = ", ".join(_in_order(about.nuclei))
    wide = max(map(len, facts)) + 2
    lines = []
    for name, value in facts.items():
        lines += textwrap.wrap(
            value,
            WIDTH,
            initial_indent=name.ljust(wide),
            subsequent_indent=" " * wide,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [name]
    return "\n".join([*lines, "", *_class_tables(about)])


def _problem(problem: Problem) -> list[str]:
    shown = problem.places[:EXAMPLES]
    head = f"{problem.severity}: {problem.kind} ({len(problem.places):,})"
    lines = textwrap.wrap(f"{head}: {problem.advice}", WIDTH, subsequent_indent="  ")
    for place in shown:
        lines += textwrap.wrap(
            _place(place),
            WIDTH,
            initial_indent="    ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    if len(problem.places) > len(shown):
        lines.append(f"    and {len(problem.places) - len(shown):,} more")
    return lines


def _place(place: Place) -> str:
    parts = [place.image] if place.image else []
    if place.label is not None:
        parts.append(f"label {place.label}")
    if place.x is not None:
        parts.append(f"x {place.x} y {place.y}")
    return ": ".join(text for text in (", ".join(parts), place.note) if text)


def _class_tables(about: Description) -> list[str]:
    """Nuclei and shares of every class, some splits side by side."""
    columns: dict[str, Sequence[int]] = {s: about.nuclei[s] for s in _in_order(about.nuclei)}
    images = dict(about.images_by_split)
    if len(columns) > 1:
        columns["all"] = about.total
        images["all"] = about.images
    names = [*about.classes, "(class unknown)"]
    if not any(counts[-1] for counts in columns.values()):
        names.pop()
    left = max(*map(len, names), len("class"), len("images"), len(about.objects)) + 2
    lines = []
    for first in range(0, len(columns), _TABLE_SPLITS):
        splits = list(columns)[first : first + _TABLE_SPLITS]
        lines += [] if first == 0 else [""]
        lines.append("class".ljust(left) + "".join(f"{_short(s):>16}" for s in splits))
        for k, name in enumerate(names):
            cells = ""
            for split in splits:
                column = columns[split]
                share = 100 * column[k] / max(sum(column), 1)
                cells += f"{column[k]:>9,}{share:>6.1f}%"
            lines.append(name.ljust(left) + cells)
        totals = {s: sum(columns[s]) for s in splits}
        for what, counts in ((about.objects, totals), ("images", images)):
            lines.append(what.ljust(left) + "".join(f"{counts[s]:>9,}       " for s in splits))
    return [line.rstrip() for line in lines]


def _in_order(splits: Iterable[str]) -> list[str]:
    """Training before validation before test, others behind as they come."""
    parts = ("train", "val", "valid", "test")
    ways = list(dict.fromkeys(map(division_of, splits)))

    def place(split: str) -> tuple[int, int]:
        part = split.rpartition("-")[2]
        return ways.index(division_of(split)), (*parts, part).index(part)

    return sorted(splits, key=place)


def _short(name: str) -> str:
    """A name that fits a column; its end says most, as in ``tumou…lit-train``."""
    return name if len(name) <= 15 else f"{name[:5]}…{name[-9:]}"


def _counted(values: Mapping[str, int], most: int = 20) -> str:
    """Values with their counts; a single value without."""
    if len(values) == 1:
        return next(iter(values))
    shown = [f"{value} ({n:,})" for value, n in list(values.items())[:most]]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"
