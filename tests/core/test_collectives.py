"""Collective operations: identities for one worker, and real processes that compute what one process computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

from spice_ray.core import collectives

LANES, ROWS = 3, 4


def test_one_worker_keeps_what_it_has():
    rows, module = torch.arange(12.0).view(6, 2), nn.BatchNorm2d(2)
    module(torch.randn(4, 2, 3, 3))
    before = [buffer.clone() for buffer in module.buffers()]
    assert collectives.world_size() == 1
    assert collectives.rank() == 0
    assert torch.equal(collectives.gather_lanes(rows, 3), rows)
    assert torch.equal(collectives.own_lanes(rows, 3), rows)
    assert torch.equal(collectives.mean_over_workers(rows), rows)
    assert collectives.first_worker_decides(True, rows.device) is True
    assert collectives.first_worker_decides(False, rows.device) is False
    collectives.average_buffers(module)
    assert all(torch.equal(new, old) for new, old in zip(module.buffers(), before, strict=True))


def test_buffers_survive_a_round_trip_and_the_snapshot_is_a_copy():
    module = nn.BatchNorm2d(2)
    module(torch.randn(4, 2, 3, 3))
    kept = collectives.stacked_buffers(module)
    before = kept.clone()
    assert kept.shape == (1, 4)  # means and variances; the count of batches is no statistic
    mean, var = module.running_mean.clone(), module.running_var.clone()
    module(5 + torch.randn(4, 2, 3, 3))
    assert torch.equal(kept, before)
    collectives.restore_buffers(module, kept)
    assert torch.equal(module.running_mean, mean)
    assert torch.equal(module.running_var, var)


def test_buffers_of_another_number_of_workers_come_back_as_their_mean():
    module = nn.BatchNorm2d(2)
    collectives.restore_buffers(module, torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 6.0, 5.0, 0.0]]))
    assert module.running_mean.tolist() == [2, 4]
    assert module.running_var.tolist() == [4, 2]


# With two workers of three lanes each, four rows to a lane; a row is named 100 * lane + its number within the lane.


def norm_of(rank: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(2)
    module.running_mean.fill_(rank + 1.0)
    module.running_var.fill_(10.0 * (rank + 1))
    return module


def work(rank: int, folder: Path) -> None:
    """What each worker does; runs in processes of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert (collectives.rank(), collectives.world_size()) == (rank, 2)
    lanes = torch.arange(rank * LANES, (rank + 1) * LANES)
    own = (100 * lanes[None, :] + torch.arange(ROWS)[:, None]).flatten()
    gathered = collectives.gather_lanes(own, LANES)
    averaged, restored = norm_of(rank), nn.BatchNorm2d(2)
    collectives.average_buffers(averaged)
    stacked = collectives.stacked_buffers(norm_of(rank))
    collectives.restore_buffers(restored, stacked)
    value = torch.tensor([float(rank), 4.0])
    result = {
        "own": own,
        "gathered": gathered,
        "back": collectives.own_lanes(gathered, LANES),
        "wide": collectives.gather_lanes(own.view(-1, 1, 1).expand(-1, 2, 2), LANES),
        "mean": collectives.mean_over_workers(value),
        "value": value,
        "averaged": averaged.state_dict(),
        "stacked": stacked,
        "restored": restored.state_dict(),
        "decisions": [collectives.first_worker_decides(d, own.device) for d in (rank == 0, rank == 1)],
    }
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_gathered_batch_is_interleaved_over_all_lanes_on_every_worker(workers):
    expected = [100 * lane + row for row in range(ROWS) for lane in range(2 * LANES)]
    for result in workers:
        assert result["gathered"].tolist() == expected
        assert result["wide"].shape == (24, 2, 2)
        assert result["wide"][:, 1, 1].tolist() == expected


def test_own_lanes_is_the_inverse_of_gathering(workers):
    for result in workers:
        assert torch.equal(result["back"], result["own"])


def test_means_are_over_workers_and_leave_their_argument_alone(workers):
    for rank, result in enumerate(workers):
        assert result["mean"].tolist() == [0.5, 4.0]
        assert result["value"].tolist() == [rank, 4.0]


def test_averaged_statistics_are_the_mean_on_every_worker(workers):
    for result in workers:
        assert result["averaged"]["running_mean"].tolist() == [1.5, 1.5]
        assert result["averaged"]["running_var"].tolist() == [15.0, 15.0]


def test_every_worker_gets_its_own_statistics_back(workers):
    for rank, result in enumerate(workers):
        assert result["stacked"].tolist() == [[1, 1, 10, 10], [2, 2, 20, 20]]
        assert result["restored"]["running_mean"].tolist() == [rank + 1] * 2
        assert result["restored"]["running_var"].tolist() == [10 * (rank + 1)] * 2


def test_all_workers_do_what_the_first_decides(workers):
    assert [result["decisions"] for result in workers] == [[True, False], [True, False]]


if __name__ == "__main__":
    start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
