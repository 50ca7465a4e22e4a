"""Config: bounds, unknown keys, overrides, and every shipped recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from celltyper.classification.config import PatchConfig
from celltyper.config import Config, dump_config, load_config, parse_config, recipes, task_of
from celltyper.errors import ConfigError


def test_defaults_survive_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(Config()))
    assert load_config(path) == Config()


def test_overrides_are_yaml_and_nested() -> None:
    config = parse_config(
        {"train": {"steps": 5}},
        [
            "train.lr=1e-2",
            "encoder.adapt=lora",
            "encoder.lora.rank=4",
            "data.mpp=null",
            "decoder.options.width=8",
        ],
    )
    assert config.train.steps == 5
    assert config.train.lr == 0.01
    assert config.encoder.lora.rank == 4
    assert config.data.mpp is None
    assert config.decoder.options == {"width": 8}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.step=3"], "train.step: unknown key 'step'; did you mean 'steps'?"),
        (["trian.steps=3"], "did you mean 'train'?"),
        (["train.steps=0"], "train.steps: input should be greater than or equal to 1, got 0"),
        (["encoder.adapt=frosen"], "encoder.adapt: input should be 'frozen', 'lora', 'dora', "),
        (["encoder.lora.targets=atention"], "encoder.lora.targets: input should be 'attention', "),
        (["encoder.layer_decay=1.5"], "encoder.layer_decay: input should be less than or equal to"),
        (["train.lr"], "expected section.key=value"),
        (["seed=2", "seed.x=1"], "'seed' is a value, not a section"),
        (["train=[1"], "--set 'train=[1'"),
    ],
)
def test_wrong_overrides_name_the_key(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({}, overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_sources_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'dmeo'; did you mean 'demo'"):
        load_config("dmeo")
    with pytest.raises(ConfigError, match="does not exist; those that come along: amibr-baseline"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(broken)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_hold_only_what_they_choose(name: str) -> None:
    """A value that equals the default says nothing and hides what a recipe is about."""
    import yaml

    def leaves(values: dict, prefix: str = "") -> list[tuple[str, object]]:  # type: ignore[type-arg]
        found: list[tuple[str, object]] = []
        for key, value in values.items():
            inner = leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else []
            found += inner or [(f"{prefix}{key}", value)]
        return found

    given = dict(leaves(yaml.safe_load(recipes()[name].read_text())))
    model = {"cells": Config, "patches": PatchConfig}[task_of(name)]
    defaults = dict(leaves(model().model_dump(mode="json")))
    same = {k for k, v in given.items() if k in defaults and defaults[k] == v}
    # What a recipe is called after.
    names = {"encoder.name", "encoder.adapt", "decoder.name", "instances.method", "head.name"}
    assert same <= names | {"task"}


def test_annotated_config_shows_every_key_with_its_default() -> None:
    import yaml

    docs = Path(__file__).parents[1] / "docs"
    path = docs / "config.yaml"
    assert yaml.safe_load(path.read_text()) == Config().model_dump(mode="json")
    assert load_config(path) == Config()
    path = docs / "config-patches.yaml"
    assert yaml.safe_load(path.read_text()) == PatchConfig().model_dump(mode="json")
    assert load_config(path, [], PatchConfig) == PatchConfig()


def test_names_of_splits_may_be_numbers() -> None:
    data = parse_config({}, ["data.train=1", "data.val=2"]).data
    assert (data.train, data.val) == ("1", "2")


def test_a_mistake_is_laid_where_it_was_made(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("train: {steps: 5}")
    bad.write_text("train: {steps: -5}")
    with pytest.raises(ConfigError, match=r"^--set: train\.lr: "):
        load_config(good, ["train.lr=-1"])
    with pytest.raises(ConfigError, match=r"bad\.yaml: train\.steps: "):
        load_config(bad, ["train.lr=0.1"])


def test_the_recipe_in_the_docs_of_patches_is_the_recipe() -> None:
    import yaml

    text = (Path(__file__).parents[1] / "docs" / "patches.md").read_text()
    shown = text.split("The recipe in full:")[1].split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load(recipes()["mitosis-probe"].read_text())
