"""A step of stage 3 beside a plain FixMatch loop on the same images, network, batch and threads.

    .venv/bin/python benchmarks/joint.py --out benchmarks/results/joint.json

Each side is a process of its own and they take turns of ``--steps`` steps (turns.py, joint_sides.py); the first turn
does not count. Everything runs on the GPU where there is one. Of the ``--workers`` of the plain loop's two DataLoaders
the fastest counts. There are two comparisons, both with FixMatch's 64 labelled rows and 448 weak and strong ones in one
pass:

- same: one batch-norm group, equal views, fp32 on the CPU and bf16 on a GPU.
- defaults: the recipe ``cifar10`` (8 lanes) beside RandAugment and random erasing, in the same precision.

The published library of such loops, semilearn, runs neither without a GPU (it moves every batch to one) nor beside this
torch (it needs a torchaudio of the same build).
"""

import argparse
import os
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from joint_sides import Plain, ours, ours_prepared, passes, plain_loop, plain_prepared
from machine import surroundings, write_results
from turns import Side, take_turns

from spice_ray.recipe import load_recipe
from spice_ray.settings import Joint

ENDLESS = 1_000_000
"""Steps: a loop ends when nobody gives it a turn any more."""
Times = dict[str, list[float]]


def settings_of(**changes: Any) -> Joint:
    return load_recipe("cifar10", []).joint.model_copy(update={"steps": ENDLESS, **changes})


def same_sides(options: argparse.Namespace, device: torch.device) -> dict[str, Side]:
    own = settings_of(lanes=1, precision="bf16" if device.type == "cuda" else "fp32")
    plain = Plain(own, options.encoder, randaugment=False)
    return _sides(own, plain, options, options.workers, device)


def default_sides(options: argparse.Namespace, workers: int, device: torch.device) -> dict[str, Side]:
    own = settings_of() if device.type == "cuda" else settings_of(precision="fp32")
    plain = Plain(own.model_copy(update={"lanes": 1}), options.encoder, randaugment=True)
    return _sides(own, plain, options, [workers], device)


def _sides(
    own: Joint, plain: Plain, options: argparse.Namespace, workers: list[int], device: torch.device
) -> dict[str, Side]:
    own_images = (own, options.encoder, options.images, device)
    return {
        "ours": partial(ours, *own_images),
        **{f"plain, {n} workers": partial(plain_loop, plain, options.images, n, device) for n in workers},
        "ours, prepared views": partial(ours_prepared, own, options.encoder, device),
        "plain, prepared views": partial(plain_prepared, plain, device),
        "passes": partial(passes, own, options.encoder, device),
        **({"ours, compiled": partial(ours, *own_images, compiled=True)} if options.compile else {}),
    }


def ratios(times: Times, slower: str, faster: str = "ours") -> list[float]:
    return [theirs / own for theirs, own in zip(times[slower], times[faster], strict=True)]


def report(title: str, times: Times) -> dict[str, Any]:
    peer = min((name for name in times if name.endswith("workers")), key=lambda name: median(times[name]))
    found = {"seconds_per_step": times, "fastest_peer": peer, "ratios": ratios(times, peer)}
    for name, seconds in times.items():
        print(f"{title:9s} {name:24s} {1000 * median(seconds):10,.1f} ms a step")
    low, middle, high = min(found["ratios"]), median(found["ratios"]), max(found["ratios"])
    print(f"{title:9s} ours is {middle:.3f}x {peer} ({low:.3f} to {high:.3f})")
    if "ours, compiled" in times:
        print(f"{title:9s} compiled it is {median(ratios(times, 'ours', 'ours, compiled')):.3f}x as fast")
    made = ratios(times, "plain, prepared views", "ours, prepared views")
    print(f"{title:9s} with views that are made already: {median(made):.3f}x")
    return {**found, "ratios_prepared": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="wrn28_2")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of each DataLoader, to try")
    parser.add_argument("--compile", action="store_true", help="ours also compiled, and recorded on a GPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=1, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(surroundings())
    measure = partial(take_turns, steps=options.steps, rounds=options.rounds, device=device, threads=options.threads)
    same = report("same", measure(same_sides(options, device)))
    workers = int(same["fastest_peer"].split()[1])
    defaults = report("defaults", measure(default_sides(options, workers, device)))
    names = ("encoder", "images", "steps", "rounds", "threads", "workers")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    settings = {name: getattr(options, name) for name in names}
    write_results({"device": where, "settings": settings, "same": same, "defaults": defaults}, options.out)


if __name__ == "__main__":
    main()
