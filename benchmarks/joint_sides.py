"""No benchmark: the loops that ``joint.py`` compares, each a side that takes turns.

Ours is stage 3 as it runs, fed from memory. The plain one is FixMatch as the paper has it and as one writes it with
torch and torchvision: transforms in a DataLoader over PIL images in memory, torch's SGD, torch's own moving average.
Both also come with views that are made already, so that the difference is what loading and augmentation cost; and
``passes`` is what the network alone does in a step.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from augment import MEAN, STD, Repeated, cut_out, four_operations, weak_transforms
from PIL import Image
from pretrain_sides import TurnProgress, make_images, prepared_views, resident
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2
from turns import Turn

from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import build_encoder, set_lanes
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.core.lanes import Lanes, Stream, shuffle_window
from spice_ray.core.order import stream_key, with_replacement
from spice_ray.settings import Joint
from spice_ray.stages.train_joint import train_joint

CLASSES, SIDE = 10, 32


def new_model(encoder: str) -> JointModel:
    built = build_encoder(encoder, stream_key(0, "encoder"))
    return JointModel(built, ClusterHead(built.embed_dim, CLASSES, stream_key(0, "head")))


def make_labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


# Ours


class PreparedViews:
    """An augmentation that gives views that are there already."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._first, self._second = prepared_views(rows, device)

    def weak(self, images: Tensor, _draws: Tensor, _key: int) -> Tensor:
        return self._first[: len(images)]

    def strong(self, images: Tensor, _draws: Tensor, _key: int) -> Tensor:
        return self._second[: len(images)]


def ours(
    settings: Joint, encoder: str, count: int, device: torch.device, turn: Turn, *, compiled: bool = False
) -> None:
    images, few, window = make_images(count), settings.labelled_batch // settings.lanes, shuffle_window(SIDE)
    known = Stream(stream_key(0, "labelled"), few, window, with_replacement)
    everything = Stream(stream_key(0, "unlabelled"), few * settings.unlabelled_ratio, window)
    lanes = [resident(images, settings.lanes, stream, device) for stream in (known, everything)]
    _train(settings, encoder, *lanes, Augmentation("natural", MEAN, STD), count, device, turn, compiled=compiled)


def ours_prepared(settings: Joint, encoder: str, device: torch.device, turn: Turn) -> None:
    rows = settings.labelled_batch * settings.unlabelled_ratio
    known = Repeated(settings.lanes, settings.labelled_batch, device)
    everything = Repeated(settings.lanes, rows, device)
    _train(settings, encoder, known, everything, PreparedViews(rows, device), rows, device, turn)


def _train(
    settings: Joint,
    encoder: str,
    known: Lanes,
    everything: Lanes,
    views: Any,
    count: int,
    device: torch.device,
    turn: Turn,
    *,
    compiled: bool = False,
) -> None:
    train_joint(
        settings,
        new_model(encoder),
        known,
        everything,
        views,
        labels=make_labels(count),
        weights=torch.ones(count),
        seed=0,
        device=device,
        wrap=lambda module: module,
        progress=TurnProgress(turn),
        compiled=compiled,
    )


def passes(settings: Joint, encoder: str, device: torch.device, turn: Turn) -> None:
    """The forward and backward passes of a step, and nothing else."""
    model = new_model(encoder).to(device)
    set_lanes(model, settings.lanes)
    rows = settings.labelled_batch * settings.unlabelled_ratio
    first, second = prepared_views(rows, device)
    batch = torch.cat([first[: settings.labelled_batch], first, second])
    turn.begin()
    for step in itertools.count(1):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(batch)
        model.zero_grad(set_to_none=True)
        logits.square().mean().backward()
        turn.after(step)


# The plain loop


@dataclass(frozen=True)
class Plain:
    """What the plain loop is told."""

    settings: Joint
    encoder: str
    randaugment: bool
    """torchvision's RandAugment and random erasing, as one finds them in such loops; else our own operations."""


class Pictures(Dataset[tuple[Any, ...]]):
    """Images in memory as torchvision's CIFAR10 holds them, through transforms."""

    def __init__(self, images: Tensor, transforms: list[Callable[[Any], Tensor]]) -> None:
        self._images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self._labels = make_labels(len(images)).tolist()
        self._transforms = transforms

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = Image.fromarray(self._images[index])
        return *(transform(image) for transform in self._transforms), self._labels[index]


def _transforms(plain: Plain) -> tuple[Any, Any]:
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if plain.randaugment:
        strong = [
            *weak_transforms(),
            v2.RandAugment(3, 10),
            *finish,
            v2.RandomErasing(1.0, scale=(0.02, 0.25), value=0),
        ]
    else:
        strong = [v2.RandomHorizontalFlip(), four_operations, *finish, cut_out]
    return v2.Compose([*weak_transforms(), *finish]), v2.Compose(strong)


def _loader(images: Tensor, transforms: list[Any], batch: int, workers: int) -> Iterator[list[Tensor]]:
    pictures = Pictures(images, transforms)
    # One pass that never ends within a benchmark, drawn with replacement as FixMatch draws its labelled rows.
    sampler = RandomSampler(pictures, replacement=True, num_samples=1_000_000_000 // batch * batch)
    pinned = torch.cuda.is_available()
    loader = DataLoader(pictures, batch, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=pinned)
    return iter(loader)


def plain_loop(plain: Plain, count: int, workers: int, device: torch.device, turn: Turn) -> None:
    settings, images = plain.settings, make_images(count)
    weak, strong = _transforms(plain)
    # The unlabelled batches are the larger ones: they get the workers that one would give both.
    known = _loader(images, [weak], settings.labelled_batch, workers)
    unknown = _loader(images, [weak, strong], settings.labelled_batch * settings.unlabelled_ratio, workers)
    batches = ((*one, *two[:2]) for one, two in zip(known, unknown, strict=False))
    _train_plain(plain, batches, device, turn)


def plain_prepared(plain: Plain, device: torch.device, turn: Turn) -> None:
    settings = plain.settings
    rows = settings.labelled_batch * settings.unlabelled_ratio
    first, second = prepared_views(rows, device)
    few = settings.labelled_batch
    _train_plain(plain, itertools.repeat((first[:few], make_labels(few), first, second)), device, turn)


def _train_plain(plain: Plain, batches: Iterator[tuple[Tensor, ...]], device: torch.device, turn: Turn) -> None:
    settings = plain.settings
    model: nn.Module = new_model(plain.encoder).to(device)
    # Torch's default; channels-last is a part of how this package trains.
    model = model.to(memory_format=torch.contiguous_format)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
    )
    turn.begin()
    for step, batch in enumerate(batches, 1):
        labelled, labels, weak, strong = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(torch.cat((labelled, weak, strong))).float()
        known, weak_logits, strong_logits = logits.split([len(labelled), len(weak), len(strong)])
        sureness, targets = weak_logits.detach().softmax(dim=1).max(dim=1)
        mask = (sureness >= settings.confidence).float()
        loss = F.cross_entropy(known, labels)
        loss = loss + (F.cross_entropy(strong_logits, targets, reduction="none") * mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        turn.after(step)
