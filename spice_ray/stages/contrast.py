"""What stage 1 asks of two views: the contrastive losses behind one training loop.

b rows of each of a worker's L lanes, G lanes in all, P projection width.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spice_ray.core import collectives
from spice_ray.core.byol import PredictingEncoder, prediction_loss
from spice_ray.core.encoders import build_encoder, set_lanes
from spice_ray.core.moco import KeyQueue, Model, ProjectedEncoder, info_nce, momentum_copy, update_momentum
from spice_ray.core.order import permutation, stream_key
from spice_ray.core.simclr import nt_xent
from spice_ray.settings import Pretrain
from spice_ray.stages.accumulation import Parts


class Direction(NamedTuple):
    """Views whose projections are trained, and what these have to meet."""

    views: list[Tensor]
    """One or two, normalised images, (b * L, 3, S, S)."""
    targets: Tensor | None
    """Unit rows without gradient, (b * L, P); None: the two views have to meet each other."""


class Contrast(Protocol):
    """A contrastive loss and the models that it needs."""

    query: ProjectedEncoder | PredictingEncoder
    """What is trained: gives unit rows."""

    @property
    def models(self) -> list[nn.Module]:
        """All that compute in a step."""
        ...

    def of_step(self, step: int, total: int) -> list[Tensor]:
        """What follows from the number of a step, counted from 0, of so many; on the device."""
        ...

    def directions(self, first: Tensor, second: Tensor, *of_step: Tensor) -> list[Direction]:
        """What to train on two views, (b * L, 3, S, S) each, and what ``of_step`` gave; losses of directions add up."""
        ...

    def loss(self, projected: list[Tensor], targets: Tensor | None) -> Tensor:
        """Mean loss of rows of one part, a scalar; ``projected`` are the query's rows of each view."""
        ...

    def conclude(self) -> None:
        """The optimiser has made its step."""
        ...

    def state(self) -> dict[str, Any]:
        """What later steps depend on, beside the query."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        ...


class MomentumEncoder(Generic[Model]):
    """A copy of the query that follows it (MoCo, eq. 2)."""

    def __init__(self, query: Model, parts: Parts) -> None:
        self.model = momentum_copy(query)
        set_lanes(self.model, parts.lanes_each)

    def state(self) -> dict[str, Any]:
        """Weights, and each worker's batch-norm statistics."""
        buffers = collectives.stacked_buffers(self.model)
        return {"momentum_encoder": self.model.state_dict(), "momentum_buffers": buffers}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.model.load_state_dict(state["momentum_encoder"])
        collectives.restore_buffers(self.model, state["momentum_buffers"])


class MoCo:
    """MoCo-v2 (SPICE III-A, eq. 1): keys of a momentum encoder, told from a queue of other images' keys."""

    def __init__(self, settings: Pretrain, parts: Parts, seed: int, device: torch.device) -> None:
        assert settings.queue_size is not None
        self.settings, self.parts, self.seed = settings, parts, seed
        self.query: ProjectedEncoder | PredictingEncoder = _projected_encoder(settings, seed).to(device)
        self.momentum_encoder = MomentumEncoder(self.query, parts)
        self.queue = KeyQueue(settings.queue_size, settings.projection_dim, stream_key(seed, "queue"), device)
        self.new_keys: list[Tensor] = []
        self.device = device

    @property
    def models(self) -> list[nn.Module]:
        """The query and the momentum encoder."""
        return [self.query, self.momentum_encoder.model]

    def of_step(self, step: int, total: int) -> list[Tensor]:
        """The order in which keys are encoded, int64, (b * G,)."""
        order = permutation(stream_key(self.seed, "shuffle", step), self.settings.batch_size)
        return [torch.from_numpy(order).to(self.device, non_blocking=True)]

    def directions(self, first: Tensor, second: Tensor, *of_step: Tensor) -> list[Direction]:
        """The first view's queries look for the second's keys, and the other way round where the loss is symmetric."""
        assert self.settings.momentum is not None
        (shuffle,) = of_step
        update_momentum(self.momentum_encoder.model, self.query, 1 - self.settings.momentum)
        pairs = [(first, second), (second, first)] if self.settings.symmetric else [(first, second)]
        self.new_keys = [self.encode_keys(shuffle, positives) for _, positives in pairs]
        own = [collectives.own_lanes(keys, self.parts.lanes) for keys in self.new_keys]
        return [Direction([queries], keys) for (queries, _), keys in zip(pairs, own, strict=True)]

    def loss(self, projected: list[Tensor], targets: Tensor | None) -> Tensor:
        """InfoNCE."""
        assert targets is not None
        assert self.settings.temperature is not None
        return info_nce(projected[0], targets, self.queue.keys, self.settings.temperature)

    def conclude(self) -> None:
        """The new keys replace the oldest."""
        for keys in self.new_keys:
            self.queue.push(keys)

    @torch.no_grad()
    def encode_keys(self, shuffle: Tensor, views: Tensor) -> Tensor:
        """The keys of the global batch, (b * G, P), each normalised among other rows than its query (shuffled BN)."""
        served = self.parts.lanes
        gathered = collectives.gather_lanes(views, served)
        own = collectives.own_lanes(gathered[shuffle], served)
        shuffled = self.parts.join([self.momentum_encoder.model(rows) for rows in self.parts.split(own)])
        keys = collectives.gather_lanes(shuffled, served)
        return torch.empty_like(keys).index_copy_(0, shuffle, keys)

    def state(self) -> dict[str, Any]:
        """The momentum encoder and the queue."""
        queue = {"queue": self.queue.keys, "queue_position": self.queue.position}
        return {**self.momentum_encoder.state(), **queue}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.momentum_encoder.restore(state)
        self.queue.keys.copy_(state["queue"])
        self.queue.position.copy_(state["queue_position"])


