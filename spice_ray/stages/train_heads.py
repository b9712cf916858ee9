"""Stage 2: clustering heads are trained on the frozen embedding by prototype pseudo-labelling (SPICE III-B).

Heads that are trained in one call stand side by side in batched matrix products, which is what a GPU wants; on a CPU
call with one head at a time, and it is the same to the bit whoever trains the others.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.head_losses import cross_entropy_gradient, double_softmax_gradient, negative_entropy_gradient
from spice_ray.core.heads import ClusterHead, HeadStack
from spice_ray.core.order import permutation, stream_key
from spice_ray.core.prototypes import (
    PseudoLabels,
    equal_shares,
    exclusive_labels,
    match_shares,
    overlapping_labels,
    prototypes,
    quotas_of,
)
from spice_ray.core.recorded import Recorded, can_record
from spice_ray.core.unsupervised_loss import BLOCK_ROWS, new_table, unsupervised_loss
from spice_ray.errors import TrainingError
from spice_ray.settings import Heads
from spice_ray.stages.features import Features
from spice_ray.stages.optimizers import keep_on_device

TEMPERATURE = 0.2
"""Of the tempered cross-entropy ablation, in the E-step and the loss alike."""
_ROWS_AT_ONCE = 4096
"""Rows that are judged at once: an actor's peak of memory."""

Classify = Callable[[Tensor], Tensor]
"""From pooled features, (B, D), to logits, (B, K)."""


class TrainedHead(NamedTuple):
    """A head at its best epoch."""

    weights: dict[str, Tensor]
    loss: float
    """Its unsupervised loss (eq. 5, M = N)."""
    best_epoch: int
    losses: list[float]
    """The unsupervised loss after each epoch."""

    def head(self) -> ClusterHead:
        """The head itself, on the CPU."""
        num_clusters, width = self.weights["2.weight"].shape
        head = ClusterHead(width, num_clusters, 0)
        head.load_state_dict(self.weights)
        return head


class HeadProgress(Protocol):
    """What the training of heads needs from whoever runs it: a place to go on from, and somebody to tell."""

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint of these heads, or None at the beginning."""
        ...

    def advance(self, num_epochs: int, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Called after each epoch with the number of those done; saves ``snapshot()`` when a checkpoint is due."""
        ...


def train_heads(
    features: Features,
    indices: Sequence[int],
    settings: Heads,
    *,
    num_clusters: int,
    seed: int,
    train_ids: NDArray[np.int64],
    progress: HeadProgress,
    starts: Sequence[ClusterHead] | None = None,
) -> list[TrainedHead]:
    """Train the heads of these numbers, each of which depends on the run's seed and its own number alone.

    Args:
        features: The shared bank, and where to compute.
        indices: Numbers of the heads, 0..H-1.
        settings: The recipe's stage 2.
        num_clusters: K.
        seed: The run's.
        train_ids: Rows of the bank that may be trained on, int64.
        progress: Where to go on from.
        starts: For each head the one whose probabilities choose the prototypes of its first round; none: its own, whose
            weights are random then.

    Returns:
        For each head the weights of the epoch with the least unsupervised loss, and that loss.

    Raises:
        TrainingError: No epoch's loss of a head is a number.
    """
    group = _Group(features, indices, settings, num_clusters, seed, train_ids, starts)
    state = progress.restore()
    if state is not None:
        group.load(state)
    while group.num_epochs < settings.epochs:
        group.train_epoch()
        progress.advance(group.num_epochs, group.state)
    return group.trained()


