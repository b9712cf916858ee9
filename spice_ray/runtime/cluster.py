"""Ray started on this machine, or the cluster that RAY_ADDRESS names."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from spice_ray.config import Scale
from spice_ray.errors import ResourceError

# Ray Data's new Parquet reader starts 32 processes per execution; Ray Train polls its workers every 2 s by default.
_ENVIRONMENT = {
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_SILENCE = {"RAY_BACKEND_LOG_LEVEL": "fatal", "PYTHONWARNINGS": "ignore"}


def check_local_cpus(scale: Scale) -> None:
    """Refuse, before Ray is imported, what this machine cannot run; on a cluster :func:`connected` checks.

    Raises:
        ResourceError: More processors asked for than there are.
    """
    if "RAY_ADDRESS" not in os.environ:
        _check_cpus(scale, os.cpu_count() or 1, "this machine")


def _check_cpus(scale: Scale, available: int, where: str) -> None:
    wanted = scale.workers * scale.cpus_per_worker
    if wanted > available:
        raise ResourceError(
            f"scale.workers={scale.workers} with scale.cpus_per_worker={scale.cpus_per_worker} need {wanted} CPUs and "
            f"{where} has {available}; lower one of them"
        )


@contextmanager
def connected(scale: Scale, *, verbose: bool) -> Iterator[None]:
    """Ray for as long as the context lasts.

    Raises:
        ResourceError: The cluster has too few processors or GPUs; Ray would wait for them for ever.
    """
    environment = _ENVIRONMENT if verbose else {**_ENVIRONMENT, **_SILENCE}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray

    with _quiet(verbose):
        if ray.is_initialized():
            _check_cluster(scale)
            yield
            return
        folder = None
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=verbose, runtime_env={"env_vars": environment})
        else:
            folder = _start_local(verbose)
        try:
            _check_cluster(scale)
            yield
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _start_local(verbose: bool) -> str:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    # Sockets live below this folder, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="spice-", dir="/tmp" if os.path.isdir("/tmp") else None)
    ray.init(
        address="local",
        # One more than there are: Ray Data's reading tasks must find a place beside training workers on every CPU.
        num_cpus=(os.cpu_count() or 1) + 1,
        include_dashboard=False,
        log_to_driver=verbose,
        _temp_dir=folder,
    )
    return folder


def _check_cluster(scale: Scale) -> None:
    import ray

    resources = ray.cluster_resources()
    _check_cpus(scale, int(resources.get("CPU", 0)) - 1, "the cluster, but for one that reads data,")
    gpus, wanted = resources.get("GPU", 0.0), scale.workers * scale.gpus_per_worker
    if wanted > gpus:
        raise ResourceError(
            f"scale.workers={scale.workers} with scale.gpus_per_worker={scale.gpus_per_worker:g} need {wanted:g} GPUs "
            f"and the cluster has {gpus:g}; lower one of them"
        )
    if scale.head_gpus > gpus:
        raise ResourceError(f"scale.head_gpus={scale.head_gpus:g} is more than the cluster's {gpus:g} GPUs; lower it")


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keep Ray's log from the user; Ray Data sets up its loggers anew whenever it runs, so levels would not last."""
    before = logging.root.manager.disable
    if not verbose:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
