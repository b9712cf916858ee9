"""Take a random part of image Parquet files, as Parquet and as a folder of the same encoded bytes.

    python benchmarks/subset.py OUT --rows 6000 FILE.parquet ...

writes OUT/parquet/train.parquet (image bytes and label) and OUT/folder/<label>/<number>.png.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", type=Path, help="files with an image struct and a label column")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = pa.concat_tables([pq.read_table(file) for file in options.files])
    rows = np.random.default_rng(options.seed).permutation(len(table))[: options.rows]
    part = table.take(np.sort(rows))
    (image,) = (name for name in part.schema.names if pa.types.is_struct(part.schema.field(name).type))
    (label,) = (name for name in part.schema.names if name != image)
    images = [value["bytes"] for value in part[image].to_pylist()]
    labels = part[label].to_pylist()
    (options.out / "parquet").mkdir(parents=True)
    pq.write_table(pa.table({"image": images, "label": labels}), options.out / "parquet" / "train.parquet")
    for number, (data, name) in enumerate(zip(images, labels, strict=True)):
        file = options.out / "folder" / str(name) / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    print(f"{len(images)} images, {len(set(labels))} labels in {options.out}")


if __name__ == "__main__":
    main()
