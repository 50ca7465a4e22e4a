"""Taxonomies: which classes of a dataset are which classes of a model.

::

    classes:                        # new class: source classes; the order gives the new ids
      inflammatory: [neutrophil, lymphocyte, plasma, eosinophil]
      epithelial: [epithelial]
    unknown: [other]                # the nucleus stays, its class is not known
    drop: [dirt]                    # the nucleus becomes background
    datasets:                       # rules of single datasets, instead of those above
      pannuke: {classes: {inflammatory: [inflammatory], epithelial: [neoplastic, epithelial]}}
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, listing
from celltyper.errors import DataError
from celltyper.types import UNKNOWN, Sample

_KEYS = ("classes", "unknown", "drop")


@dataclass(frozen=True)
class Rules:
    """Where the classes of a dataset go; names are matched exactly.

    Parameters
    ----------
    classes : mapping of str to tuple of str
        Source classes by new class.
    unknown : tuple of str
        Source classes whose nuclei stay without a class.
    drop : tuple of str
        Source classes whose nuclei become background.
    """

    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    @property
    def mentioned(self) -> tuple[str, ...]:
        """Source classes in order, as often as they are listed."""
        merged = (name for names in self.classes.values() for name in names)
        return (*merged, *self.unknown, *self.drop)


@dataclass(frozen=True)
class Taxonomy:
    """New classes, and the rules that lead to them.

    Parameters
    ----------
    classes : tuple of str
        New classes in the order of their ids.
    rules : Rules or None
        Of datasets without rules of their own.
    datasets : mapping of str to Rules
        Rules by lower-case name of the dataset.
    where : str
        File, for messages.
    """

    classes: tuple[str, ...]
    rules: Rules | None
    datasets: Mapping[str, Rules] = field(default_factory=dict)
    where: str = "taxonomy"


def read_taxonomy(path: str | Path) -> Taxonomy:
    """Read a taxonomy from YAML; see the head of this file.

    Parameters
    ----------
    path : str or Path
        YAML file.

    Returns
    -------
    Taxonomy
        The new classes are the keys of ``classes``, then those that only datasets name.

    Raises
    ------
    DataError
        If the file cannot be read, has an unknown or repeated key, names no class, or lists a
        source class twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; a taxonomy is a YAML file with 'classes'")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: must hold 'classes: {{new class: [source classes]}}'")
    raw = dict(raw)
    own = raw.pop("datasets", None) or {}
    if not isinstance(own, dict) or not all(isinstance(v, dict) for v in own.values()):
        raise DataError(f"{path}: 'datasets' must give rules by name of the dataset")
    datasets = {str(k).lower(): _rules(f"{path}, dataset {k}", v) for k, v in own.items()}
    if len(datasets) < len(own):
        raise DataError(f"{path}: 'datasets' names a dataset twice, in different case")
    rules = _rules(str(path), raw) if raw else None
    everything = [r for r in (rules, *datasets.values()) if r is not None]
    classes = tuple(dict.fromkeys(name for r in everything for name in r.classes))
    folded = [name.strip().casefold() for name in classes]
    alike = [name for name, fold in zip(classes, folded, strict=True) if folded.count(fold) > 1]
    if alike:
        raise DataError(f"{path}: new classes {listing(alike)} differ only in case or blanks")
    if not classes or len(classes) >= UNKNOWN:
        raise DataError(f"{path}: {len(classes)} new classes; between 1 and 254 are possible")
    return Taxonomy(classes, rules, datasets, str(path))


