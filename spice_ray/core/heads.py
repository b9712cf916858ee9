"""The clustering head: a small perceptron on the pooled feature (SPICE III-B)."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.order import seeded


class ClusterHead(nn.Sequential):
    """Linear(D, D), ReLU, Linear(D, K): cluster logits from pooled features."""

    def __init__(self, embed_dim: int, num_clusters: int, key: int) -> None:
        """Draw the initial weights from ``key`` alone."""
        self.num_clusters = num_clusters
        with seeded(key):
            super().__init__(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, num_clusters))

    def __call__(self, pooled: Tensor) -> Tensor:
        """Logits, (B, K), of pooled features, (B, D)."""
        return cast(Tensor, super().__call__(pooled))

    @torch.no_grad()
    def reorder(self, columns: Tensor) -> None:
        """Call cluster ``columns[k]`` k from now on; int64, (K,)."""
        last = cast(nn.Linear, self[2])
        last.weight.copy_(last.weight[columns])
        last.bias.copy_(last.bias[columns])


class HeadStack(nn.Module):
    """Heads of one shape side by side, each with its own input: batched matrix products."""

    def __init__(self, heads: Sequence[ClusterHead]) -> None:
        """Copy the weights of ``heads``, at least one."""
        super().__init__()
        weights = [torch.stack(same) for same in zip(*(head.parameters() for head in heads), strict=True)]
        self.weight1, self.bias1, self.weight2, self.bias2 = (nn.Parameter(weight.detach()) for weight in weights)

    @torch.no_grad()
    def differentiate(self, pooled: Tensor, gradient_of: Callable[[Tensor], Tensor]) -> None:
        """Set the gradient of every weight, as backward would, in a third of the calls.

        Args:
            pooled: Features, (H, B, D).
            gradient_of: From logits, (H, B, K), to the gradient of the loss in them.
        """
        weight1, bias1, weight2, bias2 = self._weights()
        # One head alone: plain products are faster than batched ones of one batch.
        rows = pooled[0] if pooled.shape[0] == 1 else pooled
        hidden = (rows @ weight1.mT).add_(bias1).relu_()
        logits = (hidden @ weight2.mT).add_(bias2)
        of_logits = gradient_of(logits.view(len(pooled), -1, weight2.shape[-2])).view_as(logits)
        # The sign is the derivative of the rectified, and gradients are finite; masked_fill_ is not vectorised.
        of_hidden = (of_logits @ weight2).mul_(hidden.sign())
        found = of_hidden.mT @ rows, of_hidden.sum(dim=-2), of_logits.mT @ hidden, of_logits.sum(dim=-2)
        for weight, gradient in zip(self.parameters(), found, strict=True):
            weight.grad = gradient.view_as(weight)

    def logits_of(self, place: int, pooled: Tensor) -> Tensor:
        """Logits, (B, K), of one head for pooled features, (B, D)."""
        weight1, bias1, weight2, bias2 = (weight[place] for weight in self.parameters())
        return F.linear(F.linear(pooled, weight1, bias1).relu_(), weight2, bias2)

    def weights_of(self, place: int) -> dict[str, Tensor]:
        """A copy of one head's weights on the CPU, named as :class:`ClusterHead` names them."""
        weights = (weight[place].detach().cpu().clone() for weight in self.parameters())
        return dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), weights, strict=True))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As products take them: without the leading 1 of one head alone, biases with a place for the rows."""
        if len(self.weight1) == 1:
            return self.weight1[0], self.bias1[0], self.weight2[0], self.bias2[0]
        return self.weight1, self.bias1[:, None], self.weight2, self.bias2[:, None]
