"""The clustering head: a small perceptron on the pooled feature (SPICE III-B)."""

from typing import cast

from torch import Tensor, nn

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