class Byol:
    """BYOL: predictions meet the momentum encoder's projections of the other view."""

    def __init__(self, settings: Pretrain, parts: Parts, seed: int, device: torch.device) -> None:
        self.settings, self.parts = settings, parts
        encoder = build_encoder(settings.encoder, stream_key(seed, "encoder"))
        predicting = PredictingEncoder(encoder, settings.projection_dim, stream_key(seed, "projector")).to(device)
        self.query: ProjectedEncoder | PredictingEncoder = predicting
        self.momentum_encoder = MomentumEncoder(predicting, parts)
        self.device = device

    @property
    def models(self) -> list[nn.Module]:
        """The query and the momentum encoder."""
        return [self.query, self.momentum_encoder.model]

    def of_step(self, step: int, total: int) -> list[Tensor]:
        """By what share of the way the momentum encoder follows, less from step to step, a scalar."""
        assert self.settings.momentum is not None
        share = (1 - self.settings.momentum) * (1 + math.cos(math.pi * step / total)) / 2
        return [torch.tensor(share).to(self.device, non_blocking=True)]

    def directions(self, first: Tensor, second: Tensor, *of_step: Tensor) -> list[Direction]:
        """Each view's prediction meets the other's projection."""
        (share,) = of_step
        update_momentum(self.momentum_encoder.model, self.query, share)
        return [Direction([first], self.project(second)), Direction([second], self.project(first))]

    @torch.no_grad()
    def project(self, views: Tensor) -> Tensor:
        """The momentum encoder's projections, (b * L, P)."""
        return self.parts.join([self.momentum_encoder.model.project(rows) for rows in self.parts.split(views)])

    def loss(self, projected: list[Tensor], targets: Tensor | None) -> Tensor:
        """The mean squared distance."""
        assert targets is not None
        return prediction_loss(projected[0], targets)

    def conclude(self) -> None:
        """Nothing is left to do."""

    def state(self) -> dict[str, Any]:
        """The momentum encoder."""
        return self.momentum_encoder.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.momentum_encoder.restore(state)


class SimClr:
    """SimCLR: both views are trained, and told from all other views of the global batch."""

    def __init__(self, settings: Pretrain, parts: Parts, seed: int, device: torch.device) -> None:
        self.settings, self.parts = settings, parts
        self.query: ProjectedEncoder | PredictingEncoder = _projected_encoder(settings, seed).to(device)

    @property
    def models(self) -> list[nn.Module]:
        """The query."""
        return [self.query]

    def of_step(self, step: int, total: int) -> list[Tensor]:
        """Nothing."""
        return []

    def directions(self, first: Tensor, second: Tensor, *of_step: Tensor) -> list[Direction]:
        """Both views meet each other."""
        return [Direction([first, second], None)]

    def loss(self, projected: list[Tensor], targets: Tensor | None) -> Tensor:
        """NT-Xent over the global batch, the same on all workers."""
        assert self.settings.temperature is not None
        first, second = (collectives.gather_live_lanes(rows, self.parts.lanes) for rows in projected)
        loss = nt_xent(first, second, self.settings.temperature)
        # Each worker's gradient is of its own rows alone: their sum is wanted, and DDP takes the mean.
        return loss.detach() + collectives.world_size() * (loss - loss.detach())

    def conclude(self) -> None:
        """Nothing is left to do."""

    def state(self) -> dict[str, Any]:
        """There is nothing beside the query."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """There is nothing beside the query."""


def _projected_encoder(settings: Pretrain, seed: int) -> ProjectedEncoder:
    encoder = build_encoder(settings.encoder, stream_key(seed, "encoder"))
    return ProjectedEncoder(encoder, settings.projection_dim, stream_key(seed, "projector"))


CONTRASTS: dict[str, Callable[[Pretrain, Parts, int, torch.device], Contrast]] = {
    "moco": MoCo,
    "byol": Byol,
    "simclr": SimClr,
}
