"""No benchmark: the loops that ``pretrain.py lightly`` compares, each a side that takes turns.

Ours is stage 1 as it runs, fed from memory. lightly's is written along its documentation: its transform in a torch
DataLoader over PIL images in memory, its projector, loss with a memory bank, momentum update and torch's SGD. Both also
come with views that are made already, so that the difference is what loading and augmentation cost; and ``passes`` is
what the encoders alone do in a step.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from augment import MEAN, STD, Repeated, photos
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from turns import Turn

from spice_ray.contracts import Health, ShardFile
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import build_encoder, set_lanes
from spice_ray.core.lanes import Lanes, ResidentLanes, Rows, Stream, serve, shuffle_window
from spice_ray.core.moco import ProjectedEncoder, momentum_copy
from spice_ray.core.order import stream_key
from spice_ray.settings import Pretrain
from spice_ray.stages.pretrain import pretrain

_SIDE, _FILES, _PHOTOS = 32, 16, 4096
Views = tuple[Tensor, Tensor]


def make_images(count: int) -> Tensor:
    """uint8, (count, 3, 32, 32); some thousand photos again and again."""
    return photos(_PHOTOS)[torch.arange(count) % _PHOTOS]


def prepared_views(rows: int, device: torch.device) -> Views:
    images, draws = photos(rows), torch.arange(rows)
    make = Augmentation("natural", MEAN, STD, blur=0).contrastive
    first, second = (make(images, draws, stream_key(0, view)).to(device) for view in range(2))
    return first, second


# Ours


class TurnProgress:
    """Tells the steps of stage 1 to whoever measures."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def restore(self) -> None:
        self._turn.begin()

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        pass

    def advance(self, step: int, _total: int, _loss: Tensor, _snapshot: Callable[[], dict[str, Any]]) -> None:
        self._turn.after(step)


class PreparedViews:
    """An augmentation that gives views that are there already."""

    def __init__(self, views: Views) -> None:
        self._views = itertools.cycle(views)

    def contrastive(self, _images: Tensor, _draws: Tensor, _key: int) -> Tensor:
        return next(self._views)


def ours(settings: Pretrain, count: int, device: torch.device, turn: Turn, *, compiled: bool = False) -> None:
    stream = Stream(stream_key(0, "pretrain"), settings.batch_size // settings.lanes, shuffle_window(_SIDE))
    lanes = resident(make_images(count), settings.lanes, stream, device)
    _train(settings, lanes, Augmentation("natural", MEAN, STD, blur=0), count, device, turn, compiled=compiled)


def ours_prepared(settings: Pretrain, count: int, device: torch.device, turn: Turn) -> None:
    lanes = Repeated(settings.lanes, settings.batch_size, device)
    views = PreparedViews(prepared_views(settings.batch_size, device))
    _train(settings, lanes, views, count, device, turn)


def _train(
    settings: Pretrain,
    lanes: Lanes,
    views: Any,
    count: int,
    device: torch.device,
    turn: Turn,
    *,
    compiled: bool = False,
) -> None:
    pretrain(
        settings,
        lanes,
        views,
        num_images=count,
        seed=0,
        device=device,
        wrap=lambda module: module,
        progress=TurnProgress(turn),
        compiled=compiled,
    )


def resident(images: Tensor, num_lanes: int, stream: Stream, device: torch.device) -> ResidentLanes:
    rows = -(-len(images) // _FILES)
    starts = range(0, len(images), rows)
    sizes = [min(rows, len(images) - start) for start in starts]
    files = [ShardFile(f"{start}", start, size, size, 0) for start, size in zip(starts, sizes, strict=True)]
    lanes = serve(files, list(range(num_lanes)), num_lanes)
    ids = torch.cat([torch.arange(f.first_id, f.first_id + f.rows) for lane in lanes.files for f in lane])
    return ResidentLanes(lanes, Rows(images[ids].to(device), ids.to(device)), stream, device)


def passes(settings: Pretrain, device: torch.device, turn: Turn) -> None:
    """The forward passes of both encoders and the backward pass of one, and nothing else."""
    encoder = build_encoder(settings.encoder, stream_key(0, "encoder"))
    query = ProjectedEncoder(encoder, settings.projection_dim, stream_key(0, "projector")).to(device)
    set_lanes(query, settings.lanes)
    keys = momentum_copy(query)
    first, second = prepared_views(settings.batch_size, device)
    directions = [(first, second), (second, first)] if settings.symmetric else [(first, second)]
    turn.begin()
    for step in itertools.count(1):
        losses = list[Tensor]()
        for queries, positives in directions:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                with torch.no_grad():
                    target = keys(positives)
                losses.append((query(queries) * target).sum(dim=1).mean())
        query.zero_grad(set_to_none=True)
        torch.stack(losses).mean().backward()
        turn.after(step)


# lightly's


@dataclass(frozen=True)
class Peer:
    """What lightly is told; the defaults are those of its example and of its transform."""

    encoder: str
    batch_size: int
    precision: str = "fp32"
    transform: dict[str, Any] = field(default_factory=lambda: {"input_size": _SIDE})
    optimizer: dict[str, float] = field(default_factory=lambda: {"lr": 0.06})
    loss: dict[str, Any] = field(default_factory=lambda: {"memory_bank_size": (4096, 128)})
    momentum: float = 0.996


class Pictures(Dataset[tuple[list[Tensor], int]]):
    """Images in memory as torchvision's CIFAR10 holds them; their labels are of no use."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self._images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self._transform(Image.fromarray(self._images[index])), 0


def lightly(peer: Peer, count: int, workers: int, device: torch.device, turn: Turn) -> None:
    from lightly.transforms.moco_transform import MoCoV2Transform

    loader = DataLoader(
        Pictures(make_images(count), MoCoV2Transform(**peer.transform)),
        batch_size=peer.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    _train_lightly(peer, _endless(loader), device, turn)


def lightly_prepared(peer: Peer, device: torch.device, turn: Turn) -> None:
    _train_lightly(peer, itertools.repeat(prepared_views(peer.batch_size, device)), device, turn)


def _endless(loader: DataLoader[tuple[list[Tensor], int]]) -> Iterator[Views]:
    while True:
        for (first, second), _ in loader:
            yield first, second


def _train_lightly(peer: Peer, batches: Iterable[Views], device: torch.device, turn: Turn) -> None:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    encoder = build_encoder(peer.encoder, stream_key(0, "encoder"))
    # Torch's default, in which its examples train; channels-last is a part of how this package trains.
    encoder = encoder.to(memory_format=torch.contiguous_format)
    width, projected = encoder.embed_dim, peer.loss["memory_bank_size"][1]
    backbone = nn.Sequential(encoder.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    query = nn.Sequential(backbone, MoCoProjectionHead(width, width, projected)).to(device)
    keys = copy.deepcopy(query)
    deactivate_requires_grad(keys)
    criterion = NTXentLoss(**peer.loss).to(device)
    optimizer = torch.optim.SGD(query.parameters(), **peer.optimizer)
    total = torch.zeros((), device=device)
    turn.begin()
    for step, (first, second) in enumerate(batches, 1):
        update_momentum(query, keys, m=peer.momentum)
        first, second = first.to(device, non_blocking=True), second.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=peer.precision == "bf16"):
            projections, targets = query(first), keys(second)
        loss = criterion(projections.float(), targets.detach().float())
        total += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turn.after(step)
