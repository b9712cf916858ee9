import subprocess
import sys

import pytest


@pytest.mark.parametrize("check", ["neighbors", "contrast", "heads", "joint", "features", "strangers"])
def test_tensors_of_a_device_meet_no_others(check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.device_checks", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
