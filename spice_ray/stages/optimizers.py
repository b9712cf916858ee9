"""The optimisers of stages 1 and 3, and what recorded steps of any stage read of theirs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spice_ray.core.recorded import Recorded, can_record
from spice_ray.settings import Optimizer

ADAM_EPS = 1e-6
"""Torch's 1e-8 lets AdamW step along gradients that are rounding noise, and one and two workers part by more than 1e-4
of the loss within 20 steps of stage 3. On digits 1e-6 keeps them within 1e-5, 1e-7 does not."""


def build_optimizer(
    name: Optimizer,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    nesterov: bool = False,
    all_decay: bool = False,
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; biases and batch-norm weights do not decay, unless all weights do."""
    decayed = [p for p in model.parameters() if p.ndim > 1 or all_decay]
    kept = [p for p in model.parameters() if p.ndim <= 1 and not all_decay]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, eps=ADAM_EPS, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=nesterov, fused=True)


def keep_on_device(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Keep what changes from step to step where a recorded step reads it; none: where others do.

    To be called again when a state was loaded, which may be of another kind of run.
    """
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        group["lr"] = lr if device is None else torch.tensor(lr, device=device)
        if "capturable" in group:
            group["capturable"] = device is not None


def step_of(
    fit: Callable[..., Tensor], optimizer: torch.optim.Optimizer, device: torch.device, *, may_record: bool
) -> Callable[..., Tensor]:
    """What makes the steps of a trainer, to be asked for when its state was loaded.

    Args:
        fit: Makes one step as it stands.
        optimizer: Whose step it is.
        device: Where it is made.
        may_record: Whether a GPU may record it.
    """
    is_recorded = may_record and can_record(device)
    keep_on_device(optimizer, device if is_recorded else None)
    return Recorded(fit, device) if is_recorded else fit


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` for the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
