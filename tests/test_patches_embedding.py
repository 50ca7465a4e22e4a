"""Embeddings of windows: what the encoder is shown, what is taken of it, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import celltyper.classification.embedding as embedding
from celltyper.classification.config import PatchConfig
from celltyper.classification.embedding import Embedder, embed_table
from celltyper.config import parse_config
from celltyper.encoders import load_encoder
from celltyper.encoders.vit import TimmViT
from celltyper.errors import ConfigError
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_patch

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images of ImageNet, which the DINOv2 networks were trained with."""


class Tokens(nn.Module):
    """Its patch tokens are the pixels, its class token is -1."""

    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = 0

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        return torch.full(images.shape[:2], -1.0), images

    def embed_whole(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1)


def write_image(file: Path, seed: int, height: int, width: int) -> Path:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file


def table_of(files: list[Path], centers: list[tuple[float, float]] | None = None) -> PatchTable:
    n = len(files)
    return PatchTable(
        path=files[0].parent,
        classes=("a", "b"),
        names=tuple(f"p{i}" for i in range(n)),
        labels=np.arange(n) % 2,
        votes=np.eye(2)[np.arange(n) % 2],
        experts=np.ones(n, np.intp),
        groups=("g",) * n,
        domains=("",) * n,
        splits=("",) * n,
        files=tuple(files),
        centers=np.full((n, 2), np.nan) if centers is None else np.array(centers, float),
        mpp=None,
    )


@pytest.fixture
def patches(tmp_path: Path) -> PatchTable:
    """Five patches of different sizes."""
    sizes = ((56, 64), (64, 56), (56, 56), (72, 64), (64, 64))
    return table_of([write_image(tmp_path / f"{i}.png", i, *size) for i, size in enumerate(sizes)])


@pytest.fixture(scope="module")
def dinov2() -> nn.Module:
    return load_encoder("vit_small_patch14_dinov2", weights="twin")


def by_pillow(window: Image.Image, side: int) -> Tensor:
    """Scaled as floats, so that nothing is rounded, and normalised: what the network sees."""
    channels = [
        np.asarray(
            Image.fromarray(np.asarray(channel, np.float32)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for channel in window.split()
    ]
    pixels = (np.stack(channels) / 255).clip(0, 1)
    normal = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(DEVIATION, (3, 1, 1))
    return torch.from_numpy(normal).float()[None]


# ---------------------------------------------------------------- what is computed


def test_embeddings_are_those_of_windows_cut_by_hand(
    patches: PatchTable, dinov2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 2)
    embedder = Embedder(dinov2, "cls+mean+center", 56)
    found = embed_table(embedder, patches, tmp_path / "kept", size=40, batch_size=3)
    assert (found.shape, found.dtype) == ((5, 1, 3 * 48), np.float32)
    for row, file in zip(found[:, 0], patches.files, strict=True):
        image = Image.open(file)
        left, top = image.width // 2 - 20, image.height // 2 - 20
        seen = by_pillow(image.crop((left, top, left + 40, top + 40)), 56)
        with torch.inference_mode():
            tokens = dinov2.model.forward_features(seen)[0]
        # a class token, and behind it the 4 x 4 patches row by row
        assert len(tokens) == 17
        middle = tokens[[1 + 5, 1 + 6, 1 + 9, 1 + 10]].mean(0)
        expected = torch.cat([tokens[0], tokens[1:].mean(0), middle])
        np.testing.assert_allclose(row, expected, atol=2e-4)


def test_points_of_fields_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 3)
    files = [write_image(tmp_path / f"{i}.png", i, 96, 80) for i in range(2)]
    centers = [(20, 30), (60, 40), (40, 76), (21, 30), (33, 50)]
    table = table_of([files[i] for i in (0, 1, 0, 1, 0)], centers)
    found = embed_table(Embedder(Tokens(), "card"), table, tmp_path / "kept", size=16)
    for row, file, (x, y) in zip(found[:, 0], table.files, centers, strict=True):
        window = Image.open(file).crop((x - 8, y - 8, x + 8, y + 8))
        expected = np.asarray(window, np.float32).transpose(2, 0, 1) / 255
        np.testing.assert_array_equal(row, expected.ravel())


@pytest.mark.parametrize("symmetries", [1, 2, 4, 8])
def test_symmetries_are_turned_windows(symmetries: int, tmp_path: Path) -> None:
    table = table_of([write_image(tmp_path / f"{i}.png", i, 24, 24) for i in range(3)])
    kept = tmp_path / "kept"
    found = embed_table(
        Embedder(Tokens(), "card"), table, kept, size=16, symmetries=symmetries, batch_size=5
    )
    assert found.shape == (3, symmetries, 3 * 16 * 16)
    for row, file in zip(found, table.files, strict=True):
        window = np.asarray(Image.open(file).crop((4, 4, 20, 20)), np.float32) / 255
        turned = [
            window,
            np.fliplr(window),
            np.rot90(window, 2),
            np.flipud(window),
            np.rot90(window),
            np.rot90(window, 3),
            np.fliplr(np.rot90(window)),
            np.flipud(np.rot90(window)),
        ][:symmetries]
        expected = np.stack([t.transpose(2, 0, 1).ravel() for t in turned])
        np.testing.assert_array_equal(row, expected)


# ---------------------------------------------------------------- what is pooled


@pytest.mark.parametrize(
    ("side", "middle"),
    [
        (1, [0]),
        (2, [0, 1]),
        (3, [1]),
        (4, [1, 2]),
        (5, [1, 2, 3]),
        (6, [1, 2, 3, 4]),
        (7, [2, 3, 4]),
        (8, [2, 3, 4, 5]),
        (9, [2, 3, 4, 5, 6]),
        (16, [*range(4, 12)]),
    ],
)
def test_center_is_the_middle_half_of_rows_and_columns(side: int, middle: list[int]) -> None:
    grid = torch.rand(2, 3, side, side)
    found = Embedder(Tokens(), "center")(grid)
    expected = grid.numpy()[:, :, np.ix_(middle, middle)[0], np.ix_(middle, middle)[1]]
    np.testing.assert_allclose(found, expected.mean((2, 3)), rtol=1e-6)


def test_parts_are_joined_in_the_order_named() -> None:
    row = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 116]])
    grid = torch.stack([row, row + 100, row + 200])[None]
    # the mean of all is (136 + 100) / 16, that of 6, 7, 10 and 11 is 8.5
    mean, center = [14.75, 114.75, 214.75], [8.5, 108.5, 208.5]
    assert Embedder(Tokens(), "mean")(grid).tolist() == [mean]
    assert Embedder(Tokens(), "cls")(grid).tolist() == [[-1, -1, -1]]
    joined = Embedder(Tokens(), "center+cls+mean")(grid)
    assert joined.tolist() == [[*center, -1, -1, -1, *mean]]


