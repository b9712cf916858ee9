"""What a host tells a training worker reaches its loop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spice_ray.config import ImageRecipe, Scale
from spice_ray.contracts import ENCODER
from spice_ray.errors import ResourceError, TrainingError
from spice_ray.recipe import check_recipe
from spice_ray.runtime.data import open_shards
from spice_ray.runtime.memory import Budget
from spice_ray.runtime.trial import TrialProgress
from spice_ray.runtime.workers import Host, PretrainJob, may_compile, run_pretrain
from spice_ray.storage import open_artifact
from tests.made_shards import NUM_IMAGES, SIZE, make_shards
from tests.small_settings import changed


class Counted:
    """Counts the rows of each forward pass of the query."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        module.register_forward_hook(lambda _, inputs, __: self.rows.append(len(inputs[0])))
        return module


def pretrained(folder: Path, accumulate: int, *, compiled: bool = False) -> tuple[list[int], dict[str, torch.Tensor]]:
    settings: dict[str, Any] = {"encoder": "convnet", "batch_size": 16, "queue_size": 16, "epochs": 1}
    recipe = check_recipe(changed(image__size=SIZE, **{f"pretrain__{key}": value for key, value in settings.items()}))
    assert isinstance(recipe, ImageRecipe)
    shards = open_shards(make_shards(folder, "0a"), None)
    job = PretrainJob(recipe.pretrain, recipe.image, shards, 0, folder, "0b")
    counted = Counted()
    memory = Budget(1 << 30, 1 << 30)
    run_pretrain(job, Host(torch.device("cpu"), counted.wrap, TrialProgress(), memory, accumulate, compiled))
    artifact = open_artifact(folder, ENCODER, "0b")
    assert artifact is not None
    return counted.rows, load_file(artifact.file("encoder.safetensors"))


def test_a_batch_is_computed_in_as_many_parts_as_the_host_says(local_ray: None, tmp_path: Path) -> None:
    whole, expected = pretrained(tmp_path / "whole", 1)
    in_parts, found = pretrained(tmp_path / "parts", 4)
    assert whole == [16] * (NUM_IMAGES // 16)
    assert in_parts == [4] * (4 * NUM_IMAGES // 16)
    for name, weights in expected.items():
        assert found[name].flatten().tolist() == pytest.approx(weights.flatten().tolist(), rel=1e-3, abs=1e-4)


def test_a_host_that_compiles_has_both_encoders_compiled(local_ray: None, tmp_path: Path, monkeypatch) -> None:
    compiled = list[nn.Module]()
    monkeypatch.setattr("spice_ray.stages.pretrain.compile_encoders", compiled.append)
    pretrained(tmp_path, 1, compiled=True)
    query, momentum_encoder = compiled
    assert all(weights.requires_grad for weights in query.parameters())
    assert not any(weights.requires_grad for weights in momentum_encoder.parameters())


def test_a_node_without_a_compiler_is_told_of_where_encoders_are_to_be_compiled(tmp_path: Path, monkeypatch) -> None:
    assert not may_compile(Scale())
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(headers)})
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert not may_compile(Scale())
    asked = Scale(compile=True)
    with pytest.raises(ResourceError, match=r"needs a C compiler and a C\+\+ compiler and Python's headers \(.*\) on"):
        may_compile(asked)
    for name in ("gcc", "c++"):
        (tmp_path / name).touch(0o755)
    (headers / "Python.h").touch()
    with pytest.raises(ResourceError, match=r"needs a C\+\+ compiler on every node"):
        may_compile(asked)
    monkeypatch.setenv("CXX", "c++")
    assert may_compile(asked)


@pytest.mark.parametrize("step", [10, 37])
def test_a_trial_whose_loss_is_no_number_ends_before_anything_is_published(step: int) -> None:
    advance = TrialProgress().advance
    advance(step - 1, 37, torch.tensor(1.0), dict)
    with pytest.raises(TrainingError, match=f"the loss of step {step} is not a number"):
        advance(step, 37, torch.tensor(math.nan), dict)
