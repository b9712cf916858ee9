from typing import Any

import pytest

from spice_ray.errors import ConfigError
from spice_ray.recipe import check_recipe, with_value


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
    """The sentence that refuses the settings."""
    with pytest.raises(ConfigError) as caught:
        check_recipe(values)
    return str(caught.value)
