"""No benchmark: what a result was measured with, and where it is written."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "numpy", "pillow", "kornia", "kornia-rs", "lightly", "faiss-cpu")


def surroundings() -> dict[str, Any]:
    """Commit, processor and versions."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + (" and changes" if _git("status", "--porcelain") else ""),
        "processor": f"{os.cpu_count()} x {processor[0].partition(': ')[2]}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)},
    }


def write_results(results: dict[str, Any], file: Path | None) -> None:
    """Write results with their surroundings as JSON, where a file is named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"surroundings": surroundings(), **results}, indent=1) + "\n")


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def _is_installed(name: str) -> bool:
    return any(found.metadata["Name"] == name for found in importlib.metadata.distributions(name=name))
