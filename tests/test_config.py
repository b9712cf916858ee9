import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from spice_ray.config import (
    Reliable,
    check_images,
    check_key,
    check_recipe,
    load_recipe,
    num_neighbors,
    parse_override,
    perfect_loss,
    recipe_names,
    setting_keys,
    with_value,
)
from spice_ray.errors import ConfigError


def small_recipe() -> dict[str, Any]:
    """The fewest settings that make a recipe, for at least 256 images."""
    return {
        "num_clusters": 3,
        "image": {"size": 16},
        "pretrain": {
            "lanes": 4,
            "epochs": 1,
            "batch_size": 32,
            "queue_size": 64,
            "temperature": 0.2,
            "momentum": 0.99,
            "lr": 0.1,
            "weight_decay": 0,
        },
        "heads": {"epochs": 1, "round_size": 100},
        "reliable": {"min_consistency": 0.9},
        "joint": {
            "lanes": 4,
            "steps": 1,
            "labelled_batch": 8,
            "confidence": 0.95,
            "lr": 0.03,
            "weight_decay": 0,
        },
    }


def changed(**values: Any) -> dict[str, Any]:
    """The small recipe with ``stage__key`` set."""
    recipe = small_recipe()
    for name, value in values.items():
        recipe = with_value(recipe, name.replace("__", "."), value)
    return recipe


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_recipe(values)
    return str(caught.value)


def test_a_minimal_recipe_takes_the_documented_defaults() -> None:
    recipe = check_recipe(small_recipe())
    assert (recipe.seed, recipe.protocol, recipe.heads.count, recipe.reliable.neighbors) == (0, "whole", 10, None)
    assert (recipe.heads.confident_fraction, recipe.heads.loss) == (0.5, "double_softmax")
    assert recipe.scale.workers == 1


def test_every_shipped_recipe_loads() -> None:
    assert recipe_names()
    for name in recipe_names():
        assert load_recipe(name, []).num_clusters >= 2


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


def test_settings_cannot_be_changed_after_checking() -> None:
    recipe = check_recipe(small_recipe())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


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


@pytest.mark.parametrize("text", ["seed", "=1", ""])
def test_an_override_without_key_or_value_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"form key=value, such as heads\.count=5"):
        parse_override(text)


def test_an_override_that_is_not_yaml_is_quoted_back() -> None:
    with pytest.raises(ConfigError, match=r"'seed=\[1' is not valid YAML"):
        parse_override("seed=[1")


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
        check_key(key)


def test_a_key_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"known are .*num_clusters.*scale\.workers"):
        check_key("zzzzzzzz")


def test_a_whole_section_is_no_key_that_an_override_may_set() -> None:
    assert "heads" not in setting_keys()
    with pytest.raises(ConfigError, match="unknown setting 'heads'"):
        with_value(small_recipe(), "heads", {})


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


