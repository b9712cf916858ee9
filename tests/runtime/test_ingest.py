import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from PIL import Image

from spice_ray import intake
from spice_ray.config import Scale
from spice_ray.core.lanes import serve
from spice_ray.errors import DataError, StorageError
from spice_ray.readers.decode import decode
from spice_ray.readers.parts import PartFormat, read_part
from spice_ray.readers.source import open_source
from spice_ray.runtime.data import load_rows, open_shards
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import Done, Reporter, SilentReporter
from spice_ray.runtime.reading import find_damaged
from spice_ray.shards import find_shards
from spice_ray.storage import Artifact, clear_staging

pytestmark = pytest.mark.usefixtures("local_ray")
SIZE = 8


def png(value: int) -> bytes:
    """A small image whose content follows from ``value``."""
    pixels = np.random.default_rng(value).integers(0, 256, (SIZE + value % 3, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def shards_of(
    path: Path,
    root: Path,
    *,
    seed: int = 0,
    labels: bool = False,
    image_size: int = SIZE,
    reporter: Reporter | None = None,
) -> tuple[Artifact, Artifact | None]:
    shown = reporter or SilentReporter()
    return ingest(open_source(str(path), labels), root, image_size=image_size, seed=seed, reporter=shown)


def parts(shards: Artifact) -> list[pa.Table]:
    return [pq.read_table(shards.path / file["name"]) for file in shards.manifest["files"]]


def rows(shards: Artifact) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pa.concat_tables(parts(shards)).to_pylist()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def without_source(shards: Artifact) -> list[tuple[object, ...]]:
    return [(row["sample_id"], row["split"], row["image"]) for row in rows(shards)]


MIXED = {
    **{f"train/{i:02d}.png": png(i) for i in range(20)},
    **{f"test/{i}.png": png(100 + i) for i in range(5)},
    **{f"unlabeled/{i}.png": png(200 + i) for i in range(3)},
}


def test_copies_are_counted_wherever_the_files_part_them(tmp_path: Path) -> None:
    # 16 files of 2 or 3 rows: 9 images of one content stand in four or five of them.
    files = {f"{i:02d}.png": png(0 if i < 9 else i) for i in range(36)} | {"36.png": png(35), "37.png": png(100)}
    shards, _ = shards_of(put(tmp_path / "in", files), tmp_path / "out")
    assert shards.manifest["num_images"] == 38
    assert shards.manifest["num_copies"] == sum(part["copies"] for part in shards.manifest["files"]) == 8 + 1
    assert sum(part["copies"] > 0 for part in shards.manifest["files"]) >= 4
    alone, _ = shards_of(put(tmp_path / "one", MIXED), tmp_path / "apart")
    assert alone.manifest["num_copies"] == 0


def test_every_image_is_one_row_of_the_layout_in_the_contract(tmp_path: Path) -> None:
    shards, labels = shards_of(put(tmp_path / "in", MIXED), tmp_path / "out")
    assert labels is None
    tables = parts(shards)
    for table in tables:
        assert table.schema.names == ["sample_id", "source", "split", "image"]
        assert table.schema.types == [pa.int64(), pa.string(), pa.string(), pa.binary(3 * SIZE * SIZE)]
    found = rows(shards)
    assert [row["sample_id"] for row in found] == list(range(28))
    assert {row["source"]: row["image"] for row in found} == {
        name: decode(data, SIZE).tobytes() for name, data in MIXED.items()
    }
    assert all(row["split"] == row["source"].split("/")[0] for row in found)


def test_the_manifest_counts_what_the_files_hold(tmp_path: Path) -> None:
    shards, _ = shards_of(put(tmp_path / "in", {**MIXED, "bad.png": b""}), tmp_path / "out")
    manifest = shards.manifest
    assert set(manifest) == {
        "kind",
        "fingerprint",
        "format",
        "num_images",
        "image_size",
        "stored",
        "splits",
        "files",
        "num_rejects",
        "num_copies",
        "digest",
    }
    assert (manifest["num_images"], manifest["image_size"], manifest["num_rejects"]) == (28, SIZE, 1)
    assert manifest["splits"] == {"train": 20, "test": 5, "unlabeled": 3}
    # 28 rows over 16 files, as numpy.array_split gives them.
    assert [file["rows"] for file in manifest["files"]] == [2] * 12 + [1] * 4
    for file, table in zip(manifest["files"], parts(shards), strict=True):
        splits = table["split"].to_pylist()
        assert file["splits"] == {split: splits.count(split) for split in set(splits)}
        assert file["rows"] == len(table)
        assert file["crc32"] == zlib.crc32((shards.path / file["name"]).read_bytes())
    assert sorted(contents(shards.path)) == sorted(
        [f"part-{i:05d}.parquet" for i in range(16)] + ["manifest.json", "rejects.parquet"]
    )


def test_images_are_stored_uncompressed_and_without_dictionary(tmp_path: Path) -> None:
    shards, _ = shards_of(put(tmp_path / "in", MIXED), tmp_path / "out")
    image = pq.read_metadata(shards.path / "part-00000.parquet").row_group(0).column(3)
    assert image.compression == "UNCOMPRESSED"
    assert not image.has_dictionary_page
    assert not image.is_stats_set


def test_a_second_ingest_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {**MIXED, "bad.png": b"x"})
    first, _ = shards_of(source, tmp_path / "a")
    again, _ = shards_of(source, tmp_path / "b")
    assert contents(first.path) == contents(again.path)
    assert shards_of(source, tmp_path / "a")[0] == first
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == [first.path.name]


def test_folder_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    images = [png(value) for value in range(50)]
    folder, _ = shards_of(put(tmp_path / "in", {f"{i}.png": d for i, d in enumerate(images)}), tmp_path / "out")
    pq.write_table(pa.table({"image": images[25:] + images[:25]}), tmp_path / "all.parquet", row_group_size=7)
    table, _ = shards_of(tmp_path / "all.parquet", tmp_path / "out")
    assert without_source(folder) == without_source(table)
    assert folder.fingerprint != table.fingerprint
    # The checksums differ: the parts hold the names of the sources.
    counts = [[(file["rows"], file["splits"]) for file in shards.manifest["files"]] for shards in (folder, table)]
    assert counts[0] == counts[1]


def test_the_listing_order_and_the_place_change_nothing(tmp_path: Path) -> None:
    first, _ = shards_of(put(tmp_path / "in", MIXED), tmp_path / "out")
    other, _ = shards_of(put(tmp_path / "elsewhere", dict(reversed(MIXED.items()))), tmp_path / "out2")
    assert contents(first.path) == contents(other.path)


def test_the_seed_orders_the_rows_and_the_content_decides_the_digest(tmp_path: Path) -> None:
    source = put(tmp_path / "in", MIXED)
    zero, one = shards_of(source, tmp_path / "out", seed=0)[0], shards_of(source, tmp_path / "out", seed=1)[0]
    assert [row["source"] for row in rows(zero)] != [row["source"] for row in rows(one)]
    assert sorted(row["source"] for row in rows(zero)) == sorted(row["source"] for row in rows(one))
    assert [row["source"] for row in rows(zero)] != sorted(MIXED)
    (source / "train/00.png").write_bytes(png(999))
    assert shards_of(source, tmp_path / "out")[0].manifest["digest"] != zero.manifest["digest"]
    (source / "bad.png").write_bytes(b"")
    assert len({shards_of(source, tmp_path / "out")[0].fingerprint, zero.fingerprint, one.fingerprint}) == 3


def test_equal_contents_stand_together_in_the_order_of_their_sources(tmp_path: Path) -> None:
    # As text #10 comes before #2, though it is read after it.
    pq.write_table(pa.table({"image": [png(7)] * 12 + [png(50 + i) for i in range(9)]}), tmp_path / "a.parquet")
    found = rows(shards_of(tmp_path / "a.parquet", tmp_path / "out")[0])
    equal = [row for row in found if row["image"] == decode(png(7), SIZE).tobytes()]
    assert [row["source"] for row in equal] == sorted(f"a.parquet#{i}" for i in range(12))
    assert equal[-1]["sample_id"] - equal[0]["sample_id"] == 11
    assert len(found) == 21


def test_rejects_are_listed_by_source_with_their_reasons(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {**MIXED, "z.png": b"", "html.jpg": b"<html>", "half.png": png(0)[:90]})
    (source / "gone.png").symlink_to("nowhere")
    shards, _ = shards_of(source, tmp_path / "out")
    assert pq.read_table(shards.path / "rejects.parquet").to_pylist() == [
        {"source": "gone.png", "reason": "the file cannot be read: No such file or directory"},
        {"source": "half.png", "reason": "the image data is truncated"},
        {"source": "html.jpg", "reason": "the file is not an image that can be read"},
        {"source": "z.png", "reason": "the file is empty"},
    ]
    assert len(rows(shards)) == 28


def test_fewer_images_than_files_leave_empty_files(tmp_path: Path) -> None:
    shards, _ = shards_of(put(tmp_path / "in", {"a.png": png(0)}), tmp_path / "out")
    assert [file["rows"] for file in shards.manifest["files"]] == [1] + [0] * 15
    assert [len(table) for table in parts(shards)] == [1] + [0] * 15


def test_poisoned_labels_change_the_labels_alone(tmp_path: Path) -> None:
    images = [png(value) for value in range(30)]
    found = []
    for run, labels in enumerate(([i % 3 for i in range(30)], ["x"] * 15 + ["y"] * 15, [None] * 30)):
        (tmp_path / str(run)).mkdir()
        file = tmp_path / str(run) / "all.parquet"
        pq.write_table(pa.table({"image": images, "label": pa.array(labels, None if run < 2 else pa.int64())}), file)
        found.append(shards_of(file, tmp_path / f"out{run}"))
    assert contents(found[0][0].path) == contents(found[1][0].path) == contents(found[2][0].path)
    assert [labels and pq.read_table(labels.path / "labels.parquet").num_rows for _, labels in found] == [30, 30, None]
    assert len({labels.fingerprint for _, labels in found if labels}) == 2
    assert "label" not in json.dumps(found[0][0].manifest)


def test_labels_name_their_rows_in_sample_id_order(tmp_path: Path) -> None:
    files = {f"{name}/{i}.png": png(i * 3 + k) for i in range(8) for k, name in enumerate(("dog", "cat", "ant"))}
    shards, labels = shards_of(put(tmp_path / "in", {**files, "unknown.png": png(99)}), tmp_path / "out", labels=True)
    assert labels is not None
    assert labels.manifest["shards"] == shards.fingerprint
    table = pq.read_table(labels.path / "labels.parquet")
    assert table.schema.names == ["sample_id", "label", "name"]
    assert table.schema.types == [pa.int64(), pa.int64(), pa.string()]
    source = {row["sample_id"]: row["source"] for row in rows(shards)}
    known = sorted(i for i, name in source.items() if name != "unknown.png")
    names = [source[i].split("/")[0] for i in known]
    assert table.to_pydict() == {
        "sample_id": known,
        "label": [["ant", "cat", "dog"].index(name) for name in names],
        "name": names,
    }


def test_numbers_as_labels_keep_their_value(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(i) for i in range(3)], "label": [10, 2, 10]}), tmp_path / "a.parquet")
    _, labels = shards_of(tmp_path / "a.parquet", tmp_path / "out")
    assert labels is not None
    table = pq.read_table(labels.path / "labels.parquet").to_pydict()
    assert sorted(table["label"]) == [2, 10, 10]
    assert table["name"] == [str(label) for label in table["label"]]


