from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spice_ray.core.encoders import build_encoder
from spice_ray.errors import ConfigError
from spice_ray.runtime.weights import read_given


def checkpoint(file: Path, held: Any) -> Path:
    torch.save(held, file)
    return file


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"student": {key: -value for key, value in state.items()}, "teacher": state},
        lambda state: {**state, "version": 1},
    ],
)
def test_a_torch_file_is_read_from_where_training_scripts_put_weights(
    wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path
) -> None:
    state = build_encoder("convnet", 1).state_dict()
    found = read_given(checkpoint(tmp_path / "weights.pth", wrap(dict(state))))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


class Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_file_that_is_not_of_weights_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    files = {
        "object": checkpoint(tmp_path / "object.pth", {"model": Touch(ran)}),
        "numbers": checkpoint(tmp_path / "numbers.pth", {"epoch": 3}),
        "list": checkpoint(tmp_path / "list.pth", [torch.zeros(3)]),
    }
    whole = checkpoint(tmp_path / "whole.pth", {"a": torch.zeros(100)}).read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello, world", "header": b"\xff" * 8 + b"{}"}
    for name, content in contents.items():
        files[name] = tmp_path / name
        files[name].write_bytes(content)
    for name, file in files.items():
        with pytest.raises(ConfigError, match=rf"{file.name} (cannot be read as|holds no) weights; give a safetensors"):
            read_given(file)
        assert not ran.exists(), name
