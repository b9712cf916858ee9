"""Stage 1 beside lightly's MoCo, under Ray Train beside plain torch.distributed, and the memory of a worker.

    python benchmarks/pretrain.py lightly --encoder resnet18_small --batch 128 --steps 1 --rounds 5
    python benchmarks/pretrain.py lightly --encoder convnet --batch 256 --steps 20 --rounds 7
    python benchmarks/pretrain.py ray --encoder resnet18_small --batch 16 --steps 30 --rounds 4
    python benchmarks/pretrain.py ray --encoder convnet --batch 256 --steps 100 --rounds 5
    python benchmarks/pretrain.py memory

``lightly`` trains on the same images in memory, with the same encoder, batch and threads. Each side is the project's
own loop or lightly's, in a process of its own, and they take turns of ``--steps`` steps (turns.py, pretrain_sides.py);
the first turn does not count. Everything runs on the GPU where there is one. Of the ``--workers`` of lightly's
DataLoader the fastest counts. There are two comparisons:

- same: one batch-norm group, one direction, equal SGD, queue, temperature and momentum, equal views (lightly's are
  MoCoV2Transform(input_size=32, gaussian_blur=0) with our mean and std), fp32 on the CPU and bf16 on a GPU.
- defaults: our recipe of that encoder (lanes and shuffled keys; cifar10 in both directions, and on the CPU in fp32)
  beside lightly's example (MoCoV2Transform(input_size=32), which blurs half of the views; SGD without momentum; fp32).

Where the time goes is told by three loops of each side: the whole one, one with views that are made already, and the
passes through the encoders alone.

``ray`` trains one job on real shards with two workers of one thread (DDP, gloo), hosted by Ray Train and by
torch.multiprocessing in turns, Ray being up only in its own. A ratio is that of two runs that follow each other, over
their steps but for the first ones. No checkpoint falls into a run, and both must have the same losses.

``memory`` trains an epoch of the small encoder under Ray Train with one worker, resident and streamed, on more and more
images, and reports the most that the worker held: all of its resident set, which counts pages shared with Ray's object
store, and its private part. With G lanes, streaming holds G shuffle windows of 8,192 images.
"""

import argparse
import importlib.util
import os
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from augment import MEAN, STD
from machine import surroundings, write_results
from pretrain_sides import Peer, lightly, lightly_prepared, ours, ours_prepared, passes
from turns import Side, take_turns

from spice_ray.recipe import load_recipe
from spice_ray.settings import Pretrain

RECIPES = {"resnet18_small": "cifar10", "convnet": "cifar10_small"}
ENDLESS = 1_000_000
"""Epochs: a loop ends when nobody gives it a turn any more."""
ONE_EPOCH = {"epochs": 1, "warmup_epochs": 1}
"""Stage 1 looks for a collapse after the warm-up, and these images hold nothing to be learned."""
COMPILED = "ours, compiled"
Times = dict[str, list[float]]


def settings_of(recipe: str, **changes: Any) -> Pretrain:
    return load_recipe(recipe, []).pretrain.model_copy(update=changes)


def same_sides(options: argparse.Namespace, count: int, device: torch.device) -> dict[str, Side]:
    precision = "bf16" if device.type == "cuda" else "fp32"
    shared = {"encoder": options.encoder, "batch_size": options.batch, "precision": precision}
    own = settings_of("cifar10", lanes=1, symmetric=False, epochs=ENDLESS, **shared)
    peer = Peer(
        **shared,
        transform={"input_size": 32, "gaussian_blur": 0.0, "normalize": {"mean": list(MEAN), "std": list(STD)}},
        optimizer={"lr": own.lr, "momentum": 0.9, "weight_decay": own.weight_decay},
        loss={"temperature": own.temperature, "memory_bank_size": (own.queue_size, own.projection_dim)},
        momentum=own.momentum,
    )
    return {
        "ours": partial(ours, own, count, device),
        **{f"lightly, {n} workers": partial(lightly, peer, count, n, device) for n in options.workers},
        "ours, prepared views": partial(ours_prepared, own, count, device),
        "lightly, prepared views": partial(lightly_prepared, peer, device),
        "passes": partial(passes, own, device),
        **_compiled(options, own, count, device),
    }


def default_sides(options: argparse.Namespace, workers: int, count: int, device: torch.device) -> dict[str, Side]:
    recipe = settings_of(RECIPES[options.encoder], batch_size=options.batch, epochs=ENDLESS)
    own = recipe if device.type == "cuda" else recipe.model_copy(update={"precision": "fp32"})
    peer = Peer(options.encoder, options.batch)
    of_peer = own.model_copy(update={"lanes": 1, "symmetric": False, "precision": peer.precision})
    once = {"ours, one direction": partial(ours, own.model_copy(update={"symmetric": False}), count, device)}
    return {
        "ours": partial(ours, own, count, device),
        f"lightly, {workers} workers": partial(lightly, peer, count, workers, device),
        "ours, prepared views": partial(ours_prepared, own, count, device),
        "lightly, prepared views": partial(lightly_prepared, peer, device),
        "ours, passes": partial(passes, own, device),
        "lightly, passes": partial(passes, of_peer, device),
        **(once if own.symmetric else {}),
        **_compiled(options, own, count, device),
    }


