"""Stage 2: clustering heads are trained on the frozen embedding by prototype pseudo-labelling (SPICE III-B)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from spice_ray.config import Heads
from spice_ray.contracts import Bank
from spice_ray.core.heads import ClusterHead
from spice_ray.core.order import permutation, stream_key
from spice_ray.core.prototypes import (
    PseudoLabels,
    double_softmax_loss,
    exclusive_labels,
    negative_entropy,
    overlapping_labels,
    prototypes,
    unsupervised_loss,
)
from spice_ray.errors import TrainingError

TEMPERATURE = 0.2
"""Of the tempered cross-entropy ablation, in the E-step and the loss alike."""


class TrainedHead(NamedTuple):
    """A head at its best epoch."""

    weights: dict[str, Tensor]
    loss: float
    """Its unsupervised loss (eq. 5, M = N)."""
    best_epoch: int
    losses: list[float]
    """The unsupervised loss after each epoch."""


def train_head(
    bank: Bank,
    index: int,
    settings: Heads,
    *,
    num_clusters: int,
    seed: int,
    device: torch.device,
    train_ids: NDArray[np.int64],
    on_epoch: Callable[[], None],
) -> TrainedHead:
    """Train head number ``index``, which depends on the run's seed and its own number alone.

    Args:
        bank: The shared features; only ever gathered from.
        index: h, 0..H-1.
        settings: The recipe's stage 2.
        num_clusters: K.
        seed: The run's.
        device: Where to compute.
        train_ids: Rows of the bank that may be trained on, int64.
        on_epoch: Called after each epoch.

    Returns:
        The weights of the epoch with the least unsupervised loss, and that loss.

    Raises:
        TrainingError: No epoch's loss is a number.
    """
    head = ClusterHead(bank.plain.shape[1], num_clusters, stream_key(seed, "head", index)).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr)
    round_size = min(settings.round_size, len(train_ids))
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    best_loss = math.inf
    for epoch in range(settings.epochs):
        order = train_ids[permutation(stream_key(seed, "head", index, epoch), len(train_ids))]
        for number in range(len(order) // round_size):
            rows = order[number * round_size : (number + 1) * round_size]
            pseudo = label_round(head, bank, rows, settings)
            key = stream_key(seed, "head", index, epoch, number)
            fit_round(head, optimizer, bank, rows, pseudo, settings, key)
        losses.append(evaluate_head(head, bank, train_ids, settings.confident_fraction))
        if losses[-1] < best_loss:
            best_loss = losses[-1]
            best = {name: weight.detach().cpu().clone() for name, weight in head.state_dict().items()}
        on_epoch()
    if not best:
        raise TrainingError(
            f"head {index} has no loss that is a number in any of its {settings.epochs} epochs; lower heads.lr, or "
            "pretrain.lr if the losses of stage 1 are no numbers either"
        )
    return TrainedHead(best, best_loss, losses.index(best_loss), losses)


@torch.no_grad()
def label_round(head: ClusterHead, bank: Bank, rows: NDArray[np.int64], settings: Heads) -> PseudoLabels:
    """E-step: probabilities of weak views choose prototypes, prototypes choose the pseudo-labels."""
    device = next(head.parameters()).device
    logits = head(_gather(bank.weak, rows, device))
    if settings.loss == "tempered":
        logits = logits / TEMPERATURE
    embeddings = _gather(bank.embedding, rows, device)
    centres = prototypes(embeddings, logits.softmax(dim=1), confident_fraction=settings.confident_fraction)
    assign = exclusive_labels if settings.assignment == "exclusive" else overlapping_labels
    return assign(embeddings, centres)


def fit_round(
    head: ClusterHead,
    optimizer: torch.optim.Optimizer,
    bank: Bank,
    rows: NDArray[np.int64],
    pseudo: PseudoLabels,
    settings: Heads,
    key: int,
) -> None:
    """M-step: ``repeats`` passes over the pseudo-labelled rows, each on one of the strong views."""
    device = next(head.parameters()).device
    indices, labels = pseudo.indices.cpu().numpy(), pseudo.labels
    for repeat in range(settings.repeats):
        view = bank.strong[stream_key(key, "view", repeat) % len(bank.strong)]
        order = permutation(stream_key(key, "repeat", repeat), len(indices))
        for start in range(0, len(order), settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            logits = head(_gather(view, rows[indices[chosen]], device))
            loss = _loss(logits, labels[torch.from_numpy(chosen).to(device)], settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def evaluate_head(head: ClusterHead, bank: Bank, rows: NDArray[np.int64], confident_fraction: float) -> float:
    """The unsupervised loss over ``rows``, on plain views."""
    device = next(head.parameters()).device
    embeddings = _gather(bank.embedding, rows, device)
    logits = head(_gather(bank.plain, rows, device))
    return float(unsupervised_loss(embeddings, logits, confident_fraction=confident_fraction))


def choose_head(heads: list[TrainedHead]) -> int:
    """The number of the head with the least unsupervised loss; of equals, the lower number."""
    return min(range(len(heads)), key=lambda h: (heads[h].loss, h))


def _loss(logits: Tensor, labels: Tensor, settings: Heads) -> Tensor:
    match settings.loss:
        case "double_softmax":
            loss = double_softmax_loss(logits, labels).mean()
        case "cross_entropy":
            loss = F.cross_entropy(logits, labels)
        case "tempered":
            loss = F.cross_entropy(logits / TEMPERATURE, labels)
    if settings.entropy_weight:
        loss = loss + settings.entropy_weight * negative_entropy(logits.softmax(dim=1))
    return loss


def _gather(array: NDArray[np.float32], rows: NDArray[np.int64], device: torch.device) -> Tensor:
    # Fancy indexing copies: the bank is shared memory and must never be written through a tensor.
    return torch.from_numpy(array[rows]).to(device, non_blocking=True)
