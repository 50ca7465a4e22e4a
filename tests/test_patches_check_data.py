"""Every mistake that the check of patches looks for, planted alone, and no other one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from celltyper.datasets.checking import Problem
from celltyper.errors import DataError
from celltyper.patches.checking import KINDS, check_patches, readable
from celltyper.patches.table import PatchTable


def noise(seed: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def save(file: Path, seed: int, side: int = 40) -> Path:
    Image.fromarray(noise(seed, side)).save(file)
    return file


@pytest.fixture
def clean(tmp_path: Path) -> PatchTable:
    """Eight different patches of four groups, two classes and two parts."""
    n = 8
    labels = np.arange(n) % 2
    return PatchTable(
        path=tmp_path,
        classes=("a", "b"),
        names=tuple(f"p{i}" for i in range(n)),
        labels=labels,
        votes=np.eye(2)[labels],
        experts=np.ones(n, np.intp),
        groups=tuple(f"g{i // 2}" for i in range(n)),
        domains=("",) * n,
        splits=("train",) * 4 + ("test",) * 4,
        files=tuple(save(tmp_path / f"{i}.png", i) for i in range(n)),
        centers=np.full((n, 2), np.nan),
        mpp=0.5,
    )


def kinds(problems: list[Problem]) -> dict[str, int]:
    return {p.kind: len(p.places) for p in problems}


def put(values: Any, i: int, value: object) -> Any:
    if isinstance(values, np.ndarray):
        values = values.copy()
        values[i] = value
        return values
    return tuple(value if j == i else v for j, v in enumerate(values))


def test_nothing_to_find(clean: PatchTable) -> None:
    assert check_patches(clean, ("b", "a"), folds=4, size=40, mpp=0.5) == []


def test_other_classes(clean: PatchTable) -> None:
    (problem,) = check_patches(clean, ("A", "c"))
    assert (problem.kind, problem.severity) == ("other classes than expected", "error")
    assert [p.note for p in problem.places] == [
        "no class 'A'; did you mean 'a'?",
        "no class 'c'",
        "class 'a' is not expected",
        "class 'b' is not expected",
    ]


def test_group_on_both_sides(clean: PatchTable) -> None:
    (problem,) = check_patches(replace(clean, groups=put(clean.groups, 7, "g0")))
    assert problem.kind == "group in two splits"
    assert problem.places[0].note == "group 'g0' in train and test"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 6, {"same pixels in two splits": 1}),
        (0, 2, {"same pixels in two groups": 1}),
        (0, 3, {"same pixels in two groups": 1, "same pixels of two classes": 1}),
        (0, 1, {"same pixels twice": 1, "same pixels of two classes": 1}),
    ],
)
def test_same_pixels(clean: PatchTable, first: int, second: int, expected: dict[str, int]) -> None:
    # Another file of other bytes that decodes to the same pixels.
    Image.fromarray(noise(first)).save(clean.files[second], compress_level=0)
    assert clean.files[first].read_bytes() != clean.files[second].read_bytes()
    problems = check_patches(clean)
    assert kinds(problems) == expected
    assert problems[0].places[0].image == f"p{first}"
    assert problems[0].places[0].note == f"same pixels as 'p{second}'"


def test_folds(clean: PatchTable) -> None:
    (problem,) = check_patches(clean, folds=5)
    assert (problem.kind, problem.places[0].note) == (
        "fewer groups than folds",
        "4 groups for 5 folds",
    )
    labels = clean.labels.copy()
    labels[[1, 5]] = 0  # 'b' is left in the groups g1 and g3
    rare = replace(clean, labels=labels, votes=np.eye(2)[labels])
    assert check_patches(rare, folds=2) == []
    (problem,) = check_patches(rare, folds=3)
    assert problem.kind == "class in fewer groups than folds"
    assert problem.places[0].note == "'b' in 2 groups, 3 folds"


def test_class_missing_in_a_split(clean: PatchTable) -> None:
    labels = clean.labels.copy()
    labels[4:] = 0
    (problem,) = check_patches(replace(clean, labels=labels, votes=np.eye(2)[labels]))
    assert (problem.kind, problem.places[0].note) == ("class missing in a split", "no 'b' in test")


def test_votes_and_unknown_classes(clean: PatchTable) -> None:
    votes = put(put(clean.votes, 0, [0.4, 0.6]), 1, [0.5, 0.5])
    experts = put(put(clean.experts, 0, 5), 1, 2)
    (problem,) = check_patches(replace(clean, votes=votes, experts=experts))
    assert problem.kind == "votes against the label"  # an even vote is none against
    assert [(p.image, p.note) for p in problem.places] == [
        ("p0", "label a, but b has 60% of 5 votes")
    ]
    unknown = replace(
        clean,
        labels=put(clean.labels, 2, -1),
        votes=put(clean.votes, 2, np.nan),
        experts=put(clean.experts, 2, 0),
    )
    assert kinds(check_patches(unknown)) == {"class unknown": 1}


def test_every_patch_its_own_group(clean: PatchTable) -> None:
    assert kinds(check_patches(replace(clean, groups=clean.names))) == {"every patch a group": 1}


def test_windows_over_the_border(clean: PatchTable, tmp_path: Path) -> None:
    field = save(tmp_path / "field.png", 99, side=300)
    centers = np.array([[20 + 30 * i, 150] for i in range(8)], np.float64)
    points = replace(clean, files=(field,) * 8, centers=centers)
    (problem,) = check_patches(points, size=50)
    assert [p.image for p in problem.places] == ["p0"]
    assert kinds(check_patches(points, size=51, mpp=1.0)) == {"window over the border": 2}
    assert check_patches(points) == []


def test_copies_of_a_field(clean: PatchTable, tmp_path: Path) -> None:
    fields = [save(tmp_path / f"field{k}.png", 99, side=300) for k in range(2)]
    centers = np.array([[60 + 20 * i, 150] for i in range(8)], np.float64)
    centers[7] = centers[1]
    files = (fields[0],) * 4 + (fields[1],) * 4
    points = replace(clean, files=files, centers=centers)
    assert kinds(check_patches(points)) == {"same pixels in two splits": 1}


def test_micrometres(clean: PatchTable, tmp_path: Path) -> None:
    field = save(tmp_path / "field.png", 99, side=300)
    centers = np.array([[10 + 30 * i, 15 + 25 * i] for i in range(8)], np.float64)
    points = replace(clean, files=(field,) * 8, mpp=0.25)
    assert check_patches(replace(points, centers=centers)) == []
    problems = check_patches(replace(points, centers=centers * 0.25))
    assert kinds(problems) == {"coordinates in micrometres": 1}


def corrupt(table: PatchTable, *rows: int) -> None:
    for i in rows:
        table.files[i].write_bytes(table.files[i].read_bytes()[:1000])


def test_corrupt_images_are_named_and_the_check_goes_on(clean: PatchTable) -> None:
    corrupt(clean, 5)
    Image.fromarray(noise(0)).save(clean.files[6])
    problems = check_patches(clean, size=40)
    assert kinds(problems) == {"unreadable": 1, "same pixels in two splits": 1}
    assert problems[0].places[0].image == "p5"
    assert "5.png: unreadable or truncated" in problems[0].places[0].note


def test_going_on_without_corrupt_images(
    clean: PatchTable, caplog: pytest.LogCaptureFixture
) -> None:
    assert readable(clean).table is clean
    corrupt(clean, 2, 5)
    message = r"2\.png: unreadable or truncated.*; 2 of 8 patches cannot be read.*--skip-bad"
    with pytest.raises(DataError, match=message):
        readable(clean)
    table, bad = readable(clean, skip_bad=True)
    assert table.names == ("p0", "p1", "p3", "p4", "p6", "p7")
    assert [place.image for place in bad] == ["p2", "p5"]
    assert "going on without 2 patches that cannot be read: 'p2', 'p5'" in caplog.text
    corrupt(clean, *range(8))
    with pytest.raises(DataError, match="no patch can be read"):
        readable(clean, skip_bad=True)


def test_the_table_alone(clean: PatchTable) -> None:
    for file in clean.files:
        file.unlink()
    assert check_patches(clean, folds=4, pixels=False) == []
    assert kinds(check_patches(clean)) == {"unreadable": 8}


def test_order_of_the_report(clean: PatchTable) -> None:
    seen: list[int] = []

    def progress(rows: Any) -> Any:
        for row in rows:
            seen.append(row)
            yield row

    wrong = replace(clean, groups=clean.names, splits=("",) * 8)
    problems = check_patches(wrong, ("a",), folds=9, progress=progress)
    severities = [p.severity for p in problems]
    assert severities == sorted(severities)  # errors come first
    assert sorted(seen) == list(range(8))
    assert all(KINDS[p.kind] == (p.severity, p.advice) for p in problems)
