import os
from pathlib import Path

from spice_ray.readers.benchmarks import open_benchmark
from spice_ray.readers.folder import walk
from spice_ray.readers.places import Place
from spice_ray.readers.tree import Tree


def test_what_is_no_benchmark_is_left_to_others(tmp_path: Path) -> None:
    # One name that a benchmark uses too proves nothing.
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "meta").write_text("notes")
    (tmp_path / "batches.meta").write_text("notes")
    (tmp_path / "train_X.bin").write_text("notes")
    folder = Place(str(tmp_path))
    assert open_benchmark(Tree(folder, tuple(walk(folder)))) is None
    # Of two names of STL-10's one is a pipe, which nobody writes to.
    os.mkfifo(tmp_path / "train_y.bin")
    assert open_benchmark(Tree(folder)) is None
