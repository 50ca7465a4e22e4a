"""Every mistake that ``check`` looks for, planted at a known place, and no other one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from celltyper.datasets import Dataset
from celltyper.datasets.checking import Check, Place, check_dataset, describe
from celltyper.datasets.summary import check_text, description_text
from celltyper.errors import DataError
from celltyper.readers import open_dataset
from celltyper.types import UNKNOWN, Sample

CLASSES = ("tumour", "immune")
DRAWN = """
1 1 1 . . . . 2
1 1 1 . 2 2 2 .
1 1 1 . 2 2 2 .
. . . . 2 2 2 .
3 3 3 . . . . 2
3 3 3 . 1 . 2 2
"""
"""Label 2 hangs together by corners; label 1 has a stray pixel."""


def draw(text: str) -> np.ndarray:
    return np.array(
        [[int(c.replace(".", "0")) for c in row.split()] for row in text.split("\n") if row],
        np.int32,
    )


def noise(seed: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def sample(name: str, labels: np.ndarray, classes: Mapping[int, int], **more: object) -> Sample:
    table = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
    for label, kind in classes.items():
        table[label] = kind
    image = noise(sum(name.encode()), labels.shape)
    return replace(Sample(image, labels, table, name, name, 0.5), **more)  # type: ignore[arg-type]


def clean(name: str) -> Sample:
    labels = np.zeros((40, 40), np.int32)
    labels[5:15, 5:15] = 1
    labels[20:30, 20:30] = 2
    labels[0:3, 20:30] = 3  # three pixels thick at the border: a nucleus
    return sample(name, labels, {1: 1, 2: 2, 3: UNKNOWN})


def of(*samples: Sample, **more: object) -> Dataset:
    by_name = {s.name: s for s in samples}
    groups = {s.name: s.group for s in samples}
    data = Dataset("Made", Path("made"), CLASSES, 0.5, tuple(by_name), groups, by_name.__getitem__)
    return replace(data, **more)  # type: ignore[arg-type]


def found(check: Check) -> dict[str, tuple[Place, ...]]:
    return {problem.kind: problem.places for problem in check.problems}


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    check = check_dataset(of(clean("a"), clean("b"), splits={"train": ("a",), "test": ("b",)}))
    assert check.problems == ()
    assert check.errors == 0


def test_pieces_of_one_id() -> None:
    labels = draw(DRAWN)
    data = of(sample("a", labels, {1: 1, 2: 2, 3: 1}, mpp=1.0), mpp=1.0)
    places = found(check_dataset(data))["id in several pieces"]
    assert places == (Place("a", 1, 4, 5, "a piece of 1 px apart from the rest"),)
    labels[4, 7] = 0
    places = found(check_dataset(data))["id in several pieces"]
    assert places[1] == Place("a", 2, 6, 5, "a piece of 2 px apart from the rest")


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (20, 23)).astype(np.int32) * (rng.random((20, 23)) < 0.4)
    labels = labels.astype(np.int32)
    wanted = set()
    for label in (1, 2, 3):
        pieces, n = ndimage.label(labels == label, np.ones((3, 3)))
        spots = [np.argwhere(pieces == i + 1) for i in range(n)]
        # the largest stays; of equal ones the first in reading order
        spots.sort(key=lambda s: (-len(s), tuple(s[0])))
        wanted |= {(label, len(s), int(s[0][1]), int(s[0][0])) for s in spots[1:]}
    data = of(sample("a", labels, {1: 1, 2: 1, 3: 2}))
    places = found(check_dataset(data))["id in several pieces"]
    got = {(p.label, int(p.note.split()[3]), p.x, p.y) for p in places}
    assert got == wanted


def test_slivers_at_the_border() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[0:2, 3:13] = 1  # 2 px at the top
    labels[20:30, 39:40] = 2  # 1 px at the right
    labels[0:3, 20:30] = 3  # 3 px
    labels[10:12, 10:20] = 4  # 2 px, but not at the border
    labels[15:25, 0:2] = 5  # 2 px at the left
    labels[38:40, 10:20] = 6  # 2 px at the bottom
    data = of(sample("a", labels, dict.fromkeys(range(1, 7), 1)))
    places = found(check_dataset(data))["sliver at the border"]
    assert places == (
        Place("a", 1, 3, 0, "10 x 2 px"),
        Place("a", 2, 39, 20, "1 x 10 px"),
        Place("a", 5, 0, 15, "2 x 10 px"),
        Place("a", 6, 10, 38, "10 x 2 px"),
    )


def test_sizes_that_no_nucleus_has() -> None:
    labels = np.zeros((200, 200), np.int32)
    labels[50:52, 10:15] = 1  # 10 px
    labels[60:150, 60:150] = 2  # 8100 px
    labels[10:14, 60:63] = 3  # 12 px
    kinds = dict.fromkeys((1, 2, 3), 1)
    # at 0.5 mpp 3 um2 are 12 px, 2000 um2 are 8000 px
    places = found(check_dataset(of(sample("a", labels, kinds))))["impossible size"]
    assert places == (
        Place("a", 1, 10, 50, "10 px = 2.5 um2 at 0.5 mpp"),
        Place("a", 2, 60, 60, "8100 px = 2025.0 um2 at 0.5 mpp"),
    )
    unknown = of(sample("a", labels, kinds, mpp=None), mpp=None)
    assert "impossible size" not in found(check_dataset(unknown))
    labels[51] = 0
    labels[50, 14] = 0  # 4 px are left of label 1
    assert found(check_dataset(unknown))["impossible size"] == (Place("a", 1, 10, 50, "4 px"),)


def test_types_outside_the_list_and_images_that_cannot_be_read() -> None:
    odd = clean("a")
    odd.phenotypes[2] = 3
    odd.phenotypes[1] = 0

    def read(name: str) -> Sample:
        if name == "b":
            raise DataError("b.npz: truncated")
        return odd

    data = replace(of(odd, clean("b")), read=read)
    check = check_dataset(data)
    assert check.errors == 2
    assert found(check)["type outside the list"] == (
        Place("a", 1, 5, 5, "type 0 of 1..2"),
        Place("a", 2, 20, 20, "type 3 of 1..2"),
    )
    assert found(check)["unreadable"] == (Place("b", note="b.npz: truncated"),)
    assert check.description.nuclei == {"(no split)": (0, 0, 3)}


def test_problems_of_the_whole_dataset() -> None:
    a, b, c = clean("a"), replace(clean("b"), group="a", mpp=0.4), clean("c")
    b.phenotypes[1] = 2
    data = of(a, b, c, splits={"train": ("a",), "test": ("b", "c")})
    data = replace(data, classes=("Tumour", "tumour "))
    check = check_dataset(data)
    assert found(check) == {
        "classes of the same name": (Place(note="'Tumour', 'tumour '"),),
        "group in two splits": (Place(note="group 'a' in train and test"),),
        "several resolutions": (Place(note="images: 2 at 0.5, 1 at 0.4"),),
    }
    assert [p.severity for p in check.problems] == ["error", "error", "warning"]


def test_images_twice_blank_or_without_nuclei() -> None:
    a, b = clean("a"), clean("b")
    twin = replace(b, name="twin", group="twin")
    bare = sample("bare", np.zeros((40, 40), np.int32), {})
    grey = replace(clean("grey"), image=np.full((40, 40, 3), 240, np.uint8))
    splits = {"train": ("a", "b"), "test": ("twin", "bare", "grey")}
    check = check_dataset(of(a, b, twin, bare, grey, splits=splits))
    assert found(check) == {
        "same image in two splits": (Place("b", note="same pixels as 'twin'"),),
        "no nuclei": (Place("bare"),),
        "blank image": (Place("grey", note="all of it is about RGB 240, 240, 240"),),
    }
    assert check.errors == 1
    together = check_dataset(of(b, twin))
    assert found(together) == {"same image twice": (Place("b", note="same pixels as 'twin'"),)}
    assert together.errors == 0


def test_shares_by_split_and_classes_that_a_split_lacks() -> None:
    a, b, c = clean("a"), clean("b"), clean("c")
    b.phenotypes[1] = 2
    data = of(a, b, c, splits={"train": ("a",), "val": ("b",)})
    check = check_dataset(data)
    assert check.description.nuclei == {
        "train": (1, 1, 1),
        "val": (0, 2, 1),
        "(no split)": (1, 1, 1),
    }
    assert found(check) == {"class missing in a split": (Place(note="no 'tumour' in val"),)}
    lines = check_text(check, "folder").splitlines()
    at = lines.index(next(line for line in lines if line.startswith("tumour")))
    assert lines[at - 1].split() == ["class", "train", "val", "(no", "split)"]
    assert lines[at].split() == ["tumour", "1", "33.3%", "0", "0.0%", "1", "33.3%"]
    assert lines[-1] == "no errors, 1 warning"
    assert max(map(len, lines)) <= 80


def test_data_may_be_divided_in_several_ways() -> None:
    """As PathoCell's published tables do: each image trains in one way and tests in another."""
    a, b, c = clean("a"), replace(clean("b"), group="a"), clean("c")
    twin = replace(a, name="twin", group="c")
    splits = {
        "stage_of_tumour-test": ("b",),
        "stage_of_tumour-train": ("c",),
        "base-valid": ("a", "b"),
        "base-train": ("c", "twin"),
    }
    check = check_dataset(of(a, b, c, twin, splits=splits))
    twins = (Place("a", note="same pixels as 'twin'"),)
    assert found(check)["same image in two splits"] == twins
    assert "group in two splits" not in found(check)
    lines = check_text(check, "pathocell").splitlines()
    heads = [line.split()[1:] for line in lines if line.startswith("class ")]
    assert heads == [["stage…our-train", "stage…mour-test", "base-train"], ["base-valid", "all"]]
    assert "splits  stage_of_tumour-train, stage_of_tumour-test, base-train, base-valid" in lines
    # a and b twice: in the last table four images of three nuclei, not six
    nuclei = [line.split()[1:] for line in lines if line.startswith("nuclei ")]
    assert nuclei == [["3", "3", "6"], ["6", "12"]]
    leaky = splits | {"base-train": ("b", "c")} | {"base-valid": ("a",)}
    check = check_dataset(of(a, b, c, splits=leaky))
    assert found(check)["group in two splits"] == (
        Place(note="group 'a' in base-valid and base-train"),
    )


