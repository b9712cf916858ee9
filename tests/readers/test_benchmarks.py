from pathlib import Path

from spice_ray.readers.benchmarks import open_benchmark


def test_what_is_no_benchmark_is_left_to_others(tmp_path: Path) -> None:
    # One name that a benchmark uses too proves nothing.
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "meta").write_text("notes")
    (tmp_path / "batches.meta").write_text("notes")
    (tmp_path / "train_X.bin").write_text("notes")
    assert open_benchmark(str(tmp_path)) is None
    assert open_benchmark(str(tmp_path / "meta")) is None
    assert open_benchmark(str(tmp_path / "nowhere")) is None
    assert open_benchmark("imagenet11:/data") is None
    assert open_benchmark("s3://bucket/cifar-10-batches-py") is None
    assert open_benchmark("digits") is None
    assert open_benchmark("") is None
