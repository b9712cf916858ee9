"""No benchmark of its own: ``heads.py published``, beside the published loop, which encodes again for every head."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from augment import MEAN, STD
from heads_banks import Digits, Mixture, Trained, open_digits, train
from heads_speed import CORES
from heads_views import mean_and_deviation
from published_heads import Views, em_step, new_heads
from published_heads import train as train_published
from tables import print_table
from torch import Tensor
from torch.nn import functional as F

from spice_ray.config import ImageRecipe, Recipe, Scale
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import Encoder, build_encoder
from spice_ray.readers.parts import images_of, read_part
from spice_ray.recipe import load_recipe
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.data import open_shards
from spice_ray.runtime.weights import load_encoder
from spice_ray.runtime.workers import augmentation_of
from spice_ray.settings import Heads
from spice_ray.stages.embed import embed

SIDE, WIDTH, CLUSTERS = 32, 512, 10
VIEWS = Augmentation("natural", MEAN, STD)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# One EM step


def published_step(encoder: Encoder, images: Tensor, heads: Heads) -> float:
    """Seconds of an EM step over ``images``; their plain features were made before, as there."""
    device = images.device
    modules = new_heads(heads.count, WIDTH, CLUSTERS).to(device)
    optimizer = torch.optim.Adam(modules.parameters(), lr=heads.lr)
    embeddings = F.normalize(torch.randn(len(images), WIDTH, device=device), dim=1)
    draws = torch.arange(len(images), device=device)

    def step() -> None:
        views = Views(VIEWS.weak(images, draws, 0), VIEWS.strong(images, draws, 1), embeddings)
        em_step(encoder, modules, optimizer, views, heads)

    return timed(step, device)


def encoding(encoder: Encoder, images: Tensor, strong: int) -> float:
    """Seconds for the plain, the weak and ``strong`` strong views of ``images``."""
    ids = torch.arange(len(images), device=images.device)
    return timed(lambda: embed(encoder, images, ids, VIEWS, num_strong=strong, seed=0), images.device)


def forwards(num_images: int, heads: Heads) -> int:
    """Images that the published loop encodes in an EM step over so many."""
    labelled = CLUSTERS * (num_images // CLUSTERS)
    return num_images + labelled // heads.batch_size * heads.batch_size * heads.repeats * heads.count


def measure_step(encoder_name: str, count: int, encoded: int, rounds: int) -> dict[str, Any]:
    """An EM step of both: the published one over ``count`` images, our encoding of ``encoded`` ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe("cifar10", ["heads.epochs=30", "heads.round_size=5000"])
    assert isinstance(recipe, ImageRecipe)
    heads = recipe.heads
    encoder = build_encoder(encoder_name, 0).eval().to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (max(count, encoded), 3, SIDE, SIDE), dtype=torch.uint8, generator=generator).to(device)
    found = []
    with tempfile.TemporaryDirectory() as name, connected(Scale(), verbose=False), one_thread():
        embedding = Mixture(heads.round_size, WIDTH, CLUSTERS, 1).write(Path(name))
        encoding(encoder, images[:encoded], 1)  # warms up
        for _ in range(rounds):
            one, kept = (encoding(encoder, images[:encoded], strong) for strong in (1, recipe.heads.views))
            trained = train(_one_round(recipe), _one_actor(device), embedding, Path(name))
            published = published_step(encoder, images[:count], heads)
            found.append(_step_times(heads, published, count, one / encoded, kept / encoded, trained))
    _print_step(found, heads, count, encoded)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread",
        "encoder": encoder_name,
        "heads": heads.model_dump(mode="json"),
        "published_images": count,
        "encoded_images": encoded,
        "rounds": found,
    }


def _one_round(recipe: Recipe) -> Recipe:
    """As many heads as the recipe's, each for one EM step."""
    heads = recipe.heads
    settings = (f"heads.count={heads.count}", "heads.epochs=1", f"heads.round_size={heads.round_size}")
    return load_recipe("embeddings", [f"num_clusters={CLUSTERS}", "heads.start=random", *settings])


def _one_actor(device: torch.device) -> Scale:
    return Scale(head_actors=1, head_gpus=float(device.type == "cuda"))