def apply_taxonomy(
    dataset: Dataset, taxonomy: Taxonomy, together: Iterable[Dataset] = ()
) -> Dataset:
    """Give a dataset the classes of a taxonomy; nothing is read.

    Parameters
    ----------
    dataset : Dataset
        Its name chooses the rules.
    taxonomy : Taxonomy
        New classes.
    together : iterable of Dataset
        The datasets that share the rules: a source class must be in one of them. By default this
        dataset alone.

    Returns
    -------
    Dataset
        Nuclei keep their ids, those of dropped classes are gone. New classes that it cannot
        contain, or that a source class goes into which a sample does not annotate, are in
        `Sample.unannotated`. A class has the color of its first source class, if all have one.

    Raises
    ------
    DataError
        Listing the source classes that are not mentioned, mentioned twice, or not there.
    """
    rules = taxonomy.datasets.get(dataset.name.lower(), taxonomy.rules)
    if rules is None:
        raise DataError(
            f"{taxonomy.where}: no rules for dataset {dataset.name!r} "
            f"(there are: {', '.join(taxonomy.datasets)})"
        )
    shared = rules is taxonomy.rules
    among = {c for data in (dataset, *(together if shared else ())) for c in data.classes}
    _check(rules, dataset, among, taxonomy, strange=not (shared and taxonomy.datasets))
    new_id = {name: i for i, name in enumerate(taxonomy.classes, start=1)}
    table = np.zeros(256, np.uint8)
    table[UNKNOWN] = UNKNOWN
    old_id = {name: i for i, name in enumerate(dataset.classes, start=1)}
    sources: dict[int, tuple[int, ...]] = dict.fromkeys(new_id.values(), ())
    for new, names in rules.classes.items():
        sources[new_id[new]] = tuple(old_id[name] for name in names if name in old_id)
        table[list(sources[new_id[new]])] = new_id[new]
    table[[old_id[name] for name in rules.unknown if name in old_id]] = UNKNOWN
    return replace(
        dataset,
        classes=taxonomy.classes,
        colors=_colors(dataset.colors, sources),
        read=partial(_read, read=dataset.read, table=table, sources=sources),
        # Which nuclei go is known from the whole image only.
        window=None,
    )


def _read(
    name: str,
    read: Any,
    table: NDArray[np.uint8],
    sources: Mapping[int, tuple[int, ...]],
) -> Sample:
    sample: Sample = read(name)
    phenotypes = table[sample.phenotypes]
    labels = sample.labels
    gone = (phenotypes == 0) & (sample.phenotypes != 0)
    if gone.any():
        labels = np.where(gone[labels], 0, labels).astype(np.int32)
        phenotypes = phenotypes[: int(labels.max(initial=0)) + 1]
    lacking = tuple(
        new
        for new, old in sources.items()
        if not old or not set(old).isdisjoint(sample.unannotated)
    )
    return replace(sample, labels=labels, phenotypes=phenotypes, unannotated=lacking)


def _check(
    rules: Rules, dataset: Dataset, among: set[str], taxonomy: Taxonomy, *, strange: bool
) -> None:
    mentioned = rules.mentioned
    problems = []
    missing = [c for c in dataset.classes if c not in mentioned]
    if missing:
        problems.append(f"says nothing of {', '.join(map(repr, missing))}")
    foreign = [c for c in dict.fromkeys(mentioned) if c not in among]
    if foreign and strange:
        problems.append(f"lists {', '.join(map(repr, foreign))}, which it does not have")
    if problems:
        raise DataError(
            f"{taxonomy.where}: for dataset {dataset.name!r}, the taxonomy "
            f"{' and '.join(problems)} (its classes: {', '.join(dataset.classes)}; put each "
            "under 'classes', 'unknown' or 'drop')"
        )


def _rules(where: str, raw: Mapping[Any, Any]) -> Rules:
    unknown = [key for key in raw if key not in _KEYS]
    if unknown:
        known = ", ".join((*_KEYS, "datasets"))
        raise DataError(f"{where}: unknown key {listing(map(str, unknown))} (known: {known})")
    classes = raw.get("classes") or {}
    if not isinstance(classes, dict) or not all(isinstance(k, str) and k for k in classes):
        raise DataError(f"{where}: 'classes' must be {{new class: [source classes]}}")
    rules = Rules(
        {new: _names(f"{where}, class {new!r}", names) for new, names in classes.items()},
        _names(f"{where}, 'unknown'", raw.get("unknown")),
        _names(f"{where}, 'drop'", raw.get("drop")),
    )
    mentioned = rules.mentioned
    twice = [name for name in dict.fromkeys(mentioned) if mentioned.count(name) > 1]
    if twice:
        raise DataError(f"{where}: mentioned twice: {', '.join(map(repr, twice))}")
    return rules


def _names(where: str, raw: Any) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise DataError(f"{where}: must be a list of source classes, got {raw!r}")
    return tuple(raw)


def _colors(colors: Sequence[str], sources: Mapping[int, tuple[int, ...]]) -> tuple[str, ...]:
    if not colors or not all(sources.values()):
        return ()
    return tuple(colors[old[0] - 1] for old in sources.values())


class _Loader(yaml.SafeLoader):
    """YAML in which a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)
