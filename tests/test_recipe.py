import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from spice_ray.errors import ConfigError
from spice_ray.image_counts import check_count
from spice_ray.recipe import (
    check_key,
    check_recipe,
    load_recipe,
    parse_override,
    recipe_names,
    setting_keys,
    with_value,
)
from tests.small_settings import changed, error_of, small_recipe


def test_every_shipped_recipe_loads() -> None:
    assert recipe_names()
    for name in recipe_names():
        assert load_recipe(name, ["num_clusters=7"]).num_clusters == 7


# Rows that stage 1 and stages 2-3 see, in the split protocol where there is one.
BENCHMARKS = {
    "cifar10": (50_000, 50_000, 10),
    "cifar10_paper": (50_000, 50_000, 10),
    "cifar100_20": (50_000, 50_000, 20),
    "stl10": (105_000, 5_000, 10),
    "imagenet10": (13_000, 13_000, 10),
    "imagenet_dog": (19_500, 19_500, 15),
    "tiny_imagenet": (100_000, 100_000, 200),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_recipes_of_benchmarks_fit_their_images(name: str) -> None:
    num_images, num_train, num_clusters = BENCHMARKS[name]
    recipe = load_recipe(name, [])
    check_count(recipe, num_images, num_train)
    assert recipe.num_clusters == num_clusters


@pytest.mark.parametrize("name", ["images", "images_small", "embeddings"])
def test_recipes_for_ones_own_data_do_not_guess_the_number_of_clusters(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^num_clusters is missing; add it .* num_clusters=VALUE$"):
        load_recipe(name, [])


def test_a_recipe_file_means_the_same_as_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(small_recipe()))
    assert load_recipe(str(file), []) == check_recipe(small_recipe())
    assert load_recipe(str(file), ["heads.count=2", "seed=7"]) == check_recipe(changed(heads__count=2, seed=7))


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(small_recipe()))
    assert load_recipe(str(file), ["pretrain.lr=1e-3"]).pretrain.lr == 0.001


def test_the_last_of_two_overrides_of_one_key_counts(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(small_recipe()))
    assert load_recipe(str(file), ["seed=1", "seed=2"]).seed == 2


def test_setting_a_value_leaves_the_given_settings_alone() -> None:
    values = small_recipe()
    assert with_value(values, "heads.count", 3)["heads"]["count"] == 3
    assert values == small_recipe()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed=1", "seed", 1),
        ("pretrain.lr=1.5", "pretrain.lr", 1.5),
        ("pretrain.symmetric=true", "pretrain.symmetric", True),
        ("reliable.neighbors=null", "reliable.neighbors", None),
        ("image.mean=[0.5, 0.5, 0.5]", "image.mean", [0.5, 0.5, 0.5]),
        ("joint.init=a=b", "joint.init", "a=b"),
    ],
)
def test_an_override_is_split_at_its_first_equals_sign_and_read_as_yaml(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["seed", "=1", "", "--seed"])
def test_an_override_without_key_or_value_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"form key=value, such as heads\.count=5"):
        parse_override(text)


@pytest.mark.parametrize("value", ["[1", "2024-13-45", "9" * 5000, "[" * 2000, "!!python/name:os.system", "&a *b"])
def test_an_override_that_is_not_yaml_is_quoted_back(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(f"seed={value}")
    assert f"override 'seed={value}' is not valid YAML" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("pretrain.temprature", "pretrain.temperature"),
        ("temperature", "pretrain.temperature"),
        ("heads.counts", "heads.count"),
        ("num_cluster", "num_clusters"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{key}'; did you mean '{nearest}'"):
        check_key(key, setting_keys())


def test_a_key_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"known are .*num_clusters.*scale\.workers"):
        check_key("zzzzzzzz", setting_keys())


def test_a_whole_section_is_no_key_that_an_override_may_set() -> None:
    assert "heads" not in setting_keys()
    with pytest.raises(ConfigError, match="unknown setting 'heads'"):
        load_recipe("digits", ["heads={}"])


def test_every_setting_key_can_be_set_to_the_value_it_has() -> None:
    recipe = check_recipe(small_recipe())
    dumped = recipe.model_dump()
    for key in setting_keys():
        section, _, name = key.rpartition(".")
        value = dumped[section][name] if section else dumped[name]
        assert check_recipe(with_value(dumped, key, value)) == recipe


def test_an_unknown_setting_in_a_recipe_names_the_nearest_one() -> None:
    values = small_recipe()
    values["heads"]["cuont"] = 3
    assert error_of(values) == "unknown setting 'heads.cuont'; did you mean 'heads.count'?"


def test_a_misspelt_setting_is_named_rather_than_the_one_that_is_missing_for_it() -> None:
    values = small_recipe()
    values["num_cluster"] = values.pop("num_clusters")
    assert error_of(values) == "unknown setting 'num_cluster'; did you mean 'num_clusters'?"


def test_a_missing_setting_is_named() -> None:
    values = small_recipe()
    del values["pretrain"]["lr"]
    assert error_of(values) == "pretrain.lr is missing; add it to the recipe, or as pretrain.lr=VALUE"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no settings"),
        (b"heads: 3\n", "heads"),
        (b"heads: [1]\n", "heads"),
        (b"- a\n- b\n", "holds no settings"),
        (b"a: [1\n", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"!!python/object/apply:os.system ['false']\n", "is not valid YAML"),
        (b"seed: 2024-13-45\n", "is not valid YAML"),
        (b"a: " + b"[" * 2000, "is not valid YAML"),
        (b"1: 2\n", "unknown setting '1'"),
        (b"heads: &a {b: *a}\n", "unknown setting 'heads.b'"),
    ],
)
def test_a_hostile_recipe_file_is_one_sentence(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(file), ["heads.count=2"])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_says_so() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_recipe("nowhere.yaml", [])


def test_a_misspelt_recipe_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'digitz'; did you mean 'digits'"):
        load_recipe("digitz", [])


def test_settings_are_checked_without_torch_or_ray() -> None:
    program = """
import sys
from spice_ray.recipe import load_recipe, recipe_names
load_recipe(recipe_names()[0], [])
print(sorted({"torch", "ray"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_section_that_is_none_is_named_with_what_it_is() -> None:
    with pytest.raises(
        ConfigError, match=r"^heads=3 cannot be used: heads is a section of settings such as heads\.count$"
    ):
        with_value({"heads": 3}, "heads.count", 2)
    assert with_value({"heads": None}, "heads.count", 2) == {"heads": {"count": 2}}
