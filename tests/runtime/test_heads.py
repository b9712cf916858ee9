"""Stage 2 on Ray: whoever trains a head, and wherever it finds the bank, it becomes the same."""

import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import ray
import torch

from spice_ray.config import Recipe, Scale
from spice_ray.contracts import EMBEDDING
from spice_ray.core.heads import ClusterHead
from spice_ray.core.unsupervised_loss import merged_loss
from spice_ray.errors import StorageError
from spice_ray.recipe import load_recipe
from spice_ray.runtime.bank import BankPlace, bank_bytes, open_bank
from spice_ray.runtime.head_progress import HeadProgress, state_file
from spice_ray.runtime.heads import (
    HeadPool,
    _keep_head,
    _read_head,
    assign_by_head,
    confidence_in,
    num_actors,
    publish_heads,
    train_ensemble,
)
from spice_ray.stages.features import Features
from spice_ray.stages.kmeans_start import Choice, fit_starts
from spice_ray.stages.train_heads import TrainedHead, train_heads
from spice_ray.storage import Artifact, publish, read_json
from tests.processes import own_actors

NUM_IMAGES, WIDTH = 120, 8


def recipe(*settings: str) -> Recipe:
    small = ("num_clusters=3", "heads.count=4", "heads.epochs=3", "heads.views=2", "heads.round_size=60")
    return load_recipe("digits", [*small, *settings])


@pytest.fixture
def store(tmp_path: Path) -> Artifact:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, WIDTH)) * 3
    rows = np.float16(centres[np.arange(NUM_IMAGES) % 3] + generator.normal(size=(NUM_IMAGES, WIDTH)))
    unit = np.float32(rows / np.linalg.norm(np.float32(rows), axis=1, keepdims=True))
    arrays = {"embedding": unit, "plain": rows, "weak": rows + np.float16(0.01)}
    arrays["strong"] = np.stack([rows, rows - np.float16(0.01)])

    def write(folder: Path) -> dict[str, int]:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        return {"views": 2}

    return publish(tmp_path, EMBEDDING, "a", write)


def train(store: Artifact, folder: Path, scale: Scale, *settings: str) -> list[TrainedHead]:
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    made = recipe(*settings)
    pool = HeadPool(made, scale, store, np.arange(NUM_IMAGES), folder / "progress", folder / "finished")
    return train_ensemble(pool, made.heads, made.num_clusters)


def same(first: TrainedHead, second: TrainedHead) -> bool:
    weights = all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    return weights and first.losses == second.losses and first.best_epoch == second.best_epoch


@pytest.mark.usefixtures("local_ray")
def test_heads_depend_neither_on_actors_nor_on_the_banks_place_and_are_trained_once(
    store: Artifact, tmp_path: Path
) -> None:
    one = train(store, tmp_path / "one", Scale(head_actors=1))
    two = train(store, tmp_path / "two", Scale(head_actors=2, bank_memory=0))
    assert len(one) == 4
    assert all(same(first, second) for first, second in zip(one, two, strict=True))
    assert not same(one[0], one[1])

    # Two of four heads were finished when the driver died: they are read, the others trained again.
    finished = tmp_path / "two" / "finished"
    kept = {file: file.stat().st_mtime_ns for file in finished.iterdir() if file.name[:3] in ("000", "002")}
    for name in ("001.json", "003.json", "003.safetensors"):
        (finished / name).unlink()
    again = train(store, tmp_path / "two", Scale(head_actors=1))
    assert all(same(first, second) for first, second in zip(one, again, strict=True))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert not list(finished.glob("state-*"))


@pytest.mark.faults
def test_ten_heads_are_the_same_to_the_bit_from_1_2_5_and_10_actors(store: Artifact, tmp_path: Path) -> None:
    counts = (1, 2, 5, 10)
    # A Ray of its own: that of the other tests has room for two actors.
    process = get_context("spawn").Process(target=train_by_each, args=(store, tmp_path, counts))
    process.start()
    process.join()
    assert process.exitcode == 0
    first, *others = (sorted((tmp_path / str(count) / "finished").glob("*.safetensors")) for count in counts)
    assert len(first) == 10
    for files in others:
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in first]