def _step_times(
    heads: Heads, published: float, count: int, one: float, kept: float, trained: Trained
) -> dict[str, float]:
    """Seconds of an EM step over M images, from those over fewer."""
    whole = published * forwards(heads.round_size, heads) / forwards(count, heads)
    once, shared = one * heads.round_size, kept * heads.round_size / heads.epochs
    return {
        "published_measured": published,
        "published": whole,
        "ours_heads": trained.seconds,
        "ours_encoding_for_one_step": once,
        "ours_encoding_of_a_run_per_step": shared,
        "ratio_one_step": whole / (once + trained.seconds),
        "ratio_in_a_run": whole / (shared + trained.seconds),
    }


def _print_step(found: list[dict[str, float]], heads: Heads, count: int, encoded: int) -> None:
    middle = {name: median(times[name] for times in found) for name in found[0]}
    print_table(
        f"an EM step, M = {heads.round_size:,}, {heads.count} heads, {heads.repeats} repeats",
        ["", "seconds", "encoding", "heads", "published / ours"],
        [
            ["published", f"{middle['published']:,.1f}", "", "", ""],
            *(
                [
                    name,
                    f"{middle[part] + middle['ours_heads']:,.1f}",
                    f"{middle[part]:,.1f}",
                    f"{middle['ours_heads']:,.1f}",
                    f"{middle[ratio]:,.1f}x",
                ]
                for name, part, ratio in (
                    ("ours, its views encoded for this step alone", "ours_encoding_for_one_step", "ratio_one_step"),
                    ("ours, its share of the run's encoding", "ours_encoding_of_a_run_per_step", "ratio_in_a_run"),
                )
            ),
        ],
    )
    print(
        f"published: measured over {count} images, {forwards(count, heads):,} forward passes, and scaled to "
        f"{forwards(heads.round_size, heads):,}; our encoding over {encoded} images and scaled; asked: 20x"
    )


# Digits, whole


def read_images(digits: Digits) -> Tensor:
    """All images in the order of their sample ids, uint8, (N, 3, S, S)."""
    shards = open_shards(digits.shards, None)
    tables = [read_part(shards.path, file, shards.format) for file in shards.readable]
    return torch.from_numpy(np.concatenate([images_of(table, shards.image_size) for table in tables]))


def measure_whole(runs: list[Path]) -> dict[str, Any]:
    """Stage 2 of digits by both, on the same encoders and with the same settings."""
    found = []
    with connected(Scale(), verbose=False), one_thread():
        for seed, run in enumerate(runs):
            with tempfile.TemporaryDirectory() as name:
                found.append(_both(open_digits(run, seed, Path(name)), Path(name)))
            print(found[-1], flush=True)
    _print_whole(found)
    return {"actors": CORES, "seeds": found}


def _both(digits: Digits, root: Path) -> dict[str, float]:
    recipe = digits.recipe
    start = time.perf_counter()
    embedding = digits.embed(recipe.heads.views, root)
    embedded = time.perf_counter() - start
    trained = train(recipe, Scale(head_actors=1), embedding, root)
    encoder, images = load_encoder(digits.encoder).eval(), read_images(digits)
    views = augmentation_of(recipe.image)
    start = time.perf_counter()
    clusters = train_published(encoder, images, views, recipe.heads, num_clusters=recipe.num_clusters, seed=recipe.seed)
    return {
        "seed": recipe.seed,
        "ours_acc": digits.accuracy(trained.assignments),
        "published_acc": digits.accuracy(clusters.numpy()),
        "ours_encoding_seconds": embedded,
        "ours_heads_seconds": trained.seconds,
        "published_seconds": time.perf_counter() - start,
    }


def _print_whole(found: list[dict[str, float]]) -> None:
    ours, published = ([run[f"{side}_acc"] for run in found] for side in ("ours", "published"))
    differences = [own - theirs for own, theirs in zip(ours, published, strict=True)]
    seconds = mean(run["ours_encoding_seconds"] + run["ours_heads_seconds"] for run in found)
    print_table(
        f"digits, all of stage 2 on one core, {len(found)} seeds, mean +- standard deviation",
        ["", "ACC", "seconds"],
        [
            ["published", mean_and_deviation(published), f"{mean(run['published_seconds'] for run in found):.1f}"],
            ["ours, with encoding", mean_and_deviation(ours), f"{seconds:.1f}"],
            ["ours - published", mean_and_deviation(differences, "+"), ""],
        ],
    )