def test_of_images_that_cannot_be_read_no_class_is_missed() -> None:
    def read(name: str) -> Sample:
        raise DataError(f"{name}: truncated")

    assert [*found(check_dataset(replace(of(clean("a")), read=read)))] == ["unreadable"]


def test_text_shows_errors_first_and_fits_a_terminal() -> None:
    names = [f"a rather long name of an image {i}" for i in range(9)]
    samples = [replace(clean(n), group="one") for n in names]
    for s in samples:
        s.labels[39, 5:15] = 4
    samples = [replace(s, phenotypes=np.append(s.phenotypes, 1).astype(np.uint8)) for s in samples]
    classes = tuple(f"phenotype number {i} of many" for i in range(29))
    data = of(*samples, splits={n: (n,) for n in names}, classes=classes)
    text = check_text(check_dataset(data), "folder")
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("error: group in two splits (1): keep a patient, slide or field")
    first = f"{names[0]}, label 4, x 5 y 39: 10 x 1 px\n"
    assert "warning: sliver at the border (9): at most 2 px thick" in text
    assert first in text
    assert "    and 6 more\n" in text


def test_description_counts_by_hand() -> None:
    a = replace(clean("a"), unannotated=(2,))
    wide = sample("w", np.zeros((20, 30), np.int32), {}, mpp=None)
    data = of(a, clean("b"), wide, mpp=None, domains={"centre": {"a": "x", "b": "y", "w": "x"}})
    about = describe(data)
    assert about.sizes == {(40, 40): 2, (20, 30): 1}
    assert about.mpp == {0.5: 2, None: 1}
    assert about.nuclei == {"(no split)": (2, 2, 2)}
    assert about.domains == {"centre": {"x": 2, "y": 1}}
    assert about.unannotated == {"immune": 1}
    text = description_text(about, "masks")
    for line in (
        "layout         masks",
        "centre         x (2), y (1)",
        "mpp            0.5 (2), unknown (1)",
    ):
        assert line in text.splitlines()
    assert "immune (in 1 of 3 images)" in text


def test_real_annotations(real_data: Path) -> None:
    check = check_dataset(open_dataset(real_data / "consep"))
    assert check.errors == 0
    assert check.description.nuclei == {"(no split)": (371, 3941, 5537, 5706, 0)}
