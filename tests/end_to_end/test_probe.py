import json
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.small_runs import NUM_IMAGES


def test_the_encoder_of_a_run_knows_the_digits_and_json_says_how_well(copied: Path) -> None:
    called = [sys.executable, "-m", "spice_ray", "evaluate", str(copied), "--probe", "--json"]
    done = subprocess.run(called, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    rows = result["probe"]
    assert json.loads((copied / "scores.json").read_text()) == result
    held_out = NUM_IMAGES // 5
    assert [(row["method"], row["protocol"], row["n_train"], row["n_test"], row["k"]) for row in rows] == [
        ("k-NN on pixels", "leave_one_out", NUM_IMAGES - 1, NUM_IMAGES, 200),
        ("k-NN on the embedding", "leave_one_out", NUM_IMAGES - 1, NUM_IMAGES, 200),
        ("linear probe", "hold_out", NUM_IMAGES - held_out, held_out, None),
    ]
    # Ten classes: chance is 0.1.
    assert all(row["accuracy"] > 0.6 for row in rows)
