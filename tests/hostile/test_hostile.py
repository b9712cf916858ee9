import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spice_ray.readers.source import open_source
from tests.hostile.corpus import Case, Ignored, cases, write_corpus
from tests.hostile.pictures import COLOURS
from tests.hostile.reading import Found, is_expected, quadrants_of, read_chunks, read_corpus
from tests.hostile.sound import ORDINARY

ROOT = Path(__file__).parents[2]
CASES = cases()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole corpus; not to be changed."""
    root = tmp_path_factory.mktemp("hostile")
    write_corpus(root)
    return root


@pytest.fixture(scope="module")
def contents(corpus: Path) -> dict[str, bytes]:
    """The bytes of every file of the corpus that can be opened, by its source."""
    regular = (
        case for case in CASES if not isinstance(case.expected, Ignored) and os.access(corpus / case.name, os.R_OK)
    )
    return {case.source: (corpus / case.name).read_bytes() for case in regular}


@pytest.fixture(scope="module")
def singly(contents: dict[str, bytes]) -> dict[str, Found]:
    """What comes of the same bytes in a file with a plain name."""
    return dict(_decoded_singly(contents))


def _decoded_singly(contents: dict[str, bytes]) -> Iterator[tuple[str, Found]]:
    for name, data in contents.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "only.png").write_bytes(data)
            yield name, read_chunks(open_source(folder).chunks(1))["only.png"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name)[1:-1])
@pytest.mark.timeout(20)
def test_a_file_gives_its_colours_or_its_reason_and_its_neighbour_comes_through(case: Case, tmp_path: Path) -> None:
    (tmp_path / "neighbour.png").write_bytes(ORDINARY)
    case.write(tmp_path)
    found = read_corpus(tmp_path, [case])
    neighbour = found.pop("neighbour.png")
    assert isinstance(neighbour, np.ndarray)
    assert quadrants_of(neighbour) == list(COLOURS)
    assert set(found) <= {case.source}
    assert is_expected(case, found.get(case.source)), found


def test_the_whole_corpus_in_one_folder_loses_and_invents_nothing(tmp_path: Path) -> None:
    found = read_corpus(tmp_path, write_corpus(tmp_path))
    assert set(found) == {case.source for case in CASES if not isinstance(case.expected, Ignored)}
    assert [case.name for case in CASES if not is_expected(case, found.get(case.source))] == []


def same(first: Found, second: Found) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    return type(first) is type(second) and first == second


@pytest.mark.parametrize("struct", [False, True], ids=["plain", "hugging-face"])
def test_the_same_bytes_in_parquet_give_the_same_pixels_and_reasons(
    struct: bool, contents: dict[str, bytes], singly: dict[str, Found], tmp_path: Path
) -> None:
    images = pa.array([{"bytes": data, "path": None} for data in contents.values()] if struct else contents.values())
    pq.write_table(pa.table({"image": images}), tmp_path / "all.parquet", row_group_size=50)
    found = read_chunks(open_source(str(tmp_path / "all.parquet")).chunks(20))
    assert [name for row, name in enumerate(contents) if not same(found[f"all.parquet#{row}"], singly[name])] == []
    assert len(found) == len(contents) > 100


@pytest.mark.timeout(30)
def test_a_list_of_the_same_files_gives_the_same_and_refuses_what_is_no_file(corpus: Path, tmp_path: Path) -> None:
    # Whoever writes a list names what the reader of a folder passes over: folders, pipes and devices.
    cases_ = [case for case in CASES if os.fsencode(case.name) == case.source.encode() and not case.vanishes]
    paths = [str(corpus / case.name) for case in cases_]
    pq.write_table(pa.table({"path": paths}), tmp_path / "list.parquet")
    found = read_chunks(open_source(str(tmp_path / "list.parquet")).chunks(20))
    listed = {case.name: found[path] for case, path in zip(cases_, paths, strict=True)}
    named = [case for case in cases_ if not isinstance(case.expected, Ignored)]
    assert [case.name for case in named if not is_expected(case, listed[case.name])] == []
    no_files = ("pipes and devices", "empty folders", "loops of folders")
    assert [case.name for case in cases_ if case.group in no_files and not isinstance(listed[case.name], str)] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="every test here runs without root's right to read all files")
def test_without_permission_a_file_is_listed_with_the_reason() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        found = _read_as_nobody(Path(folder), [case for case in CASES if case.group in ("no permission", "ordinary")])
    assert found.pop("locked.png") == "the file cannot be read: Permission denied"
    assert set(found.values()) == {"an image"}


_AS_NOBODY = """
import json, os, sys
from pathlib import Path
from spice_ray.readers.source import open_source
from tests.hostile.reading import read_chunks
# Once before: what is imported late may lie where only root can read.
read_chunks(open_source(sys.argv[1]).chunks(9))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
found = read_chunks(open_source(sys.argv[1]).chunks(9))
print(json.dumps({name: row if isinstance(row, str) else "an image" for name, row in found.items()}))
"""


def _read_as_nobody(root: Path, wanted: list[Case]) -> dict[str, str]:
    for case in wanted:
        case.write(root)
    command = [sys.executable, "-c", _AS_NOBODY, str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if "os.set" in done.stderr and "PermissionError" in done.stderr:
        pytest.skip("this root may not become another user")
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found
