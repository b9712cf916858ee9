import subprocess
import sys

import pytest


@pytest.mark.parametrize("check", ["neighbors", "strangers"])
def test_tensors_of_a_device_meet_no_others(check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretended_device", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
