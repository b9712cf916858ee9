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
    "TOKENIZERS_PARALLELISM": "false",
}
_CHATTY = ("ray", "ray.data", "ray.train", "ray.tune", "ray._private", "py.warnings")


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
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        _check_cluster(scale)
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    folder = None
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=verbose, logging_level=level, runtime_env={"env_vars": _ENVIRONMENT})
    else:
        folder = _start_local(verbose, level)
    _quieten(level)
    try:
        _check_cluster(scale)
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start_local(verbose: bool, level: int) -> str:
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
        logging_level=level,
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


def _quieten(level: int) -> None:
    for name in _CHATTY:
        logging.getLogger(name).setLevel(level)
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = level <= logging.INFO
    context.use_datasource_v2 = False
    context.execution_options.preserve_order = True
