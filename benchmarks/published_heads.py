"""No benchmark: stage 2 as it was published, written plainly from a description of its behaviour.

What the description says and this follows:

- A head is Linear, ReLU, Linear and softmax, on the pooled feature, which is not normalised. Its loss is the
  cross-entropy of those probabilities (a softmax twice). Adam at 0.005, constant, no weight decay.
- An epoch has N // M steps of expectation and maximisation (EM). The M images of one get one weak and one strong view,
  shared by all heads; the strong one is used again in each of 8 repeats.
- Expectation: the weak views are encoded in chunks. For each head and cluster the half of M / K images with the highest
  probability are averaged, in normalised features of plain views that were made once, and the M / K images nearest to
  that average get the cluster's label. An image may get several labels.
- Maximisation: whole batches of 128 labelled images (39 of M = 5,000) for each head. The encoder, without gradients, is
  part of every forward pass: of every head, in every batch, in every repeat.
- After each epoch every head's loss is that of the same procedure once over all plain views. Of all epochs and heads
  the least one counts.

In one thing this departs: batch norm stays in eval mode. In the published loop it takes the statistics of each batch of
strong views and moves the running ones, so that the features drift away from those that were made once. And it is
spared what it need not pay for here: plain views are encoded once and not after each epoch, and all views are made by
our augmentation.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import Encoder
from spice_ray.core.order import stream_key
from spice_ray.settings import Heads

CHUNK = 100


class Views(NamedTuple):
    """The M images of an EM step."""

    weak: Tensor
    """(M, 3, S, S)."""
    strong: Tensor
    """(M, 3, S, S)."""
    embeddings: Tensor
    """Unit rows of plain views, (M, D)."""


class Labelled(NamedTuple):
    """What a head is taught in an EM step."""

    indices: Tensor
    labels: Tensor


def new_heads(count: int, width: int, num_clusters: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_clusters)) for _ in range(count)
    )


@torch.no_grad()
def encode(encoder: Encoder, images: Tensor, rows: int = CHUNK) -> Tensor:
    """Pooled features of views, (rows, D)."""
    return torch.cat([encoder(chunk)[1] for chunk in images.split(rows)])


@torch.no_grad()
def label(head: nn.Module, pooled: Tensor, embeddings: Tensor, confident_fraction: float) -> Labelled:
    probs = head(pooled).softmax(dim=1)
    per_cluster = len(probs) // probs.shape[1]
    num_confident = max(1, int(confident_fraction * len(probs) / probs.shape[1]))
    indices, labels = [], []
    for cluster in range(probs.shape[1]):
        confident = probs[:, cluster].topk(num_confident).indices
        similarity = embeddings @ embeddings[confident].mean(dim=0)
        indices.append(similarity.topk(per_cluster).indices)
        labels.append(torch.full_like(indices[-1], cluster))
    return Labelled(torch.cat(indices), torch.cat(labels))


def em_step(
    encoder: Encoder, heads: nn.ModuleList, optimizer: torch.optim.Optimizer, views: Views, settings: Heads
) -> None:
    """One step of expectation and maximisation of all heads."""
    pooled = encode(encoder, views.weak)
    taught = [label(head, pooled, views.embeddings, settings.confident_fraction) for head in heads]
    for _ in range(settings.repeats):
        orders = [torch.randperm(len(each.indices), device=pooled.device) for each in taught]
        for batch in range(len(orders[0]) // settings.batch_size):
            rows = slice(batch * settings.batch_size, (batch + 1) * settings.batch_size)
            losses = []
            for head, each, order in zip(heads, taught, orders, strict=True):
                features = encode(encoder, views.strong[each.indices[order[rows]]], settings.batch_size)
                losses.append(F.cross_entropy(head(features).softmax(dim=1), each.labels[order[rows]]))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()


@torch.no_grad()
def selection_loss(head: nn.Module, plain: Tensor, embeddings: Tensor, confident_fraction: float) -> float:
    taught = label(head, plain, embeddings, confident_fraction)
    return float(F.cross_entropy(head(plain[taught.indices]).softmax(dim=1), taught.labels))


def train(
    encoder: Encoder, images: Tensor, views: Augmentation, settings: Heads, *, num_clusters: int, seed: int
) -> Tensor:
    """Train all heads on images, uint8, (N, 3, S, S); gives the chosen head's clusters, (N,)."""
    torch.manual_seed(seed)
    encoder.eval()
    plain = encode(encoder, views.plain(images))
    embeddings = F.normalize(plain, dim=1)
    heads = new_heads(settings.count, plain.shape[1], num_clusters).to(images.device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=settings.lr)
    round_size = min(settings.round_size, len(images))
    least, clusters = float("inf"), torch.zeros(len(images), dtype=torch.int64)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(images), device=images.device)
        for number in range(len(images) // round_size):
            rows = order[number * round_size : (number + 1) * round_size]
            weak, strong = (stream_key(seed, "published", kind, epoch, number) for kind in ("weak", "strong"))
            made = Views(
                views.weak(images[rows], rows, weak), views.strong(images[rows], rows, strong), embeddings[rows]
            )
            em_step(encoder, heads, optimizer, made, settings)
        for head in heads:
            loss = selection_loss(head, plain, embeddings, settings.confident_fraction)
            if loss < least:
                least, clusters = loss, head(plain).argmax(dim=1).cpu()
    return clusters
