"""CIFAR-10 from its images to its scores, in pieces of some minutes.

    python benchmarks/gpu/cifar10.py --data CIFAR10_PARQUET_FOLDER --out runs/gpu-cifar10 --minutes 8 \
        --results benchmarks/results/cifar10-gpu.json

The same command again goes on from the last checkpoint, until it ends with the scores of the test split (models see the
train split alone) and the minutes of each stage, those of interrupted attempts included; the minutes of all pieces,
Ray's starts among them, are added up in the file ``RUN.minutes.json`` beside the run. Settings such as
``pretrain.epochs=400`` may follow. It ends with 0 when the run has its scores, and with 3 when there is more to do.
A piece may take a minute longer than it was given, to end, and scoring some more.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from machine import surroundings, write_results  # noqa: E402
from tables import print_table  # noqa: E402

from spice_ray.evaluate import evaluate  # noqa: E402

_MORE_TO_DO = 3
_SECONDS_TO_END = 60
"""Workers end, and what they are writing is written."""


def go_on(command: list[str], seconds: float) -> bool:
    """Run a command for so long at most; gives whether it has come to its end."""
    # In the background of a script it would be ignored, here and there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if code:
        raise SystemExit(code)  # what happened stands above
    return True


def add_piece(run: Path, minutes: float) -> list[float]:
    """The minutes of all pieces so far, this one included."""
    file = run.with_name(f"{run.name}.minutes.json")
    pieces = [*(json.loads(file.read_text()) if file.exists() else []), round(minutes, 2)]
    file.write_text(json.dumps(pieces) + "\n")
    return pieces


def scores_of(run: Path) -> dict[str, Any]:
    """Scores of all methods, what the encoder knows of the classes, and minutes per stage."""
    found = evaluate(run, probe=True)
    return {
        "protocol": found["protocol"],
        "rows": found["rows"],
        "reliable": found["reliable"],
        "probe": found["probe"],
        "minutes": {stage: seconds / 60 for stage, seconds in found["seconds"].items()},
    }


def show(found: dict[str, Any]) -> None:
    scores = [
        [row["method"], *("" if row[name] is None else f"{row[name]:.3f}" for name in ("acc", "nmi", "ari"))]
        for row in found["rows"]
    ]
    print_table(f"scores, protocol={found['protocol']}", ["method", "ACC", "NMI", "ARI"], scores)
    known = [[row["method"], "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"] for row in found["probe"]]
    print_table("what the encoder knows", ["classifier", "accuracy"], known)
    minutes = [[stage, f"{value:.1f}"] for stage, value in found["minutes"].items()]
    stages, pieces = sum(found["minutes"].values()), found["minutes_of_pieces"]
    everything = [["all stages", f"{stages:.1f}"], [f"all of {len(pieces)} pieces", f"{sum(pieces):.1f}"]]
    print_table("time", ["stage", "minutes"], minutes + everything)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="the folder of CIFAR-10's Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--minutes", type=float, default=8, help="that this piece may take")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    parser.add_argument("settings", nargs="*", help="settings such as pretrain.epochs=400")
    options = parser.parse_args()
    print(surroundings())
    run, start = options.out.resolve(), time.perf_counter()
    command = [sys.executable, "-m", "spice_ray", "run", options.recipe, "--data", str(Path(options.data).resolve())]
    command += ["--out", str(run), "protocol=split", *options.settings]
    try:
        is_done = go_on(command, 60 * options.minutes)
    finally:
        pieces = add_piece(run, (time.perf_counter() - start) / 60)
    if not is_done:
        print(f"stopped after {pieces[-1]:.1f} minutes; the same command goes on")
        return _MORE_TO_DO
    found = {**scores_of(run), "minutes_of_pieces": pieces}
    show(found)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {"device": device, "recipe": options.recipe, "settings": options.settings}
    write_results({**settings, **found}, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
