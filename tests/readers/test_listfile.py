import os
from pathlib import Path

import pyarrow as pa
import pytest

from spice_ray.readers.source import Unreadable, open_source
from tests.readers.sample_files import contents, parquet, png, put, reasons, records, refused, summary

GONE = Unreadable("the file cannot be read: No such file or directory")


def written(file: Path, text: str | bytes) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_relative_paths_begin_at_the_list_and_blank_lines_and_comments_do_not_count(tmp_path: Path) -> None:
    put(tmp_path, "sub/a.png", "sub/test/b.png", "c.png", "sub/#d.png")
    text = f"# images\n\n  a.png  \r\ntest/b.png\n../c.png\n   # no\n{tmp_path}/c.png\n./#d.png\n./test/../a.png"
    source = open_source(written(tmp_path / "sub" / "list.txt", text))
    assert source.kind == "list"
    assert not source.labels_known
    assert [(record.source, record.split, record.data) for record in records(source)] == [
        ("a.png", "train", png(0)),
        ("test/b.png", "test", png(1)),
        ("../c.png", "train", png(2)),
        (f"{tmp_path}/c.png", "train", png(2)),
        ("./#d.png", "train", png(3)),
        ("./test/../a.png", "train", png(0)),
    ]


def test_what_cannot_be_read_is_a_record_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "folder.png").mkdir()
    found = contents(
        open_source(written(tmp_path / "l.txt", "gone.png\nfolder.png\na.png\nfile:///nowhere\nfoo://b/c\n"))
    )
    assert found == {
        "gone.png": GONE,
        "folder.png": Unreadable("the file cannot be read: Is a directory"),
        "a.png": png(0),
        "file:///nowhere": GONE,
        "foo://b/c": Unreadable("the file cannot be read: ValueError: Protocol not known: foo"),
    }


def test_names_that_are_not_utf8_are_read_and_a_byte_order_mark_is_not_part_of_one(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(png(7))
    put(tmp_path, "a.png")
    listed = written(tmp_path / "l.txt", b"\xef\xbb\xbfa.png\ncaf\xe9.png\n")
    assert contents(open_source(listed)) == {"a.png": png(0), "caf\\xe9.png": png(7)}


def test_secrets_in_a_url_are_not_part_of_its_name(tmp_path: Path) -> None:
    listed = written(tmp_path / "l.txt", "foo://KEY:SECRET@bucket/a.png\nhttp://user:SECRET@127.0.0.1:9/b.png?id=3\n")
    found = records(open_source(listed))
    assert [record.source for record in found] == ["foo://bucket/a.png", "http://127.0.0.1:9/b.png?id=3"]
    assert "SECRET" not in repr(found)


@pytest.mark.parametrize("column", ["path", "paths", "url", "urls", "file"])
def test_a_parquet_column_of_paths_may_have_labels_and_splits_beside_it(tmp_path: Path, column: str) -> None:
    put(tmp_path, "a.png", "test/b.png", "c.png")
    columns = {
        "x": pa.array(range(4)),
        column: pa.array(["a.png", "test/b.png", "c.png", None]),
        "label": pa.array([2, -1, None, 0]),
        "split": pa.array(["val", None, "unlabeled", "train"]),
    }
    source = open_source(str(parquet(tmp_path / "l.parquet", columns)))
    assert source.labels_known
    assert [(record.source, record.split, record.label, record.data) for record in records(source)] == [
        ("a.png", "test", 2, png(0)),
        ("test/b.png", "test", None, png(1)),
        ("c.png", "unlabeled", None, png(2)),
        ("row 3", "train", 0, Unreadable("the row names no file")),
    ]


def test_paths_may_be_large_strings_or_a_dictionary(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for cells in (pa.array(["a.png"], pa.large_string()), pa.array(["a.png"]).dictionary_encode()):
        assert contents(open_source(str(parquet(tmp_path / "l.parquet", {"path": cells})))) == {"a.png": png(0)}


def test_a_row_with_an_unknown_split_or_a_zero_byte_is_listed_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    columns = {"path": pa.array(["a.png", "a\0.png"]), "split": pa.array(["dev", "train"])}
    assert reasons(open_source(str(parquet(tmp_path / "l.parquet", columns)))) == [
        ("a.png", "its split is 'dev', which is none of train, test, val, validation, unlabeled"),
        ("a\0.png", "the file cannot be read: ValueError: embedded null byte"),
    ]


def test_labels_of_a_wrong_type_are_refused(tmp_path: Path) -> None:
    file = parquet(tmp_path / "l.parquet", {"path": pa.array(["a.png"]), "label": pa.array([0.5])})
    assert "has a column label of type double, needed are integers or strings" in refused(file)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 100])
def test_chunks_cover_every_line_once_in_order(tmp_path: Path, rows_per_chunk: int) -> None:
    put(tmp_path, *[f"{number}.png" for number in range(10)])
    source = open_source(written(tmp_path / "l.txt", "\n".join(f"{number}.png" for number in range(10))))
    found = records(source, rows_per_chunk)
    assert [(record.source, record.data) for record in found] == [
        (f"{number}.png", png(number)) for number in range(10)
    ]


def test_a_name_for_a_row_without_one_counts_from_the_beginning_of_the_list(tmp_path: Path) -> None:
    file = parquet(tmp_path / "l.parquet", {"path": pa.array([None, "", " ", None, None])})
    assert summary(open_source(str(file))) == [(f"row {row}", "train", None) for row in range(5)]


def test_the_listing_digest_follows_paths_splits_and_local_files_but_no_labels(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")

    def digest(**columns: list[object]) -> str:
        file = parquet(tmp_path / "l.parquet", {name: pa.array(cells) for name, cells in columns.items()})
        return open_source(str(file)).listing_digest()

    first = digest(path=["a.png", "b.png"], label=[0, 1])
    assert digest(path=["a.png", "b.png"], label=[1, 0]) == first
    seen = {first, digest(path=["a.png"]), digest(path=["b.png", "b.png"])}
    seen.add(digest(path=["a.png", "b.png"], split=["train", "test"]))
    seen.add(digest(path=["a.png", "foo://b/b.png"]))
    os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
    seen.add(digest(path=["a.png", "b.png"]))
    (tmp_path / "a.png").unlink()
    seen.add(digest(path=["a.png", "b.png"]))
    assert len(seen) == 7


def test_encoded_bytes_are_known_of_local_files_alone(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    local = written(tmp_path / "l.txt", "a.png\nb.png\ngone.png\n")
    assert open_source(local).encoded_bytes() == len(png(0)) + len(png(1))
    assert open_source(written(tmp_path / "m.txt", "a.png\nhttp://127.0.0.1:9/b.png\n")).encoded_bytes() is None


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_a_list_that_names_nothing_is_refused(tmp_path: Path, text: str) -> None:
    assert "l.txt names no file; give at least one path or URL" in refused(written(tmp_path / "l.txt", text))


def test_a_parquet_list_without_rows_is_refused(tmp_path: Path) -> None:
    assert "names no file" in refused(parquet(tmp_path / "l.parquet", {"path": pa.array([], pa.string())}))


def test_a_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    assert "is not text; give one path or URL per line" in refused(written(tmp_path / "l.txt", png(0)))
