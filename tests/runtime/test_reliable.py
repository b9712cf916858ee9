"""What is said of reliable samples."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spice_ray.config import Recipe
from spice_ray.recipe import load_recipe
from spice_ray.runtime.reliable import ReliableTable, describe_reliable, why_skip, write_reliable
from spice_ray.storage import Artifact, publish


def recipe() -> Recipe:
    return load_recipe("digits", ["num_clusters=3"])


def reliable(folder: Path, kept: list[int], consistent: list[int]) -> Artifact:
    """Twelve samples, the first of which are reliable."""
    weights = (torch.arange(12) < sum(kept)).float()
    none = torch.full((12,), torch.nan)
    table = ReliableTable(torch.zeros(12, dtype=torch.int64), none.double(), weights, none)

    def write(to: Path) -> dict[str, Any]:
        write_reliable(to, table)
        return {"neighbors": 5, "kept": kept, "consistent": consistent, "num_train": 12}

    return publish(folder, "reliable", "a", write)


def test_how_many_are_reliable_is_told(tmp_path: Path) -> None:
    told = describe_reliable(reliable(tmp_path, [4, 3, 2], [4, 3, 2]))
    assert told == "9 of 12 samples are reliable"


def test_what_balancing_cut_is_told(tmp_path: Path) -> None:
    told = describe_reliable(reliable(tmp_path, [1, 1, 1], [4, 3, 1]))
    assert told == (
        "3 of 12 samples are reliable: of 8 that pass the thresholds reliable.balance=smallest leaves each cluster the "
        "1 of the smallest one"
    )


def test_clusters_without_any_are_named(tmp_path: Path) -> None:
    assert describe_reliable(reliable(tmp_path, [4, 0, 0], [4, 0, 0])).endswith(
        "clusters [1, 2] have none (kept: [4, 0, 0])"
    )


@pytest.mark.parametrize(
    ("consistent", "remedy"), [([4, 3, 1], "set reliable.balance=weights, lower"), ([1, 1, 1], "lower")]
)
def test_who_is_skipped_for_a_cut_is_told_to_cut_less(consistent: list[int], remedy: str, tmp_path: Path) -> None:
    reason = why_skip(reliable(tmp_path, [1, 1, 1], consistent), recipe(), [3, 3, 3, 3], 4)
    assert reason is not None
    assert f"lanes without any; {remedy} reliable.min_consistency" in reason
