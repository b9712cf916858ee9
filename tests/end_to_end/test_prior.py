"""Runs whose clusters' shares are estimated by the embedding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spice_ray import workflow
from spice_ray.errors import StorageError
from spice_ray.recipe import load_recipe
from tests.end_to_end.small_runs import Notes

SIZES = [120, 80, 57, 43]
SHARES = [size / 300 for size in SIZES]
SETTINGS = ["heads.count=1", "heads.epochs=2", "heads.repeats=2", "heads.more=0"]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npy file of embeddings in four clusters of unlike size, with labels."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), SIZES))
    file = tmp_path_factory.mktemp("four") / "four.npy"
    np.save(file, (np.eye(12)[labels] + 0.1 * rng.normal(size=(len(labels), 12))).astype(np.float32))
    np.save(file.with_name("four.labels.npy"), labels)
    return file


def cluster(data: Path, out: Path, *settings: str) -> list[str]:
    """What the user was told of clusters."""
    reporter = Notes()
    recipe = load_recipe("embeddings", [*SETTINGS, *settings])
    workflow.run(workflow.prepare(recipe, str(data), out), reporter)
    return [note for note in reporter.notes if " clusters are " in note]


def read(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def test_the_estimate_comes_after_k_and_a_run_goes_on_with_it(four: Path, local_ray: None, tmp_path: Path) -> None:
    out, asked = tmp_path / "run", ["num_clusters=2-9", "heads.prior=estimate"]
    notes = cluster(four, out, *asked)
    assert notes[0].startswith("4 clusters are chosen out of 2-9")
    assert notes[1] == (
        "the 4 clusters are estimated to have between 14.33% and 40.00% of the images, by 300 of them; prior.json has "
        "all shares"
    )
    assert read(out / "prior.json") == {"shares": SHARES, "sizes": SIZES, "num_rows": 300}
    record = read(out / "run.json")
    assert record["recipe"]["heads"]["prior"] == SHARES
    assert (record["asked"]["heads"]["prior"], record["asked"]["num_clusters"]) == ("estimate", 9)

    kept = {file: file.stat().st_mtime_ns for file in (out / "artifacts").glob("*/*")}
    assert cluster(four, out, *asked) == notes
    assert {file: file.stat().st_mtime_ns for file in (out / "artifacts").glob("*/*")} == kept
    with pytest.raises(StorageError, match=r"heads.prior is estimate there and None here"):
        cluster(four, out, "num_clusters=2-9")

    cluster(four, tmp_path / "given", "num_clusters=4", f"heads.prior={SHARES}")
    given = read(tmp_path / "given" / "run.json")["artifacts"]
    assert record["artifacts"].keys() - given.keys() == {"prior", "cluster_count"}
    assert given.items() <= record["artifacts"].items()
    assert not (tmp_path / "given" / "prior.json").exists()
