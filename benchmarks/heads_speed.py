"""No benchmark of its own: ``heads.py digits`` and ``heads.py large``, how long ten heads take."""

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from heads_banks import Mixture, Trained, in_new_process, megabytes_of, open_digits, train
from tables import print_table
from torch import nn
from torch.nn import functional as F

from spice_ray.config import Scale
from spice_ray.runtime.cluster import connected
from spice_ray.settings import Heads

CORES = len(os.sched_getaffinity(0))
SCALE = Scale(head_actors=CORES)
_WARM_UP = 100
_barrier: Barrier


# Digits


def measure_digits(run: Path, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, connected(SCALE, verbose=False):
        digits = open_digits(run, 0, Path(name))
        embedding = digits.embed(digits.recipe.heads.views, Path(name))
        found = [train(digits.recipe, SCALE, embedding, Path(name)) for _ in range(rounds)]
    seconds = [trained.seconds for trained in found]
    print_table(
        f"digits: {digits.recipe.heads.count} heads, {CORES} actors",
        ["round", "seconds", "of processor, busiest actor", "to start", "least loss"],
        [
            [
                f"{number}",
                f"{trained.seconds:.1f}",
                f"{trained.watch.busiest_actor:.1f}",
                f"{trained.start_seconds:.1f}",
                f"{min(trained.ensemble.manifest['losses']):.4f}",
            ]
            for number, trained in enumerate(found)
        ],
    )
    print(f"median {median(seconds):.1f} s (asked: 15)")
    return {
        "actors": CORES,
        "heads": digits.recipe.heads.model_dump(mode="json"),
        "seconds": seconds,
        "processor_seconds_of_busiest_actor": [trained.watch.busiest_actor for trained in found],
        "start_seconds": [trained.start_seconds for trained in found],
    }


# Large


def steps_per_head(heads: Heads, num_rows: int, num_clusters: int) -> int:
    round_size = min(heads.round_size, num_rows)
    labelled = num_clusters * (round_size // num_clusters)
    return heads.epochs * (num_rows // round_size) * heads.repeats * -(-labelled // heads.batch_size)


class Step(NamedTuple):
    """Seconds of a step."""

    wall: float
    processor: float


def step_alone(width: int, num_clusters: int, heads: Heads, seconds: float) -> Step:
    """A step by itself, in one process per core at the same time: the mean of the processes."""
    context = get_context("spawn")
    everybody = context.Barrier(CORES)
    with ProcessPoolExecutor(CORES, mp_context=context, initializer=_meet, initargs=(everybody,)) as pool:
        work = [pool.submit(_time_steps, width, num_clusters, heads, seconds) for _ in range(CORES)]
        return Step(*map(mean, zip(*(future.result() for future in work), strict=True)))


def _meet(everybody: Barrier) -> None:
    global _barrier
    _barrier = everybody


def _time_steps(width: int, num_clusters: int, heads: Heads, seconds: float) -> Step:
    """The bare step, written plainly: forward, double-softmax loss, backward and Adam on rows that are in memory."""
    torch.set_num_threads(1)
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_clusters))
    optimizer = torch.optim.Adam(head.parameters(), lr=heads.lr)
    rows = torch.randn(heads.round_size, width).split(heads.batch_size)[: heads.round_size // heads.batch_size]
    labels = torch.randint(num_clusters, (heads.batch_size,))

    def step(number: int) -> None:
        loss = F.cross_entropy(head(rows[number % len(rows)]).softmax(dim=1), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for number in range(_WARM_UP):
        step(number)
    _barrier.wait()
    steps, start, before = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        step(steps)
        steps += 1
    return Step((time.perf_counter() - start) / steps, (time.process_time() - before) / steps)


def measure_large(mixture: Mixture, count: int, epochs: int, rounds: int, seconds_alone: float) -> dict[str, Any]:
    recipe = mixture.recipe(f"heads.count={count}", f"heads.epochs={epochs}", "heads.round_size=5000")
    steps = -(-count // CORES) * steps_per_head(recipe.heads, mixture.num_rows, mixture.num_clusters)
    found = []
    with tempfile.TemporaryDirectory() as name, connected(SCALE, verbose=False):
        embedding = in_new_process(mixture.write, Path(name))
        bank = megabytes_of(embedding)
        for _ in range(rounds):
            before = step_alone(mixture.width, mixture.num_clusters, recipe.heads, seconds_alone)
            trained = train(recipe, SCALE, embedding, Path(name))
            after = step_alone(mixture.width, mixture.num_clusters, recipe.heads, seconds_alone)
            found.append(_round(trained, steps, before, after))
            _print_round(found[-1], steps, bank)
    print(f"\nmedian ratio {median(one['ratio'] for one in found):.3f} (asked: 1.2)")
    return {
        "rows": mixture.num_rows,
        "width": mixture.width,
        "views": mixture.views,
        "heads": recipe.heads.model_dump(mode="json"),
        "actors": CORES,
        "steps_per_actor": steps,
        "bank_megabytes": bank,
        "rounds": found,
    }


def _round(trained: Trained, steps: int, before: Step, after: Step) -> dict[str, Any]:
    watch, alone = trained.watch, Step(*map(mean, zip(before, after, strict=True)))
    return {
        "step_alone": {"before": before._asdict(), "after": after._asdict()},
        "seconds": trained.seconds,
        "processor_seconds_of_busiest_actor": watch.busiest_actor,
        "start_seconds": trained.start_seconds,
        "ratio": trained.seconds / (steps * alone.wall),
        "ratio_of_processor_seconds": watch.busiest_actor / (steps * alone.processor),
        "peak_megabytes": {
            "driver": watch.driver._asdict(),
            "actors": [held._asdict() for held in watch.actors.values()],
            "pss_of_all_processes": watch.total_pss,
        },
    }


def _print_round(found: dict[str, Any], steps: int, bank: float) -> None:
    alone = found["step_alone"]
    each = [f"{1000 * alone[when]['wall']:.3f}" for when in ("before", "after")]
    print_table(
        f"large: {steps:,} steps per actor; a step alone took {each[0]} ms before and {each[1]} ms after",
        ["", "seconds", "times the steps alone"],
        [
            ["trained", f"{found['seconds']:.1f}", f"{found['ratio']:.3f}"],
            [
                "of processor, busiest actor",
                f"{found['processor_seconds_of_busiest_actor']:.1f}",
                f"{found['ratio_of_processor_seconds']:.3f}",
            ],
            ["to start", f"{found['start_seconds']:.1f}", ""],
        ],
    )
    peaks = found["peak_megabytes"]
    held = {"driver": peaks["driver"], **{f"actor {n}": actor for n, actor in enumerate(peaks["actors"])}}
    print_table(
        f"peaks of memory, MB; the bank takes {bank:,.0f} (asked of an actor: bank + 600)",
        ["", "PSS", "private", "allocated"],
        [
            *([name, *(f"{value:,.0f}" for value in kinds.values())] for name, kinds in held.items()),
            ["all processes", f"{peaks['pss_of_all_processes']:,.0f}", "", ""],
        ],
    )