class _Group:
    """Heads that are trained side by side."""

    def __init__(
        self,
        features: Features,
        indices: Sequence[int],
        settings: Heads,
        num_clusters: int,
        seed: int,
        train_ids: NDArray[np.int64],
        starts: Sequence[ClusterHead] | None,
    ) -> None:
        heads = [ClusterHead(features.width, num_clusters, stream_key(seed, "head", index)) for index in indices]
        self._features, self._indices, self._settings, self._seed = features, indices, settings, seed
        self._train_ids, self._num_clusters = train_ids, num_clusters
        self._starts = None if starts is None else [start.to(features.device) for start in starts]
        self._stack = HeadStack(heads).to(features.device)
        self._optimizer = torch.optim.Adam(self._stack.parameters(), lr=settings.lr, fused=True)
        self._recorded_on = features.device if can_record(features.device) else None
        keep_on_device(self._optimizer, self._recorded_on)
        fit_batch = partial(_fit_batch, self._stack, self._optimizer, settings)
        self._fit_batch = Recorded(fit_batch, features.device)
        self._losses: list[list[float]] = [[] for _ in indices]
        self._best: list[dict[str, Tensor]] = [{} for _ in indices]

    @property
    def num_epochs(self) -> int:
        return len(self._losses[0])

    def state(self) -> dict[str, Any]:
        return {
            "stack": self._stack.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "losses": self._losses,
            "best": self._best,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._stack.load_state_dict(state["stack"])
        self._optimizer.load_state_dict(state["optimizer"])
        keep_on_device(self._optimizer, self._recorded_on)
        self._losses, self._best = state["losses"], state["best"]

    def train_epoch(self) -> None:
        epoch, round_size = self.num_epochs, min(self._settings.round_size, len(self._train_ids))
        keys = [("head", index, epoch) for index in self._indices]
        orders = [self._train_ids[permutation(stream_key(self._seed, *key), len(self._train_ids))] for key in keys]
        for number in range(len(self._train_ids) // round_size):
            # Sorted, so that a bank on a disk is read from front to back.
            rows = [np.sort(order[number * round_size : (number + 1) * round_size]) for order in orders]
            teachers = [self._teacher(place, is_first=epoch == number == 0) for place in range(len(self._indices))]
            pseudo = [
                label_round(teacher, self._features, own, self._settings, self._num_clusters)
                for teacher, own in zip(teachers, rows, strict=True)
            ]
            round_keys = [stream_key(self._seed, *key, number) for key in keys]
            fit_round(self._fit_batch, self._features, rows, pseudo, self._settings, round_keys)
        for place in range(len(self._indices)):
            self._judge(place)

    def trained(self) -> list[TrainedHead]:
        return [self._trained(place) for place in range(len(self._indices))]

    def _classify(self, place: int) -> Classify:
        return lambda pooled: self._stack.logits_of(place, pooled)

    def _teacher(self, place: int, *, is_first: bool) -> Classify:
        """What chooses the prototypes of a round."""
        return self._starts[place] if is_first and self._starts is not None else self._classify(place)

    def _judge(self, place: int) -> None:
        losses = self._losses[place]
        loss = evaluate_head(self._classify(place), self._features, self._train_ids, self._settings, self._num_clusters)
        if loss < min((known for known in losses if not math.isnan(known)), default=math.inf):
            self._best[place] = self._stack.weights_of(place)
        losses.append(loss)

    def _trained(self, place: int) -> TrainedHead:
        losses, index = self._losses[place], self._indices[place]
        if not self._best[place]:
            raise TrainingError(
                f"head {index} has no loss that is a number in any of its {self._settings.epochs} epochs; lower "
                "heads.lr, or pretrain.lr if the losses of stage 1 are no numbers either"
            )
        loss = min(loss for loss in losses if not math.isnan(loss))
        return TrainedHead(self._best[place], loss, losses.index(loss), losses)


def _fit_batch(
    stack: HeadStack, optimizer: torch.optim.Optimizer, settings: Heads, pooled: Tensor, labels: Tensor
) -> None:
    """One optimiser step of each head, on its features, (H, B, D), and labels, int64, (H, B)."""
    stack.differentiate(pooled, partial(loss_gradient, labels=labels, settings=settings))
    optimizer.step()


@torch.no_grad()
def label_round(
    classify: Classify, features: Features, rows: NDArray[np.int64], settings: Heads, num_clusters: int
) -> PseudoLabels:
    """E-step: probabilities of weak views choose prototypes, prototypes choose the pseudo-labels."""
    logits = classify(features.view(settings.label_view, rows))
    if settings.loss == "tempered":
        logits = logits / TEMPERATURE
    embeddings = features.embedding(rows)
    probs = logits.softmax(dim=1)
    shares = match_shares(shares_of(settings, num_clusters), probs.sum(dim=0))
    quotas = quotas_of(shares, len(rows), confident_fraction=settings.confident_fraction)
    centres = prototypes(embeddings, probs, quotas.confident)
    assign = exclusive_labels if settings.assignment == "exclusive" else overlapping_labels
    return assign(embeddings, centres, quotas.labelled)


def fit_round(
    fit_batch: Callable[[Tensor, Tensor], None],
    features: Features,
    rows: Sequence[NDArray[np.int64]],
    pseudo: Sequence[PseudoLabels],
    settings: Heads,
    keys: Sequence[int],
) -> None:
    """M-step: ``repeats`` passes over the pseudo-labelled rows, each on one of the strong views.

    Args:
        fit_batch: Makes a step of H heads on features, (H, B, D), and labels, int64, (H, B).
        features: The shared bank.
        rows: For each head the rows of the bank in this round, int64, (M,).
        pseudo: For each head the labels of this round, equally many.
        settings: The recipe's stage 2.
        keys: For each head what this round's randomness is counted by.
    """
    for repeat in range(settings.repeats):
        parts = [_pass(features, *of_head, settings, repeat) for of_head in zip(rows, pseudo, keys, strict=True)]
        pooled, labels = (torch.stack(part) for part in zip(*parts, strict=True))
        for batch in zip(
            pooled.split(settings.batch_size, dim=1), labels.split(settings.batch_size, dim=1), strict=True
        ):
            fit_batch(*batch)


@torch.no_grad()
def evaluate_head(
    classify: Classify, features: Features, rows: NDArray[np.int64], settings: Heads, num_clusters: int
) -> float:
    """The unsupervised loss over ``rows``, on plain views."""
    table = new_table(num_clusters, len(rows), features.device)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS)]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        few = slice(start, start + _ROWS_AT_ONCE)
        table[:, few] = classify(features.view("plain", rows[few])).T
    return unsupervised_loss(
        lambda: (features.embedding(rows[block]) for block in blocks),
        table,
        shares_of(settings, num_clusters),
        confident_fraction=settings.confident_fraction,
    )


