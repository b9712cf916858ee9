"""The most memory that this process has held."""

from pathlib import Path


def peak_megabytes() -> float:
    """MB resident at the peak.

    Not by getrusage, whose figure begins with that of the process that started this one: a rise would be lost in it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
