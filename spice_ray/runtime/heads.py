"""Stage 2 on Ray: heads as parallel actors on one bank."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from spice_ray import mirror
from spice_ray.config import ImageRecipe, Recipe, Scale
from spice_ray.contracts import HEADS, Bank
from spice_ray.core.consensus import consensus, voting_heads
from spice_ray.core.heads import ClusterHead
from spice_ray.core.unsupervised_loss import merged_loss
from spice_ray.image_counts import num_views
from spice_ray.runtime.bank import BankPlace, bank_bytes
from spice_ray.runtime.cluster import room
from spice_ray.runtime.head_progress import HeadProgress, state_file
from spice_ray.runtime.memory import device_of, free_on_device
from spice_ray.runtime.progress import ProgressWriter
from spice_ray.runtime.weights import load_weights, save_weights
from spice_ray.settings import Heads
from spice_ray.stages.features import Features
from spice_ray.stages.kmeans_start import Choice
from spice_ray.stages.train_heads import TrainedHead, choose_head, train_heads
from spice_ray.storage import Artifact, publish, read_json, write_json

_RETRIES = 3
_ROWS_AT_ONCE = 8192


class HeadActor:
    """Trains groups of heads, one group after the other."""

    def __init__(
        self, recipe: Recipe, scale: Scale, place: BankPlace, starts: Sequence[ClusterHead], progress: Path, writer: str
    ) -> None:
        torch.set_num_threads(scale.cpus_per_worker)
        # A head that is nearly certain has gradients so small that a processor takes many times as long for them.
        torch.set_flush_denormal(True)
        self._recipe, self._scale, self._starts = recipe, scale, starts
        self._writer = ProgressWriter(progress, writer)
        self._done: dict[tuple[int, ...], int] = {}
        device = device_of(scale.head_gpus)
        bank = place.open()
        resident = bank_bytes(bank) <= free_on_device(device, scale.head_gpus)
        self._features = Features(bank, device, resident=resident)

    def expect(self, groups: list[list[int]]) -> None:
        """Hear what there will be to do, for the progress that is shown."""
        self._done |= {tuple(group): 0 for group in groups}
        self._show()

    def train(self, group: list[int], train_ids: NDArray[np.int64], states: Path) -> list[TrainedHead]:
        """Train the heads of these numbers side by side; go on from their state in the folder ``states``."""
        recipe = self._recipe

        def tell(num_epochs: int) -> None:
            self._done[tuple(group)] = num_epochs
            self._show()

        features = self._features
        if not isinstance(recipe, ImageRecipe):
            features = features.with_strong(num_views(recipe.heads.views, len(train_ids), recipe.num_clusters))
        return train_heads(
            features,
            group,
            recipe.heads,
            num_clusters=recipe.num_clusters,
            seed=recipe.seed,
            train_ids=train_ids,
            progress=HeadProgress(states, group, self._scale.checkpoint_seconds, tell),
            starts=[self._starts[index] for index in group] if self._starts else None,
        )

    def _show(self) -> None:
        total = sum(len(group) for group in self._done) * self._recipe.heads.epochs
        self._writer.write(sum(self._done.values()), total)


class HeadPool:
    """The actors of a stage 2; started when there is a head to train."""

    def __init__(
        self,
        recipe: Recipe,
        scale: Scale,
        store: Artifact,
        train_ids: NDArray[np.int64],
        progress: Path,
        finished: Path,
        starts: Sequence[ClusterHead] = (),
    ) -> None:
        """Heads that were trained are kept in the folder ``finished``; those found there are not trained again.

        ``starts`` choose the prototypes of the heads' first rounds, one for each number; none: the heads do.
        """
        self._recipe, self._scale, self._store = recipe, scale, store
        self._train_ids, self._progress, self._finished, self._starts = train_ids, progress, finished, starts

    def train(self, numbers: Sequence[int]) -> list[TrainedHead]:
        """The heads of these numbers; which actor trains a head has no influence on it."""
        heads = {index: head for index in numbers if (head := _read_head(self._finished, index)) is not None}
        missing = [index for index in numbers if index not in heads]
        running = self._begin(missing) if missing else {}
        while running:
            (ready, *_), _ = ray.wait(list(running))
            group = running.pop(ready)
            for index, head in zip(group, ray.get(ready), strict=True):
                heads[index] = head
                _keep_head(self._finished, index, head)
            mirror.remove(state_file(self._finished, group))
        return [heads[index] for index in numbers]

    def _begin(self, missing: list[int]) -> dict[Any, list[int]]:
        actors = self._actors[: len(missing)]
        running: dict[Any, list[int]] = {}
        for place, actor in enumerate(actors):
            share = missing[place :: len(actors)]
            # Side by side on a GPU, each alone on a CPU.
            groups = [share] if self._scale.head_gpus else [[index] for index in share]
            actor.expect.remote(groups)
            running |= {actor.train.remote(group, self._ids, self._finished): group for group in groups}
        return running

    @cached_property
    def _actors(self) -> list[Any]:
        scale = self._scale
        remote = ray.remote(HeadActor).options(
            num_cpus=scale.cpus_per_worker,
            num_gpus=scale.head_gpus,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
        count = num_actors(scale, self._recipe.heads.count)
        return [
            remote.remote(self._recipe, scale, self._place, self._starts, self._progress, f"actor-{number}")
            for number in range(count)
        ]

    @cached_property
    def _place(self) -> BankPlace:
        # Kept for as long as the actors: what nobody else refers to would be gone when one is started again.
        return BankPlace.choose(self._store, self._scale)

    @cached_property
    def _ids(self) -> "ray.ObjectRef[NDArray[np.int64]]":
        return ray.put(self._train_ids)


def num_actors(scale: Scale, num_heads: int) -> int:
    """One actor per head where the cluster has room, else as many as there is room for."""
    return max(1, min(scale.head_actors or num_heads, num_heads, room(scale.cpus_per_worker, scale.head_gpus)))


def train_ensemble(pool: HeadPool, settings: Heads, num_clusters: int) -> list[TrainedHead]:
    """Train ``heads.count`` heads, and up to ``heads.more`` others while every one so far has merged clusters."""
    heads = pool.train(range(settings.count))
    most = settings.count + settings.more
    while len(heads) < most and min(head.loss for head in heads) > merged_loss(num_clusters):
        heads += pool.train(range(len(heads), min(len(heads) + settings.count, most)))
    return heads


def _keep_head(folder: Path, index: int, head: TrainedHead) -> None:
    record = {"loss": head.loss, "best_epoch": head.best_epoch, "losses": _numbers(head.losses)}
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{index:03d}.safetensors"
    save_file(head.weights, weights)
    mirror.send(weights)
    write_json(folder / f"{index:03d}.json", record)  # last: its presence means complete


def _read_head(folder: Path, index: int) -> TrainedHead | None:
    record = folder / f"{index:03d}.json"
    if not mirror.exists(record):
        return None
    found = read_json(record)
    losses = [math.nan if loss is None else loss for loss in found.pop("losses")]
    return TrainedHead(load_weights(mirror.local(folder / f"{index:03d}.safetensors")), **found, losses=losses)


def _numbers(losses: list[float]) -> list[float | None]:
    """As JSON has them: None for a loss that is no number."""
    return [loss if math.isfinite(loss) else None for loss in losses]


def publish_heads(
    root: Path,
    print_: str,
    recipe: Recipe,
    bank: Bank,
    heads: list[TrainedHead],
    choice: Choice | None = None,
) -> Artifact:
    """Publish the ensemble with the chosen head's assignment of every image, or the consensus (SPICE_s).

    Without a ``choice`` the head with the least unsupervised loss is chosen; with one the last of the heads is k-means.
    Where that is chosen, no other has found anything better, and none votes.
    """
    chosen = choose_head(heads) if choice is None else choice.chosen
    voting = voting_heads([head.loss for head in heads], chosen, recipe.num_clusters)
    if choice is not None and chosen == len(heads) - 1:
        voting = [chosen]
    modules = [trained.head() for trained in heads]

    def write(folder: Path) -> dict[str, Any]:
        for index, module in enumerate(modules):
            save_weights(module, folder / f"head-{index:03d}.safetensors")
        labels, confidences = assign_by_head(modules[chosen], bank.plain)
        if recipe.heads.consensus:
            others = [assign_by_head(modules[number], bank.plain)[0] for number in voting[1:]]
            labels, disagreement = consensus([labels, *others], recipe.num_clusters)
            confidences = confidence_in(modules[chosen], bank.plain, labels)
            np.save(folder / "disagreement.npy", disagreement)
        np.save(folder / "assignments.npy", labels)
        np.save(folder / "confidences.npy", confidences)
        return {
            "chosen": chosen,
            "embed_dim": int(bank.plain.shape[1]),
            "num_clusters": recipe.num_clusters,
            "voting": voting,
            "num_merged": sum(head.loss > merged_loss(recipe.num_clusters) for head in heads),
            "modularities": None if choice is None else choice.modularities,
            "losses": [head.loss for head in heads],
            "best_epochs": [head.best_epoch for head in heads],
            "losses_over_time": [_numbers(head.losses) for head in heads],
        }

    return publish(root, HEADS, print_, write)


@torch.inference_mode()
def assign_by_head(head: ClusterHead, features: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A head's cluster of every image and its probability: int64 (N,) and float32 (N,)."""
    labels = np.empty(len(features), np.int64)
    confidences = np.empty(len(features), np.float32)
    for rows, probs in _probabilities(head, features):
        confidence, label = probs.max(dim=1)
        labels[rows], confidences[rows] = label.numpy(), confidence.numpy()
    return labels, confidences


@torch.inference_mode()
def confidence_in(head: ClusterHead, features: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """The probability that a head gives each image's cluster, which others may have chosen, float32, (N,)."""
    confidences = np.empty(len(features), np.float32)
    for rows, probs in _probabilities(head, features):
        confidences[rows] = probs.gather(1, torch.from_numpy(labels[rows])[:, None])[:, 0].numpy()
    return confidences


def _probabilities(head: ClusterHead, features: NDArray[np.floating]) -> Iterator[tuple[slice, Tensor]]:
    """Of every cluster, (n, K), for one block of images after the other."""
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        yield rows, F.softmax(head(torch.from_numpy(np.array(features[rows], np.float32))), dim=1)
