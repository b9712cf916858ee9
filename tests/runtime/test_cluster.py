import os
import time

import pytest
import ray
import ray.data

from spice_ray.config import Scale
from spice_ray.errors import DataError, ResourceError, TrainingError
from spice_ray.runtime.cluster import check_local_cpus, connected, gpu_shares, num_workers, room
from spice_ray.runtime.reading import prepare_context
from spice_ray.runtime.train import most_of

pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote
def fail(error: Exception) -> None:
    raise error


def test_a_users_error_comes_back_from_a_worker_as_itself() -> None:
    with pytest.raises(DataError, match=r"^the folder is empty$"), connected(Scale(), verbose=False):
        ray.get(fail.remote(DataError("the folder is empty")))


def test_any_other_failure_of_a_worker_becomes_one_sentence() -> None:
    with pytest.raises(TrainingError) as caught, connected(Scale(), verbose=False):
        ray.get(fail.remote(ZeroDivisionError("by zero")))
    assert "by zero" in str(caught.value)
    assert "\n" not in str(caught.value)


def refuse(_row: dict[str, int]) -> dict[str, int]:
    raise ZeroDivisionError("by zero")


def test_a_failure_in_ray_data_is_named_without_its_advice() -> None:
    prepare_context()
    with pytest.raises(TrainingError) as caught, connected(Scale(), verbose=False):
        ray.data.range(1).map(refuse).materialize()
    assert "failed (ZeroDivisionError: by zero); run" in str(caught.value)


def test_one_cpu_is_left_for_the_tasks_that_read() -> None:
    cpus = os.cpu_count() or 1
    assert room(1, 0) == cpus
    assert room(cpus, 0) == 1
    assert room(cpus + 1, 0) == 0
    assert room(1, 1) == 0


@pytest.mark.parametrize(
    ("gpus", "each", "workers"), [(2, 0.6, 2), (2, 0.5, 4), (1, 0.2, 5), (8, 1, 8), (7, 2, 3), (0, 1, 0), (2, 0.4, 4)]
)
def test_a_part_of_a_gpu_is_of_one_gpu(gpus: float, each: float, workers: int) -> None:
    assert gpu_shares(gpus, each) == workers


@pytest.mark.parametrize(("held", "expected"), [(0, 1), (1, 1), (3, 2), (4, 4), (100, 8)])
def test_the_most_workers_that_fit_are_taken(held: int, expected: int) -> None:
    assert most_of([1, 2, 4, 8], held) == expected


def test_auto_workers_are_all_that_the_cluster_holds() -> None:
    cpus = os.cpu_count() or 1
    assert num_workers(Scale(workers=1)) == 1
    assert num_workers(Scale(workers="auto")) == cpus
    assert num_workers(Scale(workers="auto", cpus_per_worker=cpus)) == 1
    with (
        pytest.raises(ResourceError, match=rf"scale.workers=auto with scale.cpus_per_worker={cpus + 1} need"),
        connected(Scale(workers="auto", cpus_per_worker=cpus + 1), verbose=False),
    ):
        pytest.fail("connected let the workers through")


def test_workers_that_never_fit_are_refused_at_once() -> None:
    cpus = os.cpu_count() or 1
    check_local_cpus(Scale(workers=cpus))
    with pytest.raises(ResourceError, match=rf"scale.workers={cpus + 1} .* has {cpus}"):
        check_local_cpus(Scale(workers=cpus + 1))
    with (
        pytest.raises(ResourceError, match=r"1000 GPUs in all and the cluster has \d+"),
        connected(Scale(gpus_per_worker=1000), verbose=False),
    ):
        pytest.fail("connected let the workers through")


def test_a_cluster_that_does_not_grow_in_time_is_refused_and_asked_for_nothing_more() -> None:
    workers = room(1, 0) + 1
    start = time.monotonic()
    with (
        pytest.raises(ResourceError, match="lower one of them"),
        connected(Scale(workers=workers, wait_seconds=1), verbose=False),
    ):
        pytest.fail("it has no room for them")
    assert 1 <= time.monotonic() - start < 30
    with connected(Scale(workers=1, wait_seconds=60), verbose=False):
        assert time.monotonic() - start < 30  # what is there is not waited for
