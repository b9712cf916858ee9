"""GPUs that Ray counts and torch does not have: what they are asked for is computed by the processor.

``python -m tests.pretended_gpu COMMAND ...`` runs a command of spice-ray in a Ray with one such GPU.
"""

import os
import shutil
import sys
import tempfile


def pretend() -> None:
    """In every process, before anything asks where to compute."""
    import torch
    from ray.air._internal import device_manager

    from spice_ray.runtime import memory

    memory.device_of = lambda gpus: torch.device("cpu")
    device_manager.SUPPORTED_ACCELERATOR_TORCH_DEVICE_MANAGER["GPU"] = device_manager.CPUTorchDeviceManager


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
        command()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.argv[0] = "spice-ray"
    main()
