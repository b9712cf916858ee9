"""GPUs that Ray counts and torch does not have: what they are asked for is computed by the processor.

``python -m tests.pretended_gpu COMMAND ...`` runs a command of spice-ray in a Ray with one such GPU; the command ``map
FOLDER`` hands the images of shards to actors with half of one.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


def pretend() -> None:
    """In every process, before anything asks where to compute."""
    import torch
    from ray.air._internal import device_manager

    from spice_ray.runtime import memory

    memory.device_of = lambda gpus: torch.device("cpu")
    device_manager.SUPPORTED_ACCELERATOR_TORCH_DEVICE_MANAGER["GPU"] = device_manager.CPUTorchDeviceManager


class Numbers:
    """An actor that gives each image its own number."""

    def __init__(self, job: Any) -> None:
        del job

    def __call__(self, table: Any) -> Any:
        """Rows of one number."""
        import torch

        from spice_ray.runtime.inference import _rows

        return _rows(table, torch.from_numpy(table["sample_id"].to_numpy().copy()).float()[:, None])


def hand_out(folder: str) -> None:
    """Print what actors say of each image of the shards ``a``."""
    from spice_ray.config import Scale
    from spice_ray.runtime.data import open_shards
    from spice_ray.runtime.inference import map_images
    from spice_ray.storage import open_artifact

    shards, found = open_artifact(Path(folder), "shards", "a"), list[tuple[int, int]]()
    assert shards is not None
    actor: Any = Numbers
    job: Any = None

    def take(rows: Any, values: Any) -> None:
        found.extend(zip(rows["sample_id"].to_pylist(), values[:, 0].astype(int).tolist(), strict=True))

    opened = open_shards(shards, None)
    map_images(actor, job, opened, opened.readable, Scale(gpus_per_worker=0.5), take, lambda done, total: None)
    print(json.dumps(sorted(found)))


def main() -> None:
    import ray

    from spice_ray.cli import main as command
    from tests.servers import free_port

    folder = tempfile.mkdtemp(prefix="pretended-")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    pretend()
    try:
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            dashboard_port=free_port(),
            runtime_env={"worker_process_setup_hook": "tests.pretended_gpu.pretend"},
        )
        if sys.argv[1] == "map":
            hand_out(sys.argv[2])
        else:
            command()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.argv[0] = "spice-ray"
    main()
