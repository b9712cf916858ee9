import subprocess
import sys

import pytest

from spice_ray.errors import ConfigError
from spice_ray.recipe import setting_keys
from spice_ray.settings_help import find_settings


def test_every_setting_is_explained() -> None:
    found = find_settings(None)
    assert [help_.key for help_ in found if len(help_.text) < 10] == []
    assert sorted({help_.key for help_ in found}) == sorted(setting_keys())


def test_what_differs_for_embeddings_is_told_behind_what_images_have() -> None:
    found = find_settings("heads.views")
    assert [(help_.values, help_.default) for help_ in found] == [
        ("a whole number at least 1", "4"),
        ("a whole number at least 0", "0"),
    ]
    assert found[1].text.startswith("Of embeddings: How many nearest neighbours")
    assert len(find_settings("joint.steps")) == len(find_settings("heads.epochs")) == 1
    assert find_settings("seed")[0].values == "a whole number at least 0 and below 4294967296"


def test_a_setting_is_told_with_its_values_and_default() -> None:
    (found,) = find_settings("pretrain.momentum")
    assert found.values == "a number at least 0 and below 1 or none"
    assert found.default == "none"
    (found,) = find_settings("joint.init")
    assert (found.values, found.default) == ("stage2, scratch", "stage2")
    (found,) = find_settings("heads.epochs")
    assert (found.values, found.default) == ("a whole number at least 1", None)
    (found,) = find_settings("heads.consensus")
    assert (found.values, found.default) == ("true or false", "false")
    (found,) = find_settings("scale.workers")
    assert (found.values, found.default) == ("a whole number at least 1 or auto", "1")


def test_a_section_is_all_of_its_settings_and_no_other_that_begins_alike() -> None:
    assert {help_.key.partition(".")[0] for help_ in find_settings("heads")} == {"heads"}
    assert [help_.key for help_ in find_settings("heads.epochs")] == ["heads.epochs"]
    assert [help_.key for help_ in find_settings("seed")] == ["seed"]


@pytest.mark.parametrize(("name", "near"), [("pretran", "pretrain"), ("joint.step", "joint.steps")])
def test_an_unknown_one_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{name}'; did you mean '{near}'"):
        find_settings(name)


def test_the_command_prints_them() -> None:
    called = [sys.executable, "-m", "spice_ray", "settings", "joint.confidence"]
    done = subprocess.run(called, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(
        "joint.confidence: a number at least 0 and below 1 (no default)\n    tau: a weak view"
    )
