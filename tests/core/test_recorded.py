"""What is recorded gives what it gave as it stood."""

import pytest
import torch
from torch import Tensor

from spice_ray.core.augment import Augmentation, view_maker
from spice_ray.core.recorded import Recorded

ROWS = [4, 4, 3, 4, 4, 3, 4, 3, 4, 3, 4]
"""Of the batches of some passes: two shapes, each met more often than it takes to record it."""


class Training:
    """A small product and an optimiser with a counter of its own."""

    def __init__(self, device: torch.device) -> None:
        self.weights = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).to(device))
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.Adam([self.weights], lr=0.1, fused=True, capturable=on_gpu)
        self.calls = 0

    @torch.no_grad()
    def step(self, rows: Tensor, targets: Tensor) -> None:
        self.calls += 1
        self.weights.grad = 2 * (rows @ self.weights.T - targets).T @ rows
        self.optimizer.step()


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for n in ROWS]
    return [(rows.to(device), targets.to(device)) for rows, targets in drawn]


def trained(device: torch.device, *, recorded: bool) -> Training:
    training = Training(device)
    step = Recorded(training.step, device) if recorded else training.step
    for batch in batches(device):
        step(*batch)
    return training


def test_on_a_processor_every_step_is_made_as_it_stands():
    cpu = torch.device("cpu")
    found, expected = trained(cpu, recorded=True), trained(cpu, recorded=False)
    assert found.calls == len(ROWS)
    assert torch.equal(found.weights, expected.weights)
    assert not torch.equal(found.weights, Training(cpu).weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_recorded_steps_are_those_that_stand_for_themselves():
    gpu = torch.device("cuda")
    found, expected = trained(gpu, recorded=True), trained(gpu, recorded=False)
    assert found.calls == 2 * 3  # of each shape twice as it stands, and once to record it
    assert torch.equal(found.weights, expected.weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("make", ["contrastive", "weak", "strong"])
def test_recorded_views_are_those_made_as_they_stand(make):
    augmentation, gpu = Augmentation("natural", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), torch.device("cuda")
    as_it_stands = view_maker(getattr(augmentation, make), 7)
    recorded = Recorded(as_it_stands, gpu)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator).to(gpu)
        draws = torch.arange(16 * step, 16 * (step + 1), device=gpu)
        assert torch.equal(recorded(images, draws), as_it_stands(images, draws))
