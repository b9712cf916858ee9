from pathlib import Path

import numpy as np
import pytest
import torch

from spice_ray.config import Recipe, Scale
from spice_ray.contracts import Bank
from spice_ray.core.heads import ClusterHead
from spice_ray.recipe import load_recipe
from spice_ray.runtime.heads import assign_by_head, train_heads
from spice_ray.stages.train_heads import TrainedHead

NUM_IMAGES, WIDTH = 120, 8


def recipe() -> Recipe:
    settings = ("num_clusters=3", "heads.count=4", "heads.epochs=3", "heads.views=2", "heads.round_size=60")
    return load_recipe("digits", list(settings))


def bank() -> Bank:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, WIDTH)) * 3
    rows = np.float32(centres[np.arange(NUM_IMAGES) % 3] + generator.normal(size=(NUM_IMAGES, WIDTH)))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return Bank(unit, rows, rows + np.float32(0.01), np.stack([rows, rows - np.float32(0.01)]))


def train(folder: Path, actors: int) -> list[TrainedHead]:
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    scale = Scale(head_actors=actors)
    return train_heads(recipe(), scale, bank(), np.arange(NUM_IMAGES), folder / "progress", folder / "finished")


def same(first: TrainedHead, second: TrainedHead) -> bool:
    weights = all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    return weights and first.losses == second.losses and first.best_epoch == second.best_epoch


@pytest.mark.usefixtures("local_ray")
def test_heads_do_not_depend_on_their_actors_and_are_trained_once(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert len(one) == 4
    assert all(same(first, second) for first, second in zip(one, two, strict=True))
    assert not same(one[0], one[1])

    # Two of four heads were finished when the driver died: they are read, the others trained again.
    finished = tmp_path / "two" / "finished"
    kept = {file: file.stat().st_mtime_ns for file in finished.iterdir() if file.name[:3] in ("000", "002")}
    for name in ("001.json", "003.json", "003.safetensors"):
        (finished / name).unlink()
    again = train(tmp_path / "two", 1)
    assert all(same(first, second) for first, second in zip(one, again, strict=True))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_a_heads_assignment_is_its_most_probable_cluster() -> None:
    head = ClusterHead(2, 3, key=0)
    features = np.random.default_rng(0).normal(size=(9000, 2)).astype(np.float32)
    labels, confidences = assign_by_head(head, features)
    with torch.no_grad():
        expected = head(torch.from_numpy(features)).softmax(dim=1)
    assert labels.tolist() == expected.argmax(dim=1).tolist()
    assert confidences == pytest.approx(expected.amax(dim=1).numpy(), abs=1e-6)
    assert ((confidences >= 1 / 3) & (confidences <= 1)).all()
