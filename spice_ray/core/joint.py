"""Joint training on reliable pseudo-labels (SPICE III-C, eqs. 8-9; FixMatch, Sohn et al. 2020).

B labelled rows, U = mu * B unlabelled rows, K clusters.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.encoders import Encoder
from spice_ray.core.heads import ClusterHead

Threshold = float | Tensor
"""tau, or that of each cluster, (K,)."""


class JointModel(nn.Module):
    """Encoder and head as one classifier; gives cluster logits."""

    def __init__(self, encoder: Encoder, head: ClusterHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Cluster logits, float32, (B, K), of normalised images, (B, 3, S, S)."""
        _, pooled = self.encoder(images)
        return self.head(pooled).float()


def supervised_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of labelled weak views (eq. 8, first term), a scalar.

    Args:
        logits: (B, K).
        labels: int64, (B,).
        weights: float, (B,); 1 each without balancing.
    """
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


def consistency_loss(weak_logits: Tensor, strong_logits: Tensor, confidence: Threshold) -> Tensor:
    """Cross-entropy of strong views with their weak view's confident prediction (eq. 8, second term), a scalar.

    The sum over confident rows is divided by all U rows: unsure rows count zero. No gradient reaches the targets.

    Args:
        weak_logits: (U, K).
        strong_logits: (U, K).
        confidence: tau; a row counts when its largest weak probability is greater.
    """
    is_sure, targets = _sure(weak_logits.detach(), confidence)
    return (is_sure * F.cross_entropy(strong_logits, targets, reduction="none")).mean()


@torch.no_grad()
def agreeing_share(weak_logits: Tensor, strong_logits: Tensor, confidence: float) -> Tensor:
    """Share of unlabelled rows that are confident and whose strong view has the same cluster, a scalar.

    Not in the paper: a sign of progress that needs no label. Arguments as in :func:`consistency_loss`.
    """
    is_sure, targets = _sure(weak_logits, confidence)
    return (is_sure & (strong_logits.argmax(dim=1) == targets)).float().mean()


def _sure(logits: Tensor, confidence: Threshold) -> tuple[Tensor, Tensor]:
    """Whether each row is confident, bool, and its cluster, int64, both (U,)."""
    sureness, targets = logits.softmax(dim=1).max(dim=1)
    return sureness > (confidence[targets] if isinstance(confidence, Tensor) else confidence), targets


class AdaptiveThreshold:
    """Thresholds that follow the model (FreeMatch, Wang et al. 2023, eqs. 5-8): low while it is unsure.

    The threshold of all is the running mean of how sure predictions are, from 1/K on; a cluster's is lower by the ratio
    of its running mean probability to the greatest of all clusters.
    """

    def __init__(self, num_clusters: int, decay: float, device: torch.device) -> None:
        """Begin without knowing anything; ``decay`` is the share of the running means that stays at each step."""
        self._decay = decay
        self.means = torch.full((num_clusters + 1,), 1 / num_clusters, device=device)
        """Running: the mean probability of each cluster, and the mean of the greatest, float32, (K + 1,)."""

    def levels(self) -> Tensor:
        """Each cluster's tau, (K,)."""
        probs = self.means[:-1]
        return self.means[-1] * probs / probs.max()

    def update(self, means: Tensor) -> None:
        """Take in what :func:`prediction_means` gave of a global batch, (K + 1,)."""
        self.means.lerp_(means, 1 - self._decay)


@torch.no_grad()
def prediction_means(weak_logits: Tensor) -> Tensor:
    """The mean probability of each cluster, and the mean of each row's greatest, (K + 1,)."""
    probs = weak_logits.softmax(dim=1)
    return torch.cat([probs.mean(dim=0), probs.amax(dim=1).mean()[None]])


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Average the weights, and the batch-norm statistics with them: those of the last steps are of other weights.

    The published code copies statistics that follow so slowly themselves (batch norm's momentum is 1 - ``decay``).
    """
    pairs = [*zip(ema.parameters(), model.parameters(), strict=True), *zip(ema.buffers(), model.buffers(), strict=True)]
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([old for old, _ in averaged], [new for _, new in averaged], 1 - decay)
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    if counts:  # of batches; a vision transformer has none
        torch._foreach_copy_([old for old, _ in counts], [new for _, new in counts])


def seven_sixteenths_cosine(step: int, total: int) -> float:
    """FixMatch's share of the learning rate: cos(7 pi step / (16 total)), from 1 down to 0.195."""
    return math.cos(7 * math.pi * step / (16 * total))