def shares_of(settings: Heads, num_clusters: int) -> Tensor:
    """What part of the images each cluster has, in no order: the prior, or equal parts; float64, (K,)."""
    if settings.prior is None:
        return equal_shares(num_clusters)
    assert isinstance(settings.prior, tuple), "the prior is estimated before heads are trained"
    return torch.tensor(settings.prior, dtype=torch.float64)


def choose_head(heads: list[TrainedHead]) -> int:
    """The number of the head with the least unsupervised loss; of equals, the lower number."""
    return min(range(len(heads)), key=lambda h: (heads[h].loss, h))


def _pass(
    features: Features, rows: NDArray[np.int64], pseudo: PseudoLabels, key: int, settings: Heads, repeat: int
) -> tuple[Tensor, Tensor]:
    """A head's pooled features and labels for one pass, in the order of the pass."""
    view = stream_key(key, "view", repeat) % features.num_strong
    order = torch.from_numpy(permutation(stream_key(key, "repeat", repeat), len(pseudo.labels))).to(features.device)
    pooled = features.view(settings.train_view, rows, view)
    return pooled[pseudo.indices[order]], pseudo.labels[order]


def loss_gradient(logits: Tensor, labels: Tensor, settings: Heads) -> Tensor:
    """The gradient of each head's mean loss in its logits, (H, B, K), for labels int64 (H, B)."""
    match settings.loss:
        case "double_softmax":
            gradient = double_softmax_gradient(logits, labels)
        case "cross_entropy":
            gradient = cross_entropy_gradient(logits, labels)
        case "tempered":
            gradient = cross_entropy_gradient(logits, labels, temperature=TEMPERATURE)
    if settings.entropy_weight:
        gradient = gradient + settings.entropy_weight * negative_entropy_gradient(logits)
    return gradient