@pytest.mark.parametrize(
    ("rule", "joined"), [("cls", [0]), ("mean", [1]), ("cls+mean", [0, 1])], ids=str
)
def test_the_cards_rule(rule: str, joined: list[int]) -> None:
    encoder: Any = load_encoder("vit_small_patch14_dinov2", weights="twin", embedding=rule)
    images = torch.rand(2, 3, 28, 28)
    normal = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    with torch.inference_mode():
        tokens = encoder.model.forward_features(normal)
        found = Embedder(encoder, "card", 28)(images)
    parts = tokens[:, 0], tokens[:, 1:].mean(1)
    torch.testing.assert_close(found, torch.cat([parts[i] for i in joined], dim=1))


def test_without_a_side_the_card_says_it(dinov2: Any) -> None:
    assert Embedder(dinov2).input_size == dinov2.card.input_size == 224
    assert Embedder(Tokens()).input_size is None


@pytest.mark.parametrize("pool", ["mean+mean", "cls+center+cls"])
def test_a_part_named_twice_is_refused(pool: str) -> None:
    with pytest.raises(ConfigError, match=r"view\.pool names a part twice: "):
        parse_config({"view": {"pool": pool}}, (), PatchConfig)


@pytest.mark.parametrize("pool", ["max", "card+cls", "cls+", "", "cls mean"])
def test_unknown_parts_are_refused(pool: str) -> None:
    with pytest.raises(ConfigError, match=r"view\.pool: "):
        parse_config({"view": {"pool": pool}}, (), PatchConfig)


