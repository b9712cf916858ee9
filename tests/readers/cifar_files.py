import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the published batches hold."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, data: bytes) -> None:
        short = len(data) < 256
        self.write(b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data)))
        self.write(data)
        self.memoize(data)

    dispatch[bytes] = save_string


def python2_pickle(content: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    # The module's name in the versions of NumPy that Python 2 had.
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_rows(first: int, num_rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Row i is i everywhere, but red 201 at row 2, column 5, green 102 at row 0, column 31, blue 53 at row 31, 0."""
    rows = np.repeat(np.arange(first, first + num_rows, dtype=np.uint8)[:, None], 3072, axis=1)
    rows[:, 2 * 32 + 5] = 201
    rows[:, 1024 + 31] = 102
    rows[:, 2048 + 31 * 32] = 53
    return rows


def put_python_cifar10(folder: Path, rows_per_batch: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([*BATCHES, "test_batch"]):
        content = {
            b"batch_label": b"training batch",
            b"labels": [(number + row) % 10 for row in range(rows_per_batch)],
            b"data": cifar_rows(number * rows_per_batch, rows_per_batch),
            b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * rows_per_batch,
        }
        (folder / name).write_bytes(python2_pickle(content))
    (folder / "batches.meta").write_bytes(python2_pickle({b"num_vis": 3072, b"label_names": [b"airplane"]}))
    return folder


def put_binary_cifar10(folder: Path, rows_per_batch: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([*BATCHES, "test_batch"]):
        rows = cifar_rows(number * rows_per_batch, rows_per_batch)
        labels = [(number + row) % 10 for row in range(rows_per_batch)]
        packed = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))
        (folder / f"{name}.bin").write_bytes(packed)
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")
    return folder


def put_cifar100(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, first, num_rows in [("train", 0, 5), ("test", 5, 2)]:
        content = {
            b"filenames": [b"bos_taurus_s_000507.png"] * num_rows,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": [99 - row for row in range(num_rows)],
            b"coarse_labels": [(first + 15 + row) % 20 for row in range(num_rows)],
            b"data": cifar_rows(first, num_rows),
        }
        (folder / name).write_bytes(python2_pickle(content))
    (folder / "meta").write_bytes(python2_pickle({b"coarse_label_names": [b"aquatic_mammals"]}))
    return folder