def test_shards_are_the_same_with_and_without_labels_from_folders(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {f"{i % 3}/{i}.png": png(i) for i in range(12)})
    with_labels, labels = shards_of(source, tmp_path / "a", labels=True)
    without, none = shards_of(source, tmp_path / "b")
    assert contents(with_labels.path) == contents(without.path)
    assert labels is not None
    assert none is None


def test_a_member_that_leads_out_of_its_archive_stops_the_ingest_with_one_sentence(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "../b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(1))
            archive.addfile(member, io.BytesIO(png(1)))
    source = open_source(str(tmp_path / "a.tar"))
    with pytest.raises(DataError, match=r"^[^\n]*holds the member \.\./b\.png, whose path leads out of [^\n]*$"):
        intake.ingest(source, tmp_path / "out", Scale(), image_size=SIZE, seed=0, reporter=SilentReporter())
    assert find_shards(tmp_path / "out") is None


def test_the_number_of_tasks_at_a_time_changes_nothing(tmp_path: Path) -> None:
    images = [png(i) for i in range(1300)]
    pq.write_table(pa.table({"image": images, "label": list(range(1300))}), tmp_path / "a.parquet", row_group_size=100)
    options = ray.data.DataContext.get_current().execution_options
    found = []
    for cpus in (1, 3):
        options.resource_limits = options.resource_limits.copy(cpu=cpus)
        found.append(shards_of(tmp_path / "a.parquet", tmp_path / f"{cpus}", image_size=96))
    options.resource_limits = ray.data.ExecutionResources()
    for one, three in zip(*found, strict=True):
        assert (one.fingerprint, one.manifest) == (three.fingerprint, three.manifest)


def test_a_data_set_of_many_runs_and_parts_is_ordered_as_one(tmp_path: Path) -> None:
    # 1300 rows of 150 kB make 200 MB: 25 runs of 55 rows and sixteen parts that do not end where runs end.
    pq.write_table(pa.table({"image": [png(i) for i in range(1300)]}), tmp_path / "a.parquet", row_group_size=100)
    small, _ = shards_of(tmp_path / "a.parquet", tmp_path / "out")
    large, _ = shards_of(tmp_path / "a.parquet", tmp_path / "out", image_size=224)
    assert [row["source"] for row in rows(small)] == [
        source for table in parts(large) for source in table["source"].to_pylist()
    ]
    assert {file["rows"] for file in large.manifest["files"]} == {81, 82}
    assert small.manifest["digest"] == large.manifest["digest"]


class Seen(SilentReporter):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.done: dict[str, list[Done]] = {}

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        yield self.done.setdefault(title, []).append


def test_progress_of_both_passes_ends_at_all_there_is(tmp_path: Path) -> None:
    seen = Seen()
    source = open_source(str(put(tmp_path / "in", {**MIXED, "bad.png": b""})))
    ingest(source, tmp_path / "out", image_size=SIZE, seed=0, reporter=seen)
    assert list(seen.done) == ["ingest: reading images", "ingest: writing shards"]
    for steps, total in zip(seen.done.values(), (29, 16), strict=True):
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert (steps[-1].done, steps[-1].total) == (total, total)


class Stop(Seen):
    """Gives up after so many reports of a stage, as a kill would."""

    def __init__(self, title: str, after: int) -> None:
        super().__init__()
        self._title, self._after = title, after

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        steps = self.done.setdefault(title, [])

        def show(done: Done) -> None:
            steps.append(done)
            if title == self._title and len(steps) == self._after:
                raise KeyboardInterrupt

        yield show


@pytest.mark.parametrize(("stage", "record"), [("ingest: reading images", "chunk"), ("ingest: writing shards", "part")])
def test_an_interrupted_ingest_goes_on_with_what_it_has_and_gives_the_same_bytes(
    tmp_path: Path, stage: str, record: str
) -> None:
    images = {f"{i % 5}/{i}.png": png(i) for i in range(200)}
    source = put(tmp_path / "in", {**images, "bad.png": b""})
    whole = shards_of(source, tmp_path / "whole", labels=True, image_size=224)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shards_of(source, out, labels=True, image_size=224, reporter=Stop(stage, 2))
    clear_staging(out)  # what the next run of the same command does first
    (folder,) = out.iterdir()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob(f"{record}-*.json")}
    assert len(kept) >= 2
    for file in sorted(kept)[:1]:
        file.unlink()  # as if the kill had come before the record was written
    touched: dict[Path, int] = {}

    class Look(Seen):
        @contextmanager
        def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
            yield lambda done: touched.update({file: file.stat().st_mtime_ns for file in kept if file.exists()})

    found = shards_of(source, out, labels=True, image_size=224, reporter=Look())
    redone = [file for file in kept if touched[file] != kept[file]]
    assert redone == sorted(kept)[:1]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours is not None
        assert theirs is not None
        assert contents(ours.path) == contents(theirs.path)
    assert sorted(entry.name for entry in out.iterdir()) == sorted(path.path.name for path in found if path)


