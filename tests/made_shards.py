"""Image shards without an ingest."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spice_ray.readers.parts import write_part
from spice_ray.storage import Artifact, publish

SIZE, NUM_IMAGES = 32, 64


def make_shards(root: Path, print_: str, seed: int = 0) -> Artifact:
    """Image shards in the layout of the contract, four files of 16 images."""
    pixels = np.random.default_rng(seed).integers(0, 256, (NUM_IMAGES, 3 * SIZE * SIZE), dtype=np.uint8)

    def write(folder: Path) -> dict[str, Any]:
        files = []
        for number, ids in enumerate(np.arange(NUM_IMAGES).reshape(4, 16)):
            images = pa.array([row.tobytes() for row in pixels[ids]], pa.binary(3 * SIZE * SIZE))
            columns = {"sample_id": ids, "source": [f"{i}.png" for i in ids], "split": ["train"] * 16, "image": images}
            name = f"part-{number:05d}.parquet"
            crc32 = write_part(folder / name, pa.table(columns))
            files.append({"name": name, "rows": 16, "splits": {"train": 16}, "crc32": crc32})
        counts = {"num_images": NUM_IMAGES, "image_size": SIZE, "splits": {"train": NUM_IMAGES}, "num_rejects": 0}
        return {**counts, "stored": "pixels", "files": files, "digest": print_}

    return publish(root, "shards", print_, write)
