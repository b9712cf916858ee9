"""Ray started on this machine, or the cluster that RAY_ADDRESS names."""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from spice_ray.config import Scale
from spice_ray.errors import ResourceError, SpiceError, TrainingError

# Ray Data's new Parquet reader starts 32 processes per execution; Ray Train polls its workers every 2 s by default, and
# its preemption watcher is one more process, whose warnings are of use only to a loop that asks for them.
_ENVIRONMENT = {
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ATTEMPTS = 2
_SECONDS_BETWEEN_LOOKS = 2
_SILENCE = {"RAY_BACKEND_LOG_LEVEL": "fatal", "PYTHONWARNINGS": "ignore", "RAY_AIR_NEW_OUTPUT": "0"}


def check_local_cpus(scale: Scale) -> None:
    """Refuse, before Ray is imported, what this machine cannot run; on a cluster :func:`connected` checks.

    Raises:
        ResourceError: More processors asked for than there are.
    """
    if "RAY_ADDRESS" not in os.environ:
        _check_cpus(scale, os.cpu_count() or 1, "this machine")


def _check_cpus(scale: Scale, available: int, where: str) -> None:
    wanted = scale.least_workers * scale.cpus_per_worker
    if wanted > available:
        raise ResourceError(
            f"scale.workers={scale.workers} with scale.cpus_per_worker={scale.cpus_per_worker} need {wanted} CPUs and "
            f"{where} has {available}; lower {'scale.cpus_per_worker' if scale.workers == 'auto' else 'one of them'}"
        )


@contextmanager
def connected(scale: Scale, *, verbose: bool) -> Iterator[None]:
    """Ray for as long as the context lasts.

    Raises:
        ResourceError: The cluster does not answer, or has too few processors or GPUs: Ray would wait for ever.
        SpiceError: One that was raised in another process, as itself.
        TrainingError: Ray lost a process, or one failed.
    """
    environment = _ENVIRONMENT if verbose else {**_ENVIRONMENT, **_SILENCE}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray

    with _quiet(verbose):
        folder = None if ray.is_initialized() else _start(verbose, environment)
        try:
            with grown(scale, scale.least_workers):
                check_cluster(scale)
                yield
        except ray.exceptions.RayError as error:
            raise _as_user_error(error) from error
        finally:
            if folder is not None:
                ray.shutdown()
                shutil.rmtree(folder, ignore_errors=True)


def place_of_ray() -> str:
    """Which Ray :func:`connected` will use, in a sentence."""
    if "RAY_ADDRESS" in os.environ:
        return f"using the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
    return "starting Ray on this machine; RAY_ADDRESS=auto would use a cluster that it belongs to"


def find_spice_error(error: BaseException | None) -> SpiceError | None:
    """The error of ours that Ray wrapped, as often as it did, or None."""
    import ray

    # What Ray raises for an error of ours is of both classes, and its text is a traceback.
    while error is not None and (isinstance(error, ray.exceptions.RayError) or not isinstance(error, SpiceError)):
        error = getattr(error, "cause", None) or error.__cause__
    # Below the sentence Ray Data adds advice about its own settings.
    return None if error is None else type(error)(str(error).partition("\n")[0])


def _as_user_error(error: Exception) -> SpiceError:
    ours = find_spice_error(error)
    if ours is not None:
        return ours
    return TrainingError(
        f"a process on the cluster failed ({_what_failed(error)}); run the same command again to go on, with --verbose "
        "to see more"
    )


def _what_failed(error: Exception) -> str:
    """The cause in a line; Ray wraps it in a traceback, and Ray Data adds advice about its own settings below it."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    if not lines:
        return type(cause or error).__name__
    return lines[-1] if cause is None else f"{type(cause).__name__}: {lines[0]}"


def _start(verbose: bool, environment: dict[str, str]) -> str:
    """Connect to the cluster that RAY_ADDRESS names, or start one here; gives a folder to remove afterwards."""
    # Sockets live below this folder, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="spice-", dir="/tmp" if os.path.isdir("/tmp") else None)
    with _without_stderr(verbose):
        if "RAY_ADDRESS" in os.environ:
            _connect({name: os.environ[name] for name in environment if name not in _names_set_by_job()}, verbose)
            return folder
        _start_local(folder, verbose)
    return folder


def _start_local(folder: str, verbose: bool) -> None:
    """Start Ray here; a second time where its processes were too slow for it the first time."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    for attempt in range(_ATTEMPTS):
        try:
            ray.init(
                address="local",
                # One more than there are: reading tasks must find a place beside training workers on every CPU.
                num_cpus=(os.cpu_count() or 1) + 1,
                include_dashboard=False,
                log_to_driver=verbose,
                _temp_dir=folder,
            )
            return
        except Exception as error:  # a bare one is what Ray raises after 30 s of waiting for its own processes
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            if attempt + 1 == _ATTEMPTS:
                raise ResourceError(
                    f"Ray did not start on this machine ({' '.join(str(error).split())}); if the machine is busy, run "
                    "the same command again later"
                ) from error


def _connect(environment: dict[str, str], verbose: bool) -> None:
    import ray

    try:
        ray.init(log_to_driver=verbose, runtime_env={"env_vars": environment})
    except ConnectionError:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}; correct it, or unset it to use this "
            "machine"
        ) from None