def test_large_images_that_are_far_smaller_encoded_are_kept_as_they_came(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {f"{i}.jpg": jpeg(rng.integers(0, 256, 3), 160 + i % 2 * 20) for i in range(40)}
    source = put(tmp_path / "in", {**files, "half.jpg": files["0.jpg"][:200]})
    shards, _ = shards_of(source, tmp_path / "out", image_size=160)
    assert shards.manifest["stored"] == "encoded"
    found = {row["source"]: row["image"] for row in rows(shards)}
    assert found == files
    assert shards.manifest["num_rejects"] == 1
    read = [read_part(shards.path, file, PartFormat(160, "encoded")) for file in open_shards(shards, None).files]
    pixels = {row["source"]: row["image"] for table in read for row in table.to_pylist()}
    assert pixels == {name: decode(data, 160).tobytes() for name, data in files.items()}
    small, _ = shards_of(source, tmp_path / "out", image_size=SIZE)
    assert small.manifest["stored"] == "pixels"


def jpeg(color: "np.ndarray[Any, Any]", side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.broadcast_to(color.astype(np.uint8), (side, side, 3))).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_flipped_bit_of_a_part_is_found_and_named_by_whoever_reads_it(tmp_path: Path) -> None:
    shards, _ = shards_of(put(tmp_path / "in", MIXED), tmp_path / "out")
    content = bytearray((shards.path / "part-00003.parquet").read_bytes())
    opened = open_shards(shards, None)
    for position in range(0, len(content), 97):
        content[position] ^= 1 << position % 8
        (shards.path / "part-00003.parquet").write_bytes(content)
        with pytest.raises(StorageError, match=r"part-00003\.parquet is damaged .* scale.skip_damaged=true"):
            read_part(shards.path, opened.files[3], opened.format)
        content[position] ^= 1 << position % 8
    content[40] ^= 4
    (shards.path / "part-00003.parquet").write_bytes(content)
    (shards.path / "part-00007.parquet").unlink()
    assert find_damaged(opened.path, opened.files) == {"part-00003.parquet", "part-00007.parquet"}
    without = open_shards(shards, None, find_damaged(opened.path, opened.files))
    assert (without.num_rows, without.num_counted) == (28, 24)
    lanes = serve(without.files, [0, 1], 2)
    ids = load_rows(without, lanes, torch.device("cpu")).sample_ids.tolist()
    assert sorted(ids) == sorted(set(range(28)) - {6, 7, 14, 15})


def test_nothing_readable_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"b.png": b"", "a.png": b"text"})
    with pytest.raises(DataError, match=r"none of the 2 images could be read, the first is a\.png"):
        shards_of(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_was_emptied_meanwhile_is_an_error(tmp_path: Path) -> None:
    source = open_source(str(put(tmp_path / "in", {"a.png": png(0)})))
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(DataError, match="holds no image any more"):
        ingest(source, tmp_path / "out", image_size=SIZE, seed=0, reporter=SilentReporter())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="out cannot be written"):
        shards_of(put(tmp_path / "in", {"a.png": png(0)}), tmp_path / "out")


