"""Views per second at 32 pixels on one core: ours, torchvision's for one image at a time, and kornia's for a batch.

    python benchmarks/augment.py [--rounds 7] [--out benchmarks/results/augment.json]

All contenders turn the same uint8 images into normalised float32 views, with parameters of their own for each image.
They take turns, so that whatever else the machine does hits all of them; what counts is the CPU time of the process.
A ratio is the median over the rounds of (seconds of the peer / our seconds), and each side is the fastest of its kind:
ours in batches of 512 or 2,048, torchvision on tensors or PIL images, kornia cropping by slices or by one grid in
batches of 64, 512 or 2,048. Where there is a GPU, the views per second on it and the share of augmentation in a step of
stage 1 are measured too.
"""

import argparse
import importlib.metadata
import importlib.util
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from machine import surroundings, write_results
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from spice_ray.contracts import Batch, Health
from spice_ray.core.augment import Augmentation
from spice_ray.core.order import stream_key
from spice_ray.recipe import load_recipe
from spice_ray.stages.pretrain import pretrain

SIDE, ROWS, SLOW_ROWS = 32, 2048, 128
BATCHES = (512, ROWS)
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
KEY = stream_key(0, "benchmark", 0)


class Contender(NamedTuple):
    kind: str  # ours, torchvision or kornia
    name: str
    rows: int
    make: Callable[[], object]


def photos(count: int) -> Tensor:
    """Smooth colourful gradients with some noise, uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 230
    smooth = functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    return (smooth + torch.rand(count, 3, SIDE, SIDE, generator=generator) * 25).to(torch.uint8)


def ours(view: str, images: Tensor, size: int) -> Contender:
    make = getattr(Augmentation("natural", MEAN, STD, blur=0), view)
    draws = torch.arange(len(images), device=images.device).split(size)
    parts = images.split(size)
    return Contender(
        "ours",
        f"{size} at a time",
        len(images),
        lambda: [make(part, places, KEY) for part, places in zip(parts, draws, strict=True)],
    )


# One image at a time


def one_by_one(transforms: list[Any], images: Tensor, last: Callable[[Tensor], Tensor]) -> list[Contender]:
    images = images[:SLOW_ROWS]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), last]
    from_tensor, from_picture = v2.Compose([*transforms, *finish]), v2.Compose([*transforms, v2.ToImage(), *finish])
    return [
        Contender("torchvision", "tensor", len(images), lambda: torch.stack([from_tensor(image) for image in images])),
        Contender("torchvision", "PIL", len(images), lambda: torch.stack([from_picture(image) for image in pictures])),
    ]


def contrastive_transforms() -> list[Any]:
    return [
        v2.RandomResizedCrop(SIDE, scale=(0.2, 1.0)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomHorizontalFlip(),
    ]


def weak_transforms() -> list[Any]:
    return [v2.RandomCrop(SIDE, padding=SIDE // 8), v2.RandomHorizontalFlip()]


def four_operations(image: Any) -> Any:
    for _ in range(4):
        image = random.choice(OPERATIONS)(image, random.random())
    return image


def move(image: Any, angle: float = 0, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Any:
    translate = [share * SIDE for share in shift]
    nearest = InterpolationMode.NEAREST
    return tv.affine(image, angle=angle, translate=translate, scale=1, shear=list(shear), interpolation=nearest)


def cut_out(view: Tensor) -> Tensor:
    side = random.randint(1, SIDE // 2)
    top, left = (random.randrange(SIDE) - side // 2 for _ in range(2))
    view[:, max(0, top) : top + side, max(0, left) : left + side] = 0
    return view


OPERATIONS: tuple[Callable[[Any, float], Any], ...] = (
    lambda image, _: image,
    lambda image, _: tv.autocontrast(image),
    lambda image, _: tv.equalize(image),
    lambda image, strength: tv.solarize(image, 255 * strength),
    lambda image, strength: tv.posterize(image, 4 + int(4 * strength)),
    lambda image, strength: tv.adjust_brightness(image, 0.05 + 0.9 * strength),
    lambda image, strength: tv.adjust_contrast(image, 0.05 + 0.9 * strength),
    lambda image, strength: tv.adjust_saturation(image, 0.05 + 0.9 * strength),
    lambda image, strength: tv.adjust_sharpness(image, 0.05 + 0.9 * strength),
    lambda image, strength: move(image, angle=60 * strength - 30),
    lambda image, strength: move(image, shear=(11.4 * strength - 5.7, 0)),
    lambda image, strength: move(image, shear=(0, 11.4 * strength - 5.7)),
    lambda image, strength: move(image, shift=(0.2 * strength - 0.1, 0)),
    lambda image, strength: move(image, shift=(0, 0.2 * strength - 0.1)),
)


# kornia


def by_kornia(images: Tensor) -> list[Contender]:
    if importlib.util.find_spec("kornia") is None:
        print("kornia is not installed, see benchmarks/README.md; its column is left out")
        return []
    return [_kornia(images, mode, size) for mode in ("slice", "resample") for size in (64, *BATCHES)]


def _kornia(images: Tensor, mode: str, size: int) -> Contender:
    from kornia import augmentation as kornia

    transforms = torch.nn.Sequential(
        kornia.RandomResizedCrop((SIDE, SIDE), scale=(0.2, 1.0), cropping_mode=mode, same_on_batch=False),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8, same_on_batch=False),
        kornia.RandomGrayscale(p=0.2, same_on_batch=False),
        kornia.RandomHorizontalFlip(p=0.5, same_on_batch=False),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )

    def make() -> list[Tensor]:
        return [transforms(part.float() / 255) for part in images.split(size)]

    return Contender("kornia", f"{mode}, {size} at a time", len(images), make)


# Measuring


@torch.no_grad()
def take_turns(contenders: list[Contender], rounds: int) -> list[list[float]]:
    """CPU seconds per view of each contender in each round, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 1):
        for contender, times in zip(contenders, seconds, strict=True):
            start = time.process_time()
            contender.make()
            if turn > 0:
                times.append((time.process_time() - start) / contender.rows)
    return seconds