@pytest.mark.parametrize(("side", "near"), [(64, 70), (60, 56), (5, 14), (225, 224)])
def test_a_side_of_no_whole_patches_says_the_nearest(dinov2: Any, side: int, near: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Embedder(dinov2, "cls", side)
    assert str(caught.value) == (
        f"view.input {side} is no whole number of patches of 14 px; take {near}"
    )


def test_encoders_without_the_tokens_asked_for_are_refused() -> None:
    pyramid = load_encoder("convnextv2_tiny", weights="twin")
    for pool in ("cls", "mean+cls"):
        with pytest.raises(ConfigError, match=r"'cls': this encoder has no class token; take 'me"):
            Embedder(pyramid, pool, 64)
    assert Embedder(pyramid, "mean", 64)(torch.rand(2, 3, 64, 64)).shape[0] == 2


# ---------------------------------------------------------------- tokens of encoders


def without_class_token() -> TimmViT:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        class_token=False,
        global_pool="avg",
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=True,
    )
    return TimmViT(model, mean=(0, 0, 0), std=(1, 1, 1), embedding="mean").eval()


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_small_patch14_dinov2", {}, 1),
        ("vit_small_patch14_reg4_dinov2", {}, 5),
        ("virchow2", {}, 5),
        ("uni", {"embedding": "mean"}, 1),
        ("vit_small_patch16_dinov3", {"embedding": "cls+mean"}, 5),
        ("", {}, 0),
    ],
)
def test_tokens_are_those_of_the_embedding_and_of_the_last_map(
    name: str, options: dict[str, Any], prefix: int
) -> None:
    encoder: Any = (
        load_encoder(name, weights="twin", input_size=None, **options)
        if name
        else without_class_token()
    )
    rule = encoder.card.embedding if name else "mean"
    p = encoder.patch_size
    images = torch.rand(2, 3, 2 * p, 3 * p)
    with torch.inference_mode():
        first, grid = encoder.tokens(images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in _normalisation(encoder))
        own = encoder.model.forward_features((images - mean) / std)
        # by timm: prefix tokens, of which the class token is the first, then 2 x 3 patches
        assert own.shape[1] == prefix + 6
        assert grid.shape == (2, 48, 2, 3)
        for row in range(2):
            for col in range(3):
                torch.testing.assert_close(grid[:, :, row, col], own[:, prefix + 3 * row + col])
        torch.testing.assert_close(grid, encoder(images)[-1])
        parts = {"mean": own[:, prefix:].mean(1)}
        if prefix:
            torch.testing.assert_close(first, own[:, 0])
            parts["cls"] = own[:, 0]
        else:
            assert first is None
        expected = torch.cat([parts[part] for part in rule.split("+")], dim=1)
        torch.testing.assert_close(encoder.embed(images), expected)
        torch.testing.assert_close(encoder.embed_whole(images), expected)


def _normalisation(encoder: Any) -> tuple[Any, Any]:
    card = encoder.card
    return (card.mean, card.std) if card else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_tokens_of_a_pyramid_are_its_deepest_map() -> None:
    encoder: Any = load_encoder("convnextv2_tiny", weights="twin")
    images = torch.rand(2, 3, 64, 96)
    first, grid = encoder.tokens(images)
    assert first is None
    assert grid.shape[2:] == (2, 3)
    torch.testing.assert_close(grid, encoder(images)[-1])


def test_an_encoder_without_class_token_has_none_to_take() -> None:
    with pytest.raises(ConfigError, match="no class token; take 'mean'"):
        Embedder(without_class_token(), "cls", 32)


# ---------------------------------------------------------------- what is kept


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PatchTable:
    """Five patches, whose embeddings are kept two a file."""
    monkeypatch.setattr(embedding, "CHUNK", 2)
    return table_of([write_image(tmp_path / f"{i}.png", i, 16, 16) for i in range(5)])


def kept_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_kept_embeddings_need_no_encoder(small: PatchTable, tmp_path: Path) -> None:
    encoder, kept = Tokens(), tmp_path / "kept"
    first = embed_table(Embedder(encoder, "card"), small, kept, size=8)
    assert encoder.seen == 5
    assert len(kept_in(kept)) == 3
    again = embed_table(Embedder(encoder, "card"), small, kept, size=8, batch_size=1)
    assert encoder.seen == 5
    np.testing.assert_array_equal(again, first)
    # files are of pixels, not of names: another pixel in the middle counts, one at the rim not
    pixels = np.asarray(Image.open(small.files[2])).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(small.files[2])
    embed_table(Embedder(encoder, "card"), small, kept, size=8)
    assert encoder.seen == 5
    pixels[8, 8] ^= 255
    Image.fromarray(pixels).save(small.files[2])
    changed = embed_table(Embedder(encoder, "card"), small, kept, size=8)
    assert encoder.seen == 5 + 2  # the file holds windows 2 and 3
    assert (changed != first).any((1, 2)).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"no array at all",
        lambda data: data[:60],
        lambda data: data.replace(b"(2, 1, 192)", b"(1, 2, 192)"),
    ],
    ids=["half", "a byte less", "empty", "text", "header", "other shape"],
)
def test_damaged_files_are_computed_again(damage: Any, small: PatchTable, tmp_path: Path) -> None:
    encoder, kept = Tokens(), tmp_path / "kept"
    first = embed_table(Embedder(encoder, "card"), small, kept, size=8)
    whole = next(file for file in kept_in(kept) if len(np.load(file)) == 2)
    data = whole.read_bytes()
    assert damage(data) != data
    whole.write_bytes(damage(data))
    again = embed_table(Embedder(encoder, "card"), small, kept, size=8)
    assert encoder.seen == 5 + 2
    np.testing.assert_array_equal(again, first)
    assert whole.read_bytes() == data