def test_a_missing_setting_is_named() -> None:
    values = small_recipe()
    del values["pretrain"]["temperature"]
    assert error_of(values) == "pretrain.temperature is missing; add it"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_clusters", 1),
        ("num_clusters", "many"),
        ("seed", -1),
        ("seed", 2**32),
        ("protocol", "both"),
        ("image__size", 7),
        ("image__std", [1, 1, 0]),
        ("image__mean", [0.5, 0.5]),
        ("pretrain__temperature", 0),
        ("pretrain__temperature", float("nan")),
        ("pretrain__lr", float("inf")),
        ("pretrain__momentum", 1),
        ("pretrain__encoder", "resnet1"),
        ("heads__confident_fraction", 0),
        ("heads__confident_fraction", 1.01),
        ("reliable__min_consistency", 1),
        ("reliable__min_consistency", -0.1),
        ("reliable__min_confidence", 1),
        ("reliable__neighbors", 0),
        ("joint__confidence", 1),
        ("joint__ema", 1),
        ("scale__workers", 0),
        ("scale__checkpoint_seconds", 0),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(setting: str, value: Any) -> None:
    message = error_of(changed(**{setting: value}))
    assert setting.replace("__", ".") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_clusters", 2),
        ("seed", 2**32 - 1),
        ("image__size", 8),
        ("pretrain__momentum", 0),
        ("heads__confident_fraction", 1),
        ("heads__round_size", 3),
        ("reliable__min_consistency", 0),
        ("reliable__neighbors", 1),
        ("scale__workers", 4),
    ],
)
def test_the_last_value_of_a_range_is_accepted(setting: str, value: Any) -> None:
    section, _, name = setting.rpartition("__")
    dumped = check_recipe(changed(**{setting: value})).model_dump()
    assert (dumped[section][name] if section else dumped[name]) == value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pretrain__batch_size": 30}, "pretrain.lanes=4 does not divide pretrain.batch_size=30; use "
                                       "pretrain.batch_size=28 or 32"),
        ({"pretrain__queue_size": 70}, "pretrain.batch_size=32 does not divide pretrain.queue_size=70; use "
                                       "pretrain.queue_size=64 or 96"),
        ({"pretrain__queue_size": 10}, "use pretrain.queue_size=32"),
        ({"joint__labelled_batch": 6}, "use joint.labelled_batch=4 or 8"),
        ({"scale__workers": 3}, "scale.workers=3 does not divide pretrain.lanes=4"),
        ({"joint__lanes": 1, "scale__workers": 2}, "scale.workers=2 does not divide joint.lanes=1"),
        ({"pretrain__batch_size": 4, "pretrain__queue_size": 4}, "leaves fewer than 2 rows"),
        ({"heads__round_size": 2}, "heads.round_size=2 is smaller than num_clusters=3"),
        ({"joint__encoder": "wrn28_2"}, "joint.encoder=wrn28_2 needs joint.init=scratch"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_each_other_are_refused_with_both_numbers(
    values: dict[str, Any], expected: str
) -> None:
    assert expected in error_of(changed(**values))


def test_another_encoder_for_stage_3_is_accepted_from_scratch() -> None:
    recipe = check_recipe(changed(joint__encoder="wrn28_2", joint__init="scratch"))
    assert recipe.joint.encoder == "wrn28_2"


@pytest.mark.parametrize(
    ("neighbors", "num_images", "num_clusters", "expected"),
    [
        (None, 1797, 10, 30),
        (None, 60_000, 10, 100),
        (None, 300, 10, 10),
        (None, 5, 2, 4),
        (7, 1797, 10, 7),
        (100, 50, 2, 49),
        (1, 50, 2, 1),
    ],
)
def test_the_number_of_neighbors_follows_the_data_within_10_and_100(
    neighbors: int | None, num_images: int, num_clusters: int, expected: int
) -> None:
    reliable = Reliable(neighbors=neighbors, min_consistency=0.9)
    assert num_neighbors(reliable, num_images, num_clusters) == expected


def test_a_recipe_fits_data_of_exactly_its_size_and_none_smaller() -> None:
    recipe = check_recipe(small_recipe())  # largest batch 8 * 7 = 56, queue 64 of at least 256 images
    check_images(recipe, num_images=256, num_train=56)
    with pytest.raises(ConfigError, match=r"queue_size=64 .* 255 images.* use 32"):
        check_images(recipe, num_images=255, num_train=56)
    with pytest.raises(ConfigError, match="a batch of 56 images is more than the 55"):
        check_images(recipe, num_images=256, num_train=55)
    with pytest.raises(ConfigError, match="num_clusters=3 is more than the 2 images"):
        check_images(recipe, num_images=2, num_train=2)


def test_the_loss_of_perfect_clusters_is_that_of_a_double_softmax() -> None:
    for num_clusters in (2, 10):
        certain = [math.e] + [1.0] * (num_clusters - 1)  # exp of a one-hot row
        assert perfect_loss(num_clusters) == pytest.approx(-math.log(certain[0] / sum(certain)))


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
from spice_ray.config import load_recipe, recipe_names
load_recipe(recipe_names()[0], [])
print(sorted({"torch", "ray"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
