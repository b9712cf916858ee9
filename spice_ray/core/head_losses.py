"""What heads learn from pseudo-labels (SPICE eq. 5 and its ablations), and its gradient in closed form.

H heads, B samples of each, K clusters. A head's loss is the mean over its samples, so that none depends on another.
"""

import torch
from torch import Tensor


def cross_entropy_gradient(logits: Tensor, labels: Tensor, *, temperature: float = 1) -> Tensor:
    """Of the cross-entropy on ``logits / temperature``, (H, B, K).

    Args:
        logits: (H, B, K).
        labels: int64, (H, B).
        temperature: T; 1 is plain cross-entropy.
    """
    return _less_one(torch.softmax(logits / temperature, dim=-1), labels).div_(temperature * logits.shape[-2])


def double_softmax_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the cross-entropy on the softmax of the softmax output (eq. 5), (H, B, K); arguments as above."""
    probs = logits.softmax(dim=-1)
    of_probs = _less_one(probs.softmax(dim=-1), labels).div_(logits.shape[-2])
    return _through_softmax(of_probs, probs)


def negative_entropy_gradient(logits: Tensor) -> Tensor:
    """Of minus the entropy of the mean prediction, (H, B, K)."""
    probs = logits.softmax(dim=-1)
    of_mean = probs.mean(dim=-2, keepdim=True).clamp_min(1e-12).log_().add_(1)
    return _through_softmax((of_mean / logits.shape[-2]).expand_as(probs), probs)


def _less_one(probs: Tensor, labels: Tensor) -> Tensor:
    """Take 1 from the probability of each label, in place."""
    return probs.scatter_add_(-1, labels[..., None], probs.new_full((1, 1, 1), -1).expand(*labels.shape, 1))


def _through_softmax(of_probs: Tensor, probs: Tensor) -> Tensor:
    """The gradient in the logits from that in the probabilities."""
    product = of_probs * probs
    return product - probs * product.sum(dim=-1, keepdim=True)