def train_by_each(store: Artifact, folder: Path, counts: tuple[int, ...]) -> None:
    with TemporaryDirectory(prefix="spice-", ignore_cleanup_errors=True) as sockets:
        ray.init(address="local", num_cpus=max(counts) + 1, include_dashboard=False, _temp_dir=sockets)
        for count in counts:
            scale = Scale(head_actors=count)
            assert num_actors(scale, 10) == count
            train(store, folder / str(count), scale, "heads.count=10", "heads.more=0")
        ray.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_each_head_begins_with_the_start_of_its_number_whatever_the_actor(store: Artifact, tmp_path: Path) -> None:
    (tmp_path / "progress").mkdir()
    made, ids, bank = recipe("heads.epochs=1"), np.arange(NUM_IMAGES), open_bank(store)
    starts = [start.head for start in fit_starts(bank, ids, made)]
    starts[1] = ClusterHead(WIDTH, 3, key=5)
    pool = HeadPool(made, Scale(head_actors=2), store, ids, tmp_path / "progress", tmp_path / "finished", starts)
    torch.set_flush_denormal(True)  # as an actor does
    try:
        for index, found in zip([2, 0, 1], pool.train([2, 0, 1]), strict=True):
            (alone,) = train_heads(
                Features(bank, torch.device("cpu")),
                [index],
                made.heads,
                num_clusters=3,
                seed=made.seed,
                train_ids=ids,
                progress=HeadProgress(tmp_path / "alone", [index], 1000, lambda _: None),
                starts=[starts[index]],
            )
            assert found.losses == pytest.approx(alone.losses, abs=1e-6)
    finally:
        torch.set_flush_denormal(False)


def test_k_means_that_fits_best_is_the_result_and_no_head_outvotes_it(store: Artifact, tmp_path: Path) -> None:
    bank, made = open_bank(store), recipe("heads.consensus=true")
    modules = [ClusterHead(WIDTH, 3, key=key) for key in range(4)]
    heads = [
        TrainedHead(module.state_dict(), loss, 0, [loss])
        for module, loss in zip(modules, (0.8, 0.7, 0.75, 0.9), strict=True)
    ]
    fits = [0.2, 0.1, 0.3, 0.4]
    for choice, chosen, voting in (
        (None, 1, [1, 2, 0]),
        (Choice(2, fits), 2, [2, 1, 0, 3]),
        (Choice(3, fits), 3, [3]),
    ):
        found = publish_heads(tmp_path, f"{chosen}", made, bank, heads, choice)
        assert (found.manifest["chosen"], found.manifest["voting"]) == (chosen, voting)
        assert found.manifest["modularities"] == (None if choice is None else fits)
    assert np.load(found.file("assignments.npy")).tolist() == assign_by_head(modules[3], bank.plain)[0].tolist()
    assert not np.load(found.file("disagreement.npy")).any()


@pytest.mark.usefixtures("local_ray")
def test_a_bank_is_put_into_the_object_store_where_it_is_allowed_and_else_mapped(store: Artifact) -> None:
    bank = open_bank(store)
    size = bank_bytes(bank)
    assert size == NUM_IMAGES * WIDTH * (4 + 2 + 2 + 2 * 2)
    for allowed, is_shared in ((size, True), (size - 1, False), (0, False)):
        place = BankPlace.choose(store, Scale(bank_memory=allowed / (1 << 30)))
        assert (place.shared is not None) is is_shared
        for found, expected in zip(place.open(), bank, strict=True):
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected)
    assert BankPlace.choose(store, Scale()).shared is not None


