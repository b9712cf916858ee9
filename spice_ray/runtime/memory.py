"""How much memory a worker may fill with images."""

from pathlib import Path

import torch

from spice_ray.config import Scale

_SHARE = 0.5
"""Of what is free: models, views and other programs need the rest."""
_CGROUP = Path("/sys/fs/cgroup")


def image_budget(scale: Scale, device: torch.device, num_sharing: int) -> int:
    """Bytes of images that one of ``num_sharing`` workers of a machine may hold, on its GPU where it has one."""
    if scale.resident_memory is not None:
        return int(scale.resident_memory * (1 << 30))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _SHARE * min(1.0, scale.gpus_per_worker))
    return int(free_memory() * _SHARE / num_sharing)


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
    except OSError:
        return otherwise  # no container, or an old kind of it
    return otherwise if limit == "max" else max(0, int(limit) - used)
