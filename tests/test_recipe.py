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
    check_trials,
    load_recipe,
    load_sweep,
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


def sweep_file(folder: Path, space: dict[str, Any], **more: Any) -> str:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"recipe": "digits", "space": space, **more}))
    return str(file)


def test_the_sweeps_beside_the_package_load_and_their_trials_can_be_run() -> None:
    files = sorted((Path(__file__).parent.parent / "tune_configs").glob("*.yaml"))
    assert files
    for file in files:
        sweep = load_sweep(str(file))
        check_trials(load_recipe(sweep.recipe, []), sweep)


@pytest.mark.parametrize(
    ("space", "more", "expected"),
    [
        ({"joint.confidnce": [0.9]}, {}, "unknown setting 'joint.confidnce'; did you mean 'joint.confidence'?"),
        # The nearest key of all would be pretrain.encoder, which no sweep may vary.
        ({"encoder": ["wrn28_2"]}, {}, "unknown setting 'encoder'; did you mean 'joint.encoder'?"),
        ({"pretrain.temperature": [0.1]}, {}, "pretrain.temperature is shared by all trials of a sweep"),
        ({"seed": [1, 2]}, {}, "seed is shared by all trials"),
        ({"reliable.labels": ["a.parquet"]}, {}, "reliable.labels is shared by all trials"),
        ({"reliable.index": ["exact", "ivf"]}, {}, "reliable.index is shared by all trials"),
        ({"joint.confidence": []}, {}, "space.joint.confidence=[] cannot be used"),
        ({"joint.confidence": 0.9}, {}, "space.joint.confidence=0.9 cannot be used"),
        ({}, {}, "space={} cannot be used"),
        ({"joint.confidence": [0.9]}, {"serach": "grid"}, "unknown setting 'serach'; did you mean 'search'?"),
        ({"joint.confidence": [0.9]}, {"search": "random"}, "search: random needs samples"),
        ({"joint.confidence": [0.9]}, {"samples": 3}, "samples goes with search: random"),
        ({"joint.confidence": [0.9]}, {"search": "random", "samples": 0}, "samples=0 cannot be used"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_one_sentence_that_names_the_file(
    tmp_path: Path, space: dict[str, Any], more: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(tmp_path, space, **more))
    assert str(caught.value).startswith("sweep.yaml: ")
    assert expected in str(caught.value)


def test_every_value_of_a_sweep_is_checked_with_the_others_of_its_trial(tmp_path: Path) -> None:
    recipe = load_recipe("digits", [])
    fits = {"joint.encoder": ["wrn28_2"], "joint.init": ["scratch"], "joint.confidence": [0.5, 0.9]}
    check_trials(recipe, load_sweep(sweep_file(tmp_path, fits)))
    with pytest.raises(ConfigError, match=r"joint\.encoder=wrn28_2 needs joint\.init=scratch"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {**fits, "joint.init": ["scratch", "stage2"]})))
    with pytest.raises(ConfigError, match=r"joint\.confidence=1\.5 cannot be used"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {**fits, "joint.confidence": [0.5, 1.5]})))


@pytest.mark.parametrize("key", ["joint.init", "reliable.min_consistency"])
def test_what_given_labels_make_idle_cannot_be_swept(key: str, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["reliable.labels=a.parquet"])
    values = ["scratch", "stage2"] if key == "joint.init" else [0.5, 0.9]
    with pytest.raises(ConfigError, match=f"{key} cannot be swept with reliable.labels"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {key: values})))
    check_trials(recipe, load_sweep(sweep_file(tmp_path, {"joint.confidence": [0.5, 0.9]})))


def test_a_vast_random_space_is_checked_in_a_moment(tmp_path: Path) -> None:
    space = {
        key: [n / 1000 for n in range(1000)]
        for key in ("joint.confidence", "joint.ema", "reliable.min_consistency", "reliable.min_confidence")
    }
    check_trials(load_recipe("digits", []), load_sweep(sweep_file(tmp_path, space, search="random", samples=2)))