@pytest.mark.usefixtures("local_ray")
def test_a_bank_without_views_takes_the_memory_of_its_two_arrays(store: Artifact) -> None:
    viewless = replace(store, manifest={**store.manifest, "views": 0})
    bank = open_bank(viewless)
    assert bank_bytes(bank) == NUM_IMAGES * WIDTH * (4 + 2)
    place = BankPlace.choose(viewless, Scale())
    assert place.shared is not None
    assert len({ref for ref, _ in place.shared}) == 2
    assert np.array_equal(place.open().strong, bank.plain[None])


@pytest.mark.usefixtures("local_ray")
def test_more_heads_are_trained_only_while_every_head_has_merged_clusters(store: Artifact, tmp_path: Path) -> None:
    one = Scale(head_actors=1)
    apart = train(store, tmp_path / "apart", one, "heads.epochs=8", "heads.count=2", "heads.more=3")
    assert min(head.loss for head in apart) <= merged_loss(3)
    assert len(apart) == 2

    # A learning rate that teaches nothing: no head can be sure of anything.
    idle = ("heads.epochs=1", "heads.lr=1e-9", "heads.count=2", "heads.more=3")
    vague = train(store, tmp_path / "vague", one, *idle)
    assert min(head.loss for head in vague) > merged_loss(3)
    assert len({head.loss for head in vague}) == len(vague) == 5


@pytest.mark.faults
@pytest.mark.parametrize("bank_memory", [None, 0])
@pytest.mark.usefixtures("local_ray")
def test_a_killed_actor_is_started_again_and_goes_on_from_its_checkpoint(
    store: Artifact, tmp_path: Path, bank_memory: float | None
) -> None:
    settings = ("heads.epochs=400", "heads.count=1", "heads.more=0")
    scale = Scale(head_actors=1, checkpoint_seconds=0.2, bank_memory=bank_memory)
    (undisturbed,) = train(store, tmp_path / "undisturbed", scale, *settings)

    found: list[TrainedHead] = []
    folder = tmp_path / "killed"
    thread = threading.Thread(target=lambda: found.extend(train(store, folder, scale, *settings)))
    thread.start()
    while not state_file(folder / "finished", [0]).exists():
        assert thread.is_alive()
        time.sleep(0.01)
    (actor,) = own_actors("HeadActor")
    os.kill(actor, signal.SIGKILL)
    (progress,) = (folder / "progress").glob("*.json")
    progress.unlink()
    done = []
    while thread.is_alive():
        if progress.exists():
            done.append(read_json(progress)["done"])
        time.sleep(0.01)
    assert same(found[0], undisturbed)
    assert 0 < done[0] < 400


# Going on


def state(num_epochs: int) -> dict[str, object]:
    return {"losses": [[0.5] * num_epochs, [0.25] * num_epochs]}


def test_a_state_is_written_when_it_is_due_and_read_again(tmp_path: Path) -> None:
    told: list[int] = []
    HeadProgress(tmp_path, [4, 7], 1000, told.append).advance(1, lambda: state(1))
    assert not state_file(tmp_path, [4, 7]).exists()
    assert HeadProgress(tmp_path, [4, 7], 0.0, told.append).restore() is None
    HeadProgress(tmp_path / "new", [4, 7], 1e-9, told.append).advance(3, lambda: state(3))
    assert told == [2, 6]
    assert HeadProgress(tmp_path / "new", [4, 7], 1, told.append).restore() == state(3)
    assert told == [2, 6, 6]
    assert HeadProgress(tmp_path / "new", [4], 1, told.append).restore() is None
    assert list((tmp_path / "new").iterdir()) == [state_file(tmp_path / "new", [4, 7])]
    assert len(state_file(tmp_path, list(range(10_000))).name) < 100


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"not a state"])
def test_a_damaged_state_means_to_begin_again(tmp_path: Path, damage: bytes) -> None:
    HeadProgress(tmp_path, [0], 1e-9, lambda _: None).advance(1, lambda: state(1))
    state_file(tmp_path, [0]).write_bytes(damage)
    assert HeadProgress(tmp_path, [0], 1, lambda _: None).restore() is None


