import pytest
import torch

from spice_ray.config import Scale
from spice_ray.runtime.memory import Budget, free_memory, home_of, image_budget

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("num_bytes", "device", "budget", "expected"),
    [
        (100, GPU, Budget(100, 0), GPU),
        (101, GPU, Budget(100, 101), CPU),
        (102, GPU, Budget(100, 101), None),
        (100, CPU, Budget(100, 100), CPU),
        (101, CPU, Budget(100, 100), None),
        (1, GPU, Budget(0, 0), None),
    ],
)
def test_images_are_kept_on_the_device_else_in_main_memory_else_nowhere(
    num_bytes: int, device: torch.device, budget: Budget, expected: torch.device | None
) -> None:
    assert home_of(num_bytes, device, budget) == expected


def test_a_budget_that_is_given_holds_everywhere() -> None:
    assert image_budget(Scale(resident_memory=0.5), CPU, 3) == Budget(1 << 29, 1 << 29)
    assert image_budget(Scale(resident_memory=0), CPU, 1) == Budget(0, 0)


def test_workers_of_a_machine_share_its_free_memory() -> None:
    alone, shared = (image_budget(Scale(), CPU, sharing) for sharing in (1, 8))
    assert alone.on_device == alone.on_host
    assert 0 < shared.on_host < alone.on_host < free_memory() * 2
