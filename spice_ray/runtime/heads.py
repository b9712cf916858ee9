"""Stage 2 on Ray: heads as parallel actors on one bank in the object store."""

from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional as F

from spice_ray.config import Recipe, Scale
from spice_ray.contracts import HEADS, Bank
from spice_ray.core.heads import ClusterHead
from spice_ray.runtime.cluster import room
from spice_ray.runtime.progress import ProgressWriter
from spice_ray.runtime.weights import load_weights, save_weights
from spice_ray.stages.train_heads import TrainedHead, choose_head, train_head
from spice_ray.storage import Artifact, publish, read_json, write_json

_RETRIES = 3
_ROWS_AT_ONCE = 8192
Shared = tuple["ray.ObjectRef[NDArray[np.float32]]", tuple[int, ...]]
"""An array in the object store, and the shape in which it is used."""


class HeadActor:
    """Trains heads, one after the other."""

    def __init__(self, recipe: Recipe, scale: Scale, progress: Path, writer: str, num_heads: int) -> None:
        torch.set_num_threads(scale.cpus_per_worker)
        self._recipe = recipe
        self._device = torch.device("cuda" if scale.head_gpus else "cpu")
        self._writer = ProgressWriter(progress, writer)
        self._done, self._total = 0, num_heads * recipe.heads.epochs
        self._writer.write(self._done, self._total)

    def train(self, bank: "list[Shared]", index: int, train_ids: NDArray[np.int64]) -> TrainedHead:
        """Train head number ``index`` on the shared bank."""
        recipe = self._recipe
        return train_head(
            Bank(*(ray.get(ref).reshape(shape) for ref, shape in bank)),
            index,
            recipe.heads,
            num_clusters=recipe.num_clusters,
            seed=recipe.seed,
            device=self._device,
            train_ids=train_ids,
            on_epoch=self._report,
        )

    def _report(self) -> None:
        self._done += 1
        self._writer.write(self._done, self._total)


def open_bank(embedding: Artifact) -> Bank:
    """The bank of an embedding store, mapped; where it has no views, the plain feature stands for them."""
    arrays = {name: np.load(embedding.file(f"{name}.npy"), mmap_mode="r") for name in ("embedding", "plain")}
    if embedding.manifest["views"] == 0:
        return Bank(**arrays, weak=arrays["plain"], strong=arrays["plain"][None])
    return Bank(
        **arrays, **{name: np.load(embedding.file(f"{name}.npy"), mmap_mode="r") for name in ("weak", "strong")}
    )


def share(bank: Bank) -> list[Shared]:
    """Put the bank into the object store; arrays that are views of the same memory once."""
    refs: dict[int, ray.ObjectRef[NDArray[np.float32]]] = {}
    for array in bank:
        address = array.__array_interface__["data"][0]
        if address not in refs:
            refs[address] = ray.put(np.asarray(array))
    return [(refs[array.__array_interface__["data"][0]], array.shape) for array in bank]


def num_actors(recipe: Recipe, scale: Scale, num_heads: int) -> int:
    """One actor per head where the cluster has room, else as many as there is room for."""
    return max(1, min(scale.head_actors or num_heads, num_heads, room(scale.cpus_per_worker, scale.head_gpus)))


def train_heads(
    recipe: Recipe, scale: Scale, bank: Bank, train_ids: NDArray[np.int64], progress: Path, finished: Path
) -> list[TrainedHead]:
    """Train all heads; which actor trains a head has no influence on it.

    Heads that were trained are kept in the folder ``finished``, and those found there are not trained again.
    """
    heads = {index: head for index in range(recipe.heads.count) if (head := _read_head(finished, index)) is not None}
    missing = [index for index in range(recipe.heads.count) if index not in heads]
    if missing:
        refs = share(bank)
        count = num_actors(recipe, scale, len(missing))
        remote = ray.remote(HeadActor).options(
            num_cpus=scale.cpus_per_worker,
            num_gpus=scale.head_gpus,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
        shares = [missing[first::count] for first in range(count)]
        actors = [remote.remote(recipe, scale, progress, f"actor-{n}", len(share)) for n, share in enumerate(shares)]
        running = {
            a.train.remote(refs, h, train_ids): h for a, share in zip(actors, shares, strict=True) for h in share
        }
        while running:
            (ready, *_), _ = ray.wait(list(running))
            index = running.pop(ready)
            heads[index] = ray.get(ready)
            _keep_head(finished, index, heads[index])
    return [heads[index] for index in range(recipe.heads.count)]


def _keep_head(folder: Path, index: int, head: TrainedHead) -> None:
    record = {"loss": head.loss, "best_epoch": head.best_epoch, "losses": head.losses}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head.weights, folder / f"{index:03d}.safetensors")
    write_json(folder / f"{index:03d}.json", record)  # last: its presence means complete


def _read_head(folder: Path, index: int) -> TrainedHead | None:
    record = folder / f"{index:03d}.json"
    if not record.is_file():
        return None
    return TrainedHead(load_weights(folder / f"{index:03d}.safetensors"), **read_json(record))


def publish_heads(root: Path, print_: str, recipe: Recipe, bank: Bank, heads: list[TrainedHead]) -> Artifact:
    """Publish the ensemble with the chosen head's assignment of every image (SPICE_s)."""
    chosen = choose_head(heads)
    modules = [_head(trained, bank.plain.shape[1], recipe.num_clusters) for trained in heads]

    def write(folder: Path) -> dict[str, Any]:
        for index, module in enumerate(modules):
            save_weights(module, folder / f"head-{index:03d}.safetensors")
        labels, confidences = assign_by_head(modules[chosen], bank.plain)
        np.save(folder / "assignments.npy", labels)
        np.save(folder / "confidences.npy", confidences)
        return {
            "chosen": chosen,
            "embed_dim": int(bank.plain.shape[1]),
            "num_clusters": recipe.num_clusters,
            "losses": [head.loss for head in heads],
            "best_epochs": [head.best_epoch for head in heads],
            "losses_over_time": [head.losses for head in heads],
        }

    return publish(root, HEADS, print_, write)


@torch.inference_mode()
def assign_by_head(head: ClusterHead, features: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A head's cluster of every image and its probability: int64 (N,) and float32 (N,)."""
    labels = np.empty(len(features), np.int64)
    confidences = np.empty(len(features), np.float32)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        probs = F.softmax(head(torch.from_numpy(np.array(features[rows]))), dim=1)
        confidence, label = probs.max(dim=1)
        labels[rows], confidences[rows] = label.numpy(), confidence.numpy()
    return labels, confidences


def _head(trained: TrainedHead, embed_dim: int, num_clusters: int) -> ClusterHead:
    head = ClusterHead(embed_dim, num_clusters, 0)
    head.load_state_dict(trained.weights)
    return head
