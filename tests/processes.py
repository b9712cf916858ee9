"""Actors that a test has started, for those that kill one."""

import os
from pathlib import Path


def own_actors(name: str) -> list[int]:
    """Process numbers of the actors of that class below this process: other programs may have some too."""
    mine = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if os.getpid() in _ancestors_of(pid)]
    return [pid for pid in mine if _read(pid, "cmdline").startswith(f"ray::{name}")]


def _ancestors_of(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(_read(pid, "stat").rpartition(")")[2].split()[1] or 0)
        found.append(pid)
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ") gone 0"  # it has ended
