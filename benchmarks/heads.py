"""Stage 2: how long ten heads take, what they hold, how both grow, and what their cached views cost in accuracy.

    python benchmarks/heads.py digits [RUN]
    python benchmarks/heads.py large --epochs 2
    python benchmarks/heads.py scale
    python benchmarks/heads.py published [RUN ...]
    python benchmarks/heads.py views [RUN ...]

A RUN is the folder of a run of digits, of which the encoder is taken; where there is none, one is trained there with
the package's recipe (of several, the first with seed 0 and so on), and is there the next time. Stage 2 itself is the
package's own, on Ray with one actor per core, and its seconds count from the moment that the first actor is there.

``digits`` times the ten heads of the recipe.

``large`` trains ten heads on generated features, N = 50,000, D = 512, and 4 strong views, with M = 5,000 and 8 repeats,
for ``--epochs`` (a paper's run has 30), and compares the time with the number of steps times that of a bare step, which
is measured before and after in one process per core: forward, double-softmax loss, backward and Adam on batches of 128
that lie in memory. Meanwhile the memory of each process is looked at once a second (process_memory.py); a bank that is
mapped by all actors counts once in the sum of their proportional shares (PSS).

``scale`` trains on two generated mixtures of Gaussians out of mapped files, each in a driver of its own and with an
object store of 500 MB, and compares time per row, memory and accuracy.

``published`` stands beside the loop that was published, as published_heads.py describes it: it encodes anew for every
head, batch and repeat. One step of expectation and maximisation over M = 5,000 images of 32 pixels is measured over
fewer images and scaled by the number of images that pass through the encoder, all on one core (or the GPU where there
is one). Ours is ten heads over all of M, plus either the plain, one weak and one strong view of M images, encoded for
this one step, or the step's share of what a run of 30 epochs encodes once (plain, weak and 4 strong views of all
images). Then both train the heads of digits from beginning to end, for their accuracies.

``views`` trains the heads of digits on 1, 2, 4, 8 and 20 cached strong views, 20 being as many as the recipe's epochs.
"""

import argparse
from pathlib import Path
from typing import Any

from heads_banks import Mixture
from machine import surroundings, write_results

MADE = Path("build/digits")
"""Where encoders are trained if no run is named."""


def digits(options: argparse.Namespace) -> dict[str, Any]:
    from heads_speed import measure_digits

    return measure_digits(options.run, options.rounds)


def large(options: argparse.Namespace) -> dict[str, Any]:
    from heads_speed import measure_large

    mixture = Mixture(options.rows, 512, 10, views=4)
    return measure_large(mixture, options.heads, options.epochs, options.rounds, options.seconds_alone)


def scale(options: argparse.Namespace) -> dict[str, Any]:
    from heads_scale import measure_scale

    mixtures = [Mixture(rows, 128, 10, views=0) for rows in options.rows]
    return measure_scale(mixtures, [f"heads.count={options.heads}", f"heads.epochs={options.epochs}"])


def published(options: argparse.Namespace) -> dict[str, Any]:
    from heads_peer import measure_step, measure_whole

    step = measure_step(options.encoder, options.images, options.encoded, options.rounds)
    return {"step": step, "digits": measure_whole(options.runs)}


def views(options: argparse.Namespace) -> dict[str, Any]:
    from heads_views import measure_views

    return measure_views(options.runs, options.views, reference=4)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    made = [MADE / f"seed-{seed}" for seed in range(5)]
    small = commands.add_parser("digits")
    small.add_argument("run", type=Path, nargs="?", default=made[0])
    wide = commands.add_parser("large")
    wide.add_argument("--rows", type=int, default=50_000)
    wide.add_argument("--seconds-alone", type=float, default=10, help="of bare steps, before and after")
    long = commands.add_parser("scale")
    long.add_argument("--rows", type=int, nargs="+", default=[200_000, 2_000_000])
    for command, heads, epochs in ((wide, 10, 30), (long, 4, 2)):
        command.add_argument("--heads", type=int, default=heads)
        command.add_argument("--epochs", type=int, default=epochs)
    peer = commands.add_parser("published")
    peer.add_argument("--encoder", default="resnet18_small")
    peer.add_argument("--images", type=int, default=130, help="that the published step is measured over")
    peer.add_argument("--encoded", type=int, default=512, help="that our encoding is measured over")
    cached = commands.add_parser("views")
    cached.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8, 20])
    for command in (peer, cached):
        command.add_argument("runs", type=Path, nargs="*", default=made)
    for command, rounds in ((small, 3), (wide, 1), (peer, 3)):
        command.add_argument("--rounds", type=int, default=rounds)
    for command in (small, wide, long, peer, cached):
        command.add_argument("--out", type=Path, help="a JSON file to write")
    return parser.parse_args()


def main() -> None:
    options = parse()
    print(surroundings())
    measure = {"digits": digits, "large": large, "scale": scale, "published": published, "views": views}
    write_results({options.what: measure[options.what](options)}, options.out)


if __name__ == "__main__":
    main()
