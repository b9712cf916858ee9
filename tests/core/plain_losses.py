"""The losses of stage 2 as the paper writes them, for autograd: what closed forms and blocks are held against."""

from torch import Tensor
from torch.nn import functional as F


def double_softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's cross-entropy on the softmax of the softmax output (eq. 5), (B,)."""
    return F.cross_entropy(logits.softmax(dim=1), labels, reduction="none")


def negative_entropy(probs: Tensor) -> Tensor:
    """Minus the entropy of the mean prediction, a scalar."""
    mean = probs.mean(dim=0)
    return (mean * mean.clamp_min(1e-12).log()).sum()