def _names_set_by_job() -> set[str]:
    """Variables that the submitted job's own runtime environment sets: Ray refuses to be told twice."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return set((config.get("runtime_env") or {}).get("env_vars") or {})


@contextmanager
def _without_stderr(verbose: bool) -> Iterator[None]:
    """Keep what Ray's C++ core says while it starts from the terminal; no logging level reaches it."""
    if verbose:
        yield
        return
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def room(cpus: int, gpus: float) -> int:
    """How many workers of that size the nodes of the cluster hold, with one CPU left for the tasks that read data."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = sum(int(min(node.get("CPU", 0) / cpus, gpu_shares(node.get("GPU", 0), gpus))) for node in nodes)
    spare = sum(node.get("CPU", 0) for node in nodes) - 1
    return min(held, int(spare / cpus))


def gpu_shares(gpus: float, each: float) -> float:
    """How many workers share a node's GPUs; a part of a GPU is always one of the same GPU."""
    if each == 0:
        return math.inf
    # 1 / 0.2 may lie below 5 in the arithmetic of floats.
    return int(gpus) * int(1 / each + 1e-9) if each < 1 else int(gpus / each + 1e-9)


def num_workers(scale: Scale) -> int:
    """``scale.workers``, or as many as the nodes of the cluster hold now, and at least one."""
    return scale.workers if scale.workers != "auto" else max(1, room(scale.cpus_per_worker, scale.gpus_per_worker))


def check_cluster(scale: Scale) -> None:
    """Refuse what the cluster has no room for: Ray would wait for ever.

    Raises:
        ResourceError: Says what is too much.
    """
    import ray

    resources = ray.cluster_resources()
    _check_cpus(scale, int(resources.get("CPU", 0)) - 1, "the cluster, but for one that reads data,")
    gpus = resources.get("GPU", 0.0)
    for name, wanted in (
        ("gpus_per_worker", scale.least_workers * scale.gpus_per_worker),
        ("head_gpus", scale.head_gpus),
    ):
        if wanted > gpus:
            raise ResourceError(f"scale.{name} asks for {wanted:g} GPUs in all and the cluster has {gpus:g}; lower it")
    held = room(scale.cpus_per_worker, scale.gpus_per_worker)
    if scale.least_workers > held:
        raise ResourceError(
            f"scale.workers={scale.workers} do not fit on the nodes of the cluster, which hold {held} workers of "
            f"{scale.cpus_per_worker} CPUs and {scale.gpus_per_worker:g} GPUs; lower "
            f"{'their size' if scale.workers == 'auto' else 'scale.workers or their size'}"
        )


@contextmanager
def grown(scale: Scale, workers: int) -> Iterator[None]:
    """A cluster that grows by itself, asked to hold so many workers for as long as the context lasts.

    Left to itself it grows for what waits for room, and a run refuses what the cluster has no room for.
    """
    if not scale.wait_seconds:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": scale.cpus_per_worker, "GPU": scale.gpus_per_worker}
    wanted = [{name: amount for name, amount in worker.items() if amount} for _ in range(workers)]
    request_resources(bundles=[*wanted, {"CPU": 1}])
    try:
        deadline = time.monotonic() + scale.wait_seconds
        while room(scale.cpus_per_worker, scale.gpus_per_worker) < workers and time.monotonic() < deadline:
            time.sleep(min(_SECONDS_BETWEEN_LOOKS, scale.wait_seconds))
        yield
    finally:
        request_resources(bundles=[])


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keep Ray's log from the user; Ray Data sets up its loggers anew whenever it runs, so levels would not last."""
    before = logging.root.manager.disable
    if not verbose:
        logging.disable(logging.CRITICAL)  # Ray Data logs an error with its traceback before it raises it
    try:
        yield
    finally:
        logging.disable(before)
