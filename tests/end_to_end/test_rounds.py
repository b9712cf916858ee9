"""Stage 3 in rounds: reliable samples are chosen anew among what the round before has learned."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from spice_ray import workflow
from spice_ray.core.neighbors import exact_neighbors
from spice_ray.errors import ConfigError
from spice_ray.evaluate import evaluate
from spice_ray.readers.parts import images_of, read_part
from spice_ray.runtime.data import open_shards
from spice_ray.runtime.weights import load_joint
from spice_ray.runtime.workers import augmentation_of
from spice_ray.stages.assign import predict
from spice_ray.storage import Artifact, open_artifact, read_json, write_json
from tests.end_to_end.small_runs import NUM_IMAGES, Corpus, Notes, small_recipe

ROUNDS = 2


def artifacts(run: Path, kind: str) -> list[Artifact]:
    """All of a kind, by the time at which they were finished."""
    folders = sorted(
        (run / "artifacts").glob(f"{kind}-*"), key=lambda folder: (folder / "manifest.json").stat().st_mtime
    )
    found = [open_artifact(run / "artifacts", kind, folder.name.partition("-")[2]) for folder in folders]
    return [artifact for artifact in found if artifact is not None]


@pytest.fixture(scope="module")
def in_rounds(finished: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of several rounds that found a run of one round finished, and what its user was told."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("rounds") / "run"))
    given = {folder.name for folder in (run / "artifacts").iterdir()}
    record = read_json(run / "run.json")
    record["recipe"]["joint"]["rounds"] = ROUNDS
    write_json(run / "run.json", record)
    reporter = Notes()
    prepared = workflow.prepare(small_recipe(f"joint.rounds={ROUNDS}"), str(corpus.parquet), run)
    workflow.run(prepared, reporter)
    assert given < {folder.name for folder in (run / "artifacts").iterdir()}
    return run, reporter.notes


def test_every_round_learns_from_what_the_one_before_predicts(in_rounds: tuple[Path, list[str]]) -> None:
    run, notes = in_rounds
    joints, predictions, reliable = (artifacts(run, kind) for kind in ("joint", "predictions", "reliable"))
    # One of the finished run; a table of assignments only of it and of the last round.
    assert [len(found) for found in (joints, predictions, reliable)] == [ROUNDS, ROUNDS - 1, ROUNDS]
    assert len(artifacts(run, "assignments")) == 2
    assert len(artifacts(run, "encoder")) == len(artifacts(run, "heads")) == 1

    recipe = small_recipe()
    shards = open_shards(artifacts(run, "shards")[0], None)
    tables = [read_part(shards.path, file, shards.format) for file in shards.readable]
    images = torch.from_numpy(np.concatenate([images_of(table, recipe.image.size) for table in tables]))
    for before, found, chosen in zip(joints[:-1], predictions, reliable[1:], strict=True):
        with torch.inference_mode():
            said = predict(load_joint(before).eval(), images, augmentation_of(recipe.image))
        labels = said.logits.argmax(dim=1)
        assert np.array_equal(np.load(found.file("assignments.npy")), labels.numpy())
        embedding = torch.from_numpy(np.load(found.file("embedding.npy")))
        torch.testing.assert_close(embedding, torch.nn.functional.normalize(said.pooled, dim=1), rtol=0, atol=1e-5)

        nearest, _ = exact_neighbors(embedding, chosen.manifest["neighbors"])
        consistency = (labels[nearest] == labels[:, None]).double().mean(dim=1)
        table = pq.read_table(chosen.file("reliable.parquet"))
        assert np.allclose(table["consistency"].to_numpy(), consistency.numpy())
        kept = table["weights"].to_numpy() > 0
        assert kept.tolist() == (consistency > recipe.reliable.min_consistency).tolist()
        assert chosen.manifest["kept"] == np.bincount(labels.numpy()[kept], minlength=10).tolist()
        assert np.array_equal(table["labels"].to_numpy(), labels.numpy())

    counts = [sum(artifact.manifest["kept"]) for artifact in reliable]
    assert [note for note in notes if note.startswith("round ")] == [
        f"round {number} of stage 3: {now} reliable samples, {before} before"
        for number, before, now in zip(range(2, ROUNDS + 1), counts[:-1], counts[1:], strict=True)
    ]


def test_the_result_is_that_of_the_last_round(in_rounds: tuple[Path, list[str]]) -> None:
    run, _ = in_rounds
    last = artifacts(run, "reliable")[-1]
    record = read_json(run / "run.json")
    assert record["artifacts"]["joint"] == artifacts(run, "joint")[-1].fingerprint
    assert record["artifacts"]["reliable"] == last.fingerprint
    table = pq.read_table(run / "assignments.parquet").sort_by("sample_id")
    chosen = pq.read_table(last.file("reliable.parquet"))
    assert table["consistency"].to_pylist() == chosen["consistency"].to_pylist()

    # Scores of the reliable labels are those of what the last round learned from.
    scores = evaluate(run)
    kept = chosen["weights"].to_numpy() > 0
    assert scores["reliable"]["count"] == kept.sum()
    assert len(kept) == NUM_IMAGES
    assert scores["acc"] > 0.5


def test_a_round_goes_on_from_the_weights_of_the_one_before(in_rounds: tuple[Path, list[str]]) -> None:
    run, _ = in_rounds
    first, *_, last = (load_joint(joint).state_dict() for joint in artifacts(run, "joint"))
    start, moved = first["head.0.weight"], last["head.0.weight"]
    # Sixty small steps away, and not another start.
    assert 0 < float((moved - start).norm() / start.norm()) < 0.5


def test_rounds_of_labels_that_are_given_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"joint.rounds=2 chooses reliable samples anew, and reliable.labels gives"):
        small_recipe("joint.rounds=2", "reliable.labels=labels.parquet")
