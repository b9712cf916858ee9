"""Arrays in files that are filled by one shard file after another, and kept where that is interrupted."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RECORD = "done.json"


class PartialArrays:
    """Mapped .npy files, and the names of the shard files that are in them.

    They stay on the node that fills them, also in a run on a server: another one begins anew.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, type[np.floating]],
        seconds: float,
    ) -> None:
        """Open what an interrupted attempt has left, or begin with zeros.

        Args:
            folder: Theirs alone; its name says what they hold.
            shapes: By name.
            dtypes: By name.
            seconds: Between two records of what is done.
        """
        self._folder, self._seconds = folder, seconds
        self.done: set[str] = set()
        """Names of shard files."""
        self.arrays: dict[str, NDArray[Any]] = {}
        if not self._open(shapes, dtypes):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.done = set()
            self.arrays = {
                name: np.lib.format.open_memmap(self._file(name), mode="w+", dtype=dtypes[name], shape=shape)
                for name, shape in shapes.items()
            }
        self._due = time.monotonic() + seconds

    def note(self, name: str) -> None:
        """The rows of that shard file are in the arrays."""
        self.done.add(name)
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """From here on an interrupted attempt goes on."""
        self._flush()
        temporary = self._folder / f".{_RECORD}"
        with temporary.open("w") as stream:
            stream.write(json.dumps(sorted(self.done)))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self._folder / _RECORD)
        self._due = time.monotonic() + self._seconds

    def hand_over(self, folder: Path) -> None:
        """Put the files, all of which are full, where they belong; here they stay until they are published."""
        self.save()
        for name in self.arrays:
            try:
                os.link(self._file(name), folder / f"{name}.npy")
            except OSError:  # another disk, or one that has no links
                shutil.copyfile(self._file(name), folder / f"{name}.npy")

    def _open(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, type[np.floating]]) -> bool:
        """Take up what is there; gives whether it is what is wanted."""
        try:
            self.done = set(json.loads((self._folder / _RECORD).read_text()))
            for name in shapes:
                np.load(self._file(name), mmap_mode="r")  # to write, a file that is too short would be made longer
            self.arrays = {name: np.load(self._file(name), mmap_mode="r+") for name in shapes}
        except (OSError, EOFError, ValueError, TypeError):  # there is nothing, or it lost its end with the power
            return False
        return all(
            (array.shape, array.dtype) == (shapes[name], np.dtype(dtypes[name])) for name, array in self.arrays.items()
        )

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _flush(self) -> None:
        for array in self.arrays.values():
            assert isinstance(array, np.memmap)
            array.flush()
