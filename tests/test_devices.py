import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "checks",
    [("strangers", "neighbors", "contrast", "heads", "joint", "features"), ("recorded",), ("gone_on",)],
    ids=" ".join,
)
def test_a_device_gives_what_the_processor_gives_and_recorded_steps_what_they_give_as_they_stand(
    checks: tuple[str, ...],
) -> None:
    command = [sys.executable, "-m", "tests.device_checks", *checks]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