def test_what_embeddings_depend_on_decides_their_file(small: PatchTable, tmp_path: Path) -> None:
    kept = tmp_path / "kept"

    def embed(
        pool: str = "cls",
        side: int = 14,
        seed: int = 0,
        size: int = 8,
        symmetries: int = 1,
        **options: Any,
    ) -> tuple[np.ndarray, int]:
        """Embeddings, and how many of the three files they needed were there."""
        name = "vit_small_patch14_dinov2"
        encoder = load_encoder(name, weights="twin", seed=seed, **options)
        before = len(kept_in(kept))
        given = {"size": size, "symmetries": symmetries}
        found = embed_table(Embedder(encoder, pool, side), small, kept, **given)
        fresh = embed_table(Embedder(encoder, pool, side), small, kept / "fresh", **given)
        np.testing.assert_array_equal(found, fresh)
        for file in kept_in(kept / "fresh"):
            file.unlink()
        (kept / "fresh").rmdir()
        return found, 3 - (len(kept_in(kept)) - before)

    def new(**given: Any) -> None:
        assert embed(**given)[1] == 0
        assert embed(**given)[1] == 3

    new()
    new(size=10)
    new(side=28)
    new(pool="mean")
    new(pool="mean+cls")
    new(pool="cls+mean")
    new(symmetries=2)
    new(seed=1)
    new(mean=(0.5, 0.5, 0.5))
    new(pool="card")
    # the rule of the card is no weight, and changes what "card" means
    new(pool="card", embedding="mean")
    assert embed(pool="cls", embedding="mean")[1] == 3
    new(pool="card", embedding="cls+mean")


def test_a_killed_pass_goes_on_where_it_was(small: PatchTable, tmp_path: Path) -> None:
    class Killed(Tokens):
        def embed_whole(self, images: Tensor) -> Tensor:
            if self.seen == 4:
                raise KeyboardInterrupt
            return super().embed_whole(images)

    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        embed_table(Embedder(Killed(), "card"), small, kept, size=8)
    encoder = Tokens()
    embed_table(Embedder(encoder, "card"), small, kept, size=8)
    assert encoder.seen == 1


def test_half_a_file_never_lies_under_its_name(
    small: PatchTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"

    def killed(file: Any, array: np.ndarray) -> None:
        file.write(b"\x93NUMPY and no more")
        file.flush()
        assert not [path for path in kept_in(kept) if path.suffix == ".npy" and path.name[0] != "."]
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_table(Embedder(Tokens(), "card"), small, kept, size=8)
    assert kept_in(kept) == []


def test_two_passes_at_once_do_not_disturb_each_other(
    small: PatchTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass runs from start to end while the first is in the middle of a file."""
    kept, save = tmp_path / "kept", np.save
    inner: list[np.ndarray] = []

    def meanwhile(file: Any, array: np.ndarray) -> None:
        monkeypatch.setattr(np, "save", save)
        file.write(b"\x93NUM")
        file.flush()
        inner.append(embed_table(Embedder(Tokens(), "card"), small, kept, size=8))
        file.seek(0)
        save(file, array)

    expected = embed_table(Embedder(Tokens(), "card"), small, tmp_path / "alone", size=8)
    monkeypatch.setattr(np, "save", meanwhile)
    outer = embed_table(Embedder(Tokens(), "card"), small, kept, size=8)
    np.testing.assert_array_equal(inner[0], expected)
    np.testing.assert_array_equal(outer, expected)
    alone = {file.name: file.read_bytes() for file in kept_in(tmp_path / "alone")}
    assert {file.name: file.read_bytes() for file in kept_in(kept)} == alone


def test_enlargements_are_refused_before_anything_is_embedded() -> None:
    encoder = load_encoder("vit_small_patch14_dinov2", weights="twin", scales=(1, 2))
    with pytest.raises(ConfigError, match=r"view\.pool 'cls' .* leave out encoder\.options\.scale"):
        Embedder(encoder, "cls")


def test_another_resolution_of_the_same_pixels_shares_the_file(
    small: PatchTable, tmp_path: Path
) -> None:
    """A window at the resolution of its file is the same pixels, whatever the number says."""
    encoder, kept = Tokens(), tmp_path / "kept"
    embed_table(Embedder(encoder, "card"), small, kept, size=8)
    embed_table(Embedder(encoder, "card"), replace(small, mpp=0.5), kept, size=8, mpp=0.5)
    assert encoder.seen == 5
    halved = embed_table(Embedder(encoder, "card"), replace(small, mpp=0.5), kept, size=8, mpp=1.0)
    assert encoder.seen == 10
    windows = [read_patch(replace(small, mpp=0.5), i, size=8, mpp=1.0) for i in range(5)]
    expected = np.stack(windows).transpose(0, 3, 1, 2).reshape(5, 1, -1) / np.float32(255)
    np.testing.assert_array_equal(halved, expected)
