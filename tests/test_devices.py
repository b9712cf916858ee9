import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "checks",
    [("strangers", "neighbors", "contrast", "heads", "joint", "features"), ("recorded",), ("gone_on",)],
    ids=" ".join,
)
def test_what_is_computed_on_a_device_meets_no_tensor_of_another(checks: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.device_checks", *checks]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