def measure(view: str, contenders: list[Contender], rounds: int) -> dict[str, Any]:
    seconds = take_turns(contenders, rounds)
    found: dict[str, Any] = {"view": view, "seconds": {}, "ratios": {}}
    for contender, times in zip(contenders, seconds, strict=True):
        found["seconds"][f"{contender.kind}, {contender.name}"] = times
        print(f"{view:12s} {contender.kind:11s} {contender.name:22s} {1 / median(times):10,.0f} views/s")
    kinds = list(dict.fromkeys(contender.kind for contender in contenders))
    fastest = {
        kind: min((t for c, t in zip(contenders, seconds, strict=True) if c.kind == kind), key=median) for kind in kinds
    }
    for kind in kinds[1:]:
        ratios = [theirs / own for theirs, own in zip(fastest[kind], fastest["ours"], strict=True)]
        found["ratios"][kind] = ratios
        print(f"{view:12s} ours is {median(ratios):.1f}x {kind} ({min(ratios):.1f} to {max(ratios):.1f})")
    return found


# On a GPU


class Repeated:
    """The same rows at every step, with draws of their own."""

    def __init__(self, num_lanes: int, rows: int, device: torch.device) -> None:
        self.num_lanes = num_lanes
        self.images, self.ids = photos(rows).to(device), torch.arange(rows, device=device)

    def batch(self, step: int) -> Batch:
        return Batch(self.images, self.ids, self.ids + step * len(self.ids))


class Clock:
    """Wall-clock seconds per step of stage 1, after ``skipped`` steps."""

    def __init__(self, skipped: int) -> None:
        self.skipped, self.start, self.seconds = skipped, 0.0, 0.0

    def restore(self) -> None:
        return None

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        pass

    def advance(self, step: int, total: int, _loss: Tensor, _snapshot: Callable[[], dict[str, Any]]) -> None:
        # The last step ends an epoch, whose health is looked at too.
        if step in (self.skipped, total - 1):
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.start, self.seconds = (now, 0.0) if step == self.skipped else (0.0, (now - self.start))
            self.seconds /= total - 1 - self.skipped


def seconds_on_gpu(contender: Contender, calls: int = 50) -> float:
    """Wall-clock seconds per call."""
    for _ in range(5):
        contender.make()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        contender.make()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def measure_on_gpu() -> dict[str, float]:
    # In an epoch of warm-up a collapse is not looked for, which random pixels might come to.
    one_epoch = {"epochs": 1, "warmup_epochs": 1}
    device, settings = torch.device("cuda"), load_recipe("cifar10", []).pretrain.model_copy(update=one_epoch)
    many = 1 << 15
    rate = many / seconds_on_gpu(ours("contrastive", photos(many).to(device), many))
    lanes, clock = Repeated(settings.lanes, settings.batch_size, device), Clock(skipped=20)
    augmentation = Augmentation("natural", MEAN, STD, settings.min_crop, settings.blur)
    pretrain(
        settings,
        lanes,
        augmentation,
        num_images=120 * settings.batch_size,
        seed=0,
        device=device,
        wrap=lambda module: module,
        progress=clock,
    )
    share = 2 * seconds_on_gpu(ours("contrastive", lanes.images, len(lanes.images))) / clock.seconds
    print(f"{torch.cuda.get_device_name()}: {rate:,.0f} contrastive views/s, {share:.1%} of a step of stage 1")
    return {"views_per_second": rate, "step_seconds": clock.seconds, "share_of_step": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = photos(ROWS)
    results: dict[str, Any] = {"on_one_core": []}
    print(surroundings())
    for view, transforms, last, more in (
        ("contrastive", contrastive_transforms(), lambda view: view, by_kornia(images)),
        ("weak", weak_transforms(), lambda view: view, []),
        ("strong", [v2.RandomHorizontalFlip(), four_operations], cut_out, []),
    ):
        contenders = [*(ours(view, images, size) for size in BATCHES), *one_by_one(transforms, images, last), *more]
        results["on_one_core"].append(measure(view, contenders, options.rounds))
    if torch.cuda.is_available():
        results["on_a_gpu"] = measure_on_gpu()
    write_results(results, options.out)


if __name__ == "__main__":
    main()
