"""How much memory a worker may fill with images, and where they go."""

from pathlib import Path
from typing import NamedTuple

import torch

from spice_ray.config import Scale
from spice_ray.errors import ResourceError

_SHARE = 0.5
"""Of what is free: models, views and other programs need the rest."""
_CGROUP = Path("/sys/fs/cgroup")


class Budget(NamedTuple):
    """Bytes of images that a worker may hold."""

    on_device: int
    on_host: int


def device_of(gpus: float) -> torch.device:
    """Where a process computes that Ray has given so many GPUs, or a part of one.

    Raises:
        ResourceError: It was given one, and torch finds none.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            "a process was given a GPU and torch finds none; see that every node with GPUs has their driver and a "
            "torch with CUDA, or leave out scale.gpus_per_worker and scale.head_gpus"
        )
    return torch.device("cuda")


def image_budget(scale: Scale, device: torch.device, num_sharing: int) -> Budget:
    """What one of ``num_sharing`` workers of a machine may hold on its device and in main memory.

    ``scale.resident_memory`` counts for both, but no more of a GPU is taken than the share of what is free there.
    """
    on_host = int(free_memory() * _SHARE / num_sharing)
    if scale.resident_memory is not None:
        on_host = int(scale.resident_memory * (1 << 30))
    if device.type != "cuda":
        return Budget(on_host, on_host)
    on_device = free_on_device(device, scale.gpus_per_worker)
    return Budget(on_device if scale.resident_memory is None else min(on_device, on_host), on_host)


def free_on_device(device: torch.device, gpus: float) -> int:
    """What one process that was given ``gpus`` GPUs may hold there, bytes; 0 where the device is none."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()  # what an earlier stage of this process has let go of is free too
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _SHARE * min(1.0, gpus))


def home_of(num_bytes: int, device: torch.device, budget: Budget) -> torch.device | None:
    """Where images of that size are kept: on the device, else in main memory; None where both are too small."""
    if num_bytes <= budget.on_device:
        return device
    return torch.device("cpu") if num_bytes <= budget.on_host else None


def free_memory() -> int:
    """Bytes of main memory that are free for programs, within the limit of the container if there is one."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) << 10
    return min(available, _free_in_container(available))


def _free_in_container(otherwise: int) -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return otherwise  # no container, or an old kind of it
    # Files that were read lately count as used, and are let go of when a program wants the room.
    used -= int(fields.get("inactive_file", 0))
    return otherwise if limit == "max" else max(0, int(limit) - used)
