import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "checks",
    [
        ("strangers", "neighbors", "joint", "features", "gone_on"),
        pytest.param(("contrast", "heads", "recorded"), marks=pytest.mark.faults),
    ],
    ids=" ".join,
)
def test_a_device_gives_what_the_processor_gives_and_recorded_steps_what_they_give_as_they_stand(
    checks: tuple[str, ...],
) -> None:
    command = [sys.executable, "-m", "tests.device_checks", *checks]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