def test_shards_are_found_by_their_own_folder_and_by_the_one_that_holds_them(tmp_path: Path) -> None:
    source, out = put(tmp_path / "in", {f"{i % 2}/{i}.png": png(i) for i in range(4)}), tmp_path / "out"
    shards, labels = shards_of(source, out, labels=True)
    assert find_shards(out) == (shards, labels)
    assert find_shards(shards.path) == (shards, labels)
    assert labels is not None
    shutil.rmtree(labels.path)
    assert find_shards(out) == (shards, None)
    other, _ = shards_of(source, out, seed=1)
    assert find_shards(out) is None
    assert find_shards(other.path) == (other, None)
    os.remove(other.path / "manifest.json")
    assert find_shards(other.path) is None
    assert find_shards(out) == (shards, None)


def test_two_sets_of_labels_for_the_same_shards_are_an_error(tmp_path: Path) -> None:
    images = [png(value) for value in range(4)]
    for labels in ([0, 0, 1, 1], [0, 1, 0, 1]):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "a.parquet")
        shards_of(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(DataError, match="2 sets of labels"):
        find_shards(tmp_path / "out")


def test_a_path_without_shards_gives_none(tmp_path: Path) -> None:
    assert find_shards(tmp_path) is None
    assert find_shards(tmp_path / "nowhere") is None
    assert find_shards(tmp_path / "shards-0123") is None
