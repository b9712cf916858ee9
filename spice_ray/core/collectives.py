"""The few collective operations of training: each is the identity where there is one worker.

G lanes are spread over W workers, L = G / W consecutive lanes each. A worker's rows come interleaved, row i * L + l
from its lane l; a global batch is interleaved in the same way over all G lanes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """W, the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, 0..W-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_lanes(rows: Tensor, lanes: int) -> Tensor:
    """All workers' rows as one global batch, the same on every worker.

    Args:
        rows: This worker's rows, (b * L, ...); no gradient flows back.
        lanes: L, this worker's lanes.

    Returns:
        (b * G, ...): row i * G + g is the i-th of lane g.
    """
    return rows if world_size() == 1 else join_lanes(_all_gather(rows), lanes)


def gather_live_lanes(rows: Tensor, lanes: int) -> Tensor:
    """As :func:`gather_lanes`, and this worker's own rows, (b * L, ...) of them, take their gradient."""
    if world_size() == 1:
        return rows
    parts = _all_gather(rows.detach())
    parts[rank()] = rows
    return join_lanes(parts, lanes)


def own_lanes(rows: Tensor, lanes: int) -> Tensor:
    """This worker's part of a global batch: the inverse of :func:`gather_lanes`."""
    return pick_lanes(rows, rank(), world_size(), lanes)


def pick_lanes(rows: Tensor, part: int, parts: int, lanes: int) -> Tensor:
    """The rows, (b * L, ...), of one of ``parts`` groups of L = ``lanes`` lanes each, of (b * parts * L, ...)."""
    if parts == 1:
        return rows
    picked: Tensor = rows.unflatten(0, (-1, parts, lanes))[:, part]
    return picked.flatten(0, 1)


def join_lanes(groups: list[Tensor], lanes: int) -> Tensor:
    """The inverse of :func:`pick_lanes`: groups of ``lanes`` lanes each, interleaved again."""
    if len(groups) == 1:
        return groups[0]
    return torch.stack([group.unflatten(0, (-1, lanes)) for group in groups], dim=1).flatten(0, 2)


def mean_over_workers(x: Tensor) -> Tensor:
    """The mean of ``x`` over all workers."""
    workers = world_size()
    if workers == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / workers


def average_buffers(module: nn.Module) -> None:
    """Make batch-norm statistics equal on all workers: their mean.

    Running statistics are linear in the batches' statistics, so averaging once at the end gives what averaging over
    lanes at every step would have given.
    """
    for buffer in _statistics(module):
        buffer.copy_(mean_over_workers(buffer))


def first_worker_decides(decision: bool, device: torch.device) -> bool:
    """Worker 0's ``decision``, known to all."""
    if world_size() == 1:
        return decision
    flag = torch.tensor([decision], dtype=torch.uint8, device=device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())


def stacked_buffers(module: nn.Module) -> Tensor:
    """Every worker's batch-norm statistics, float32, (W, n): what a checkpoint keeps so that each gets its own back."""
    buffers = _statistics(module)
    if not buffers:  # of a vision transformer
        return torch.empty(world_size(), 0)
    own = torch.cat([buffer.flatten() for buffer in buffers])
    return torch.stack(_all_gather(own)) if world_size() > 1 else own[None].clone()


def restore_buffers(module: nn.Module, stacked: Tensor) -> None:
    """Take back what :func:`stacked_buffers` kept; the mean over workers where their number has changed."""
    own = stacked[rank()] if len(stacked) == world_size() else stacked.mean(dim=0)
    buffers = _statistics(module)
    for buffer, values in zip(buffers, own.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))


def _all_gather(x: Tensor) -> list[Tensor]:
    """Every worker's ``x``, by rank."""
    # gloo, which two workers on one GPU must use, gathers on the CPU alone.
    sent = x.contiguous().cpu() if dist.get_backend() == "gloo" else x.contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return [part.to(x.device) for part in parts]


def _statistics(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]
