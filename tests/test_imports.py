"""What may be imported where: each claim in a fresh process."""

import pkgutil
import subprocess
import sys

import pytest

import spice_ray.core
import spice_ray.stages

MODULES = [
    module.name
    for package in (spice_ray.core, spice_ray.stages)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
FAISS = "import faiss"
TORCH = "import torch"
SEARCH = """
import numpy as np
rows = np.eye(4, dtype=np.float32)
index = faiss.IndexFlatIP(4)
index.add(rows)
assert index.search(rows[[2, 0]], 1)[1].tolist() == [[2], [0]]
x = torch.eye(4)
assert (x @ x).argmax(dim=1).tolist() == [0, 1, 2, 3]
"""


def run(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_core_and_stages_import_where_ray_is_absent():
    assert {"spice_ray.core.moco", "spice_ray.stages.pretrain"} <= set(MODULES)
    script = "\n".join(
        [
            "import importlib, sys",
            "sys.modules['ray'] = None  # what 'import ray' then finds is an ImportError",
            f"for name in {MODULES}: importlib.import_module(name)",
            "assert 'spice_ray.runtime.train' not in sys.modules",
            "try: import spice_ray.runtime.train",
            "except ImportError as error: print(error.name.partition('.')[0])",
        ]
    )
    assert run(script) == "ray\n"


@pytest.mark.parametrize("module", ["spice_ray", "spice_ray.config", "spice_ray.cli"])
def test_settings_and_the_command_line_load_without_torch_and_ray(module):
    loaded = run(f"import sys, {module}\nprint(*sys.modules)").split()
    assert module in loaded
    assert [name for name in loaded if name in ("torch", "ray", "torchvision", "faiss", "sklearn")] == []


@pytest.mark.parametrize("module", ["spice_ray.runtime.reading", "spice_ray.runtime.ingest"])
def test_tasks_that_read_start_without_torch(module):
    assert run(f"import sys, {module}\nprint('torch' in sys.modules)") == "False\n"


def test_a_recipe_is_checked_without_torch_and_ray():
    script = """
import sys, spice_ray.cli
from spice_ray.settings import Reliable
Reliable(min_consistency=0.5)
try: Reliable(min_consistency=2)
except ValueError: print('torch' in sys.modules, 'ray' in sys.modules)
"""
    assert run(script) == "False False\n"


@pytest.mark.parametrize("order", [(FAISS, TORCH), (TORCH, FAISS)])
def test_faiss_and_torch_work_in_one_process_in_either_order(order):
    run("\n".join([*order, SEARCH]))