def test_a_state_that_cannot_be_written_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    progress = HeadProgress(tmp_path / "occupied", [0], 1e-9, lambda _: None)
    with pytest.raises(StorageError, match=r"occupied.*state-000-.*\.pt was not written .*; make room"):
        progress.advance(1, lambda: state(1))


def test_a_heads_assignment_is_its_most_probable_cluster() -> None:
    head = ClusterHead(2, 3, key=0)
    features = np.random.default_rng(0).normal(size=(9000, 2)).astype(np.float32)
    labels, confidences = assign_by_head(head, features)
    with torch.no_grad():
        expected = head(torch.from_numpy(features)).softmax(dim=1)
    assert labels.tolist() == expected.argmax(dim=1).tolist()
    assert confidences == pytest.approx(expected.amax(dim=1).numpy(), abs=1e-6)
    assert ((confidences >= 1 / 3) & (confidences <= 1)).all()


def test_the_confidence_in_a_cluster_that_others_chose_is_the_heads_probability_of_it() -> None:
    head = ClusterHead(2, 3, key=0)
    features = np.random.default_rng(0).normal(size=(9000, 2)).astype(np.float32)
    labels = np.arange(9000) % 3
    with torch.no_grad():
        expected = head(torch.from_numpy(features)).softmax(dim=1).numpy()
    assert confidence_in(head, features, labels) == pytest.approx(expected[np.arange(9000), labels], abs=1e-6)


def steady_head(clusters: list[int], losses: list[float]) -> TrainedHead:
    """One that gives each of three directions a cluster of its own."""
    head = ClusterHead(WIDTH, 3, key=0)
    weights = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
    names = [name for name, value in weights.items() if value.ndim == 2]
    weights[names[0]][:3, :3] = torch.eye(3)
    for direction, cluster in enumerate(clusters):
        weights[names[1]][cluster, direction] = 5
    best = min(loss for loss in losses if loss == loss)
    return TrainedHead(weights, best, losses.index(best), losses)


def test_a_vote_has_the_confidence_of_its_own_cluster(store: Artifact, tmp_path: Path) -> None:
    bank = open_bank(store)
    # Three directions; the second and the third head put the third of them elsewhere than the chosen first.
    rows = np.zeros_like(bank.plain)
    rows[np.arange(NUM_IMAGES), np.arange(NUM_IMAGES) % 3] = 1
    heads = [steady_head([0, 1, 2], [1.5]), steady_head([0, 1, 1], [1.51]), steady_head([0, 1, 1], [1.52])]
    made = publish_heads(tmp_path, "v", recipe("heads.consensus=true"), bank._replace(plain=rows), heads)
    assert made.manifest["voting"] == [0, 1, 2]
    labels, confidences = (np.load(made.file(f"{name}.npy")) for name in ("assignments", "confidences"))
    assert labels.tolist() == [0, 1, 1] * (NUM_IMAGES // 3)
    sure, unsure = np.exp(5) / (np.exp(5) + 2), 1 / (np.exp(5) + 2)
    assert confidences == pytest.approx(np.tile([sure, sure, unsure], NUM_IMAGES // 3), rel=1e-4)


def test_epochs_whose_loss_is_no_number_are_kept_as_none(store: Artifact, tmp_path: Path) -> None:
    head = steady_head([0, 1, 2], [float("nan"), 0.9, float("nan")])
    made = publish_heads(tmp_path, "n", recipe(), open_bank(store), [head])
    assert made.manifest["losses_over_time"] == [[None, 0.9, None]]
    _keep_head(tmp_path / "finished", 7, head)
    found = _read_head(tmp_path / "finished", 7)
    assert found is not None
    assert (found.loss, found.best_epoch) == (0.9, 1)
    assert np.isnan(found.losses).tolist() == [True, False, True]
