"""The clustering head: a small perceptron on the pooled feature (SPICE III-B)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.order import seeded


class ClusterHead(nn.Sequential):
    """Linear(D, D), ReLU, Linear(D, K): cluster logits from pooled features."""

    def __init__(self, embed_dim: int, num_clusters: int, key: int) -> None:
        """Draw the initial weights from ``key`` alone."""
        with seeded(key):
            super().__init__(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, num_clusters))

    def __call__(self, pooled: Tensor) -> Tensor:
        """Logits, (B, K), of pooled features, (B, D)."""
        return cast(Tensor, super().__call__(pooled))


class HeadStack(nn.Module):
    """Heads of one shape side by side, each with its own input: batched matrix products."""

    def __init__(self, heads: Sequence[ClusterHead]) -> None:
        """Copy the weights of ``heads``, at least one."""
        super().__init__()
        weights = [torch.stack(same) for same in zip(*(head.parameters() for head in heads), strict=True)]
        self.weight1, self.bias1, self.weight2, self.bias2 = (nn.Parameter(weight.detach()) for weight in weights)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits, (H, B, K), of pooled features, (H, B, D)."""
        if len(pooled) == 1:
            # Views without the leading 1: plain products are a tenth faster than batched ones of one batch.
            weights = (weight.squeeze(0) for weight in self.parameters())
            return _perceptron(pooled[0], *weights)[None]
        hidden = torch.baddbmm(self.bias1[:, None], pooled, self.weight1.mT).relu_()
        return torch.baddbmm(self.bias2[:, None], hidden, self.weight2.mT)

    def logits_of(self, place: int, pooled: Tensor) -> Tensor:
        """Logits, (B, K), of one head for pooled features, (B, D)."""
        return _perceptron(pooled, *(weight[place] for weight in self.parameters()))

    def weights_of(self, place: int) -> dict[str, Tensor]:
        """A copy of one head's weights on the CPU, named as :class:`ClusterHead` names them."""
        weights = (weight[place].detach().cpu().clone() for weight in self.parameters())
        return dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), weights, strict=True))


def _perceptron(pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.linear(pooled, weight1, bias1).relu_(), weight2, bias2)