def _compiled(options: argparse.Namespace, own: Pretrain, count: int, device: torch.device) -> dict[str, Side]:
    return {COMPILED: partial(ours, own, count, device, compiled=True)} if options.compile else {}


def fastest_peer(times: Times) -> str:
    loops = [name for name in times if name.startswith("lightly") and name.endswith("workers")]
    return min(loops, key=lambda name: median(times[name]))


def ratios(times: Times, slower: str, faster: str = "ours") -> list[float]:
    return [theirs / own for theirs, own in zip(times[slower], times[faster], strict=True)]


def shares(times: Times, whole: str, prepared: str, alone: str) -> dict[str, float]:
    """Of a step: what prepared views save, what the passes take, and what is left."""
    made, passed = median(ratios(times, prepared, whole)), median(ratios(times, alone, whole))
    return {"loading and augmentation": 1 - made, "passes": passed, "rest": made - passed}


def report(title: str, times: Times, batch: int) -> dict[str, Any]:
    peer = fastest_peer(times)
    found: dict[str, Any] = {"seconds_per_step": times, "fastest_peer": peer, "ratios": ratios(times, peer)}
    for name, seconds in times.items():
        print(f"{title:9s} {name:24s} {batch / median(seconds):10,.1f} images/s")
    low, middle, high = min(found["ratios"]), median(found["ratios"]), max(found["ratios"])
    print(f"{title:9s} ours is {middle:.3f}x {peer} ({low:.3f} to {high:.3f})")
    if COMPILED in times:
        print(f"{title:9s} compiled it is {median(ratios(times, 'ours', COMPILED)):.3f}x as fast")
    found["shares"] = {}
    for side, whole in (("ours", "ours"), ("lightly", peer)):
        alone = f"{side}, passes" if f"{side}, passes" in times else "passes"
        found["shares"][side] = shares(times, whole, f"{side}, prepared views", alone)
        print(f"{title:9s} {side}: " + ", ".join(f"{name} {part:.1%}" for name, part in found["shares"][side].items()))
    return found


def measure_lightly(options: argparse.Namespace) -> dict[str, Any]:
    if importlib.util.find_spec("lightly") is None:
        raise SystemExit(
            "lightly is not installed; install the group bench into build/peers and put that on PYTHONPATH, as "
            "benchmarks/README.md says"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = partial(take_turns, steps=options.steps, rounds=options.rounds, device=device, threads=options.threads)
    # Nobody comes to the end of an epoch, where a DataLoader would start its workers anew; each is some batches ahead.
    count = options.batch * (options.steps * (options.rounds + 1) + 2 * max(options.workers) + 1)
    same = report("same", measure(same_sides(options, count, device)), options.batch)
    workers = int(same["fastest_peer"].split()[1])
    defaults = report("defaults", measure(default_sides(options, workers, count, device)), options.batch)
    names = ("encoder", "batch", "steps", "rounds", "threads", "workers")
    settings = {name: getattr(options, name) for name in names}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": where, "settings": settings, "same": same, "defaults": defaults}


# Every side imports this file again, and none of them needs Ray.


def measure_hosts(options: argparse.Namespace) -> dict[str, Any]:
    from pretrain_ray import measure_ray

    changes = {"encoder": options.encoder, "batch_size": options.batch, "lanes": 2, "precision": "fp32"}
    return measure_ray(settings_of("cifar10", **changes, **ONE_EPOCH), options.steps, options.rounds)


def measure_worker(options: argparse.Namespace) -> dict[str, Any]:
    from pretrain_memory import measure_memory

    return measure_memory(settings_of("cifar10_small", lanes=options.lanes, **ONE_EPOCH), options.images)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    beside = commands.add_parser("lightly")
    beside.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of lightly's DataLoader, to try")
    beside.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    beside.add_argument("--compile", action="store_true", help="ours also compiled, and recorded on a GPU")
    hosted = commands.add_parser("ray")
    for command, batch, steps, rounds in ((beside, 128, 1, 5), (hosted, 16, 30, 4)):
        command.add_argument("--encoder", choices=sorted(RECIPES), default="resnet18_small")
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--steps", type=int, default=steps, help="in a turn")
        command.add_argument("--rounds", type=int, default=rounds)
    memory = commands.add_parser("memory")
    memory.add_argument("--images", type=int, nargs="+", default=[10_000, 20_000, 40_000, 80_000])
    memory.add_argument("--lanes", type=int, default=1)
    for command in (beside, hosted, memory):
        command.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    if options.what == "memory" and len(set(options.images)) < 2:
        parser.error("--images needs two different sizes or more, for the growth from one to the next")
    return options


def main() -> None:
    options = parse()
    print(surroundings())
    found = {"lightly": measure_lightly, "ray": measure_hosts, "memory": measure_worker}[options.what](options)
    write_results({options.what: found}, options.out)


if __name__ == "__main__":
    main()
