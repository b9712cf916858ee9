import fcntl
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spice_ray.config import Recipe
from spice_ray.errors import StorageError
from spice_ray.recipe import check_recipe
from spice_ray.run_folder import RunFolder, claim, read_record, science
from spice_ray.storage import publish, read_json, write_json
from tests.small_settings import changed

SOURCE = {"path": "photos", "digest": "folder-0a"}


def recipe(**values: Any) -> Recipe:
    return check_recipe(changed(**values))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can take a byte while the context lasts."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_new_folder_is_made_and_holds_the_recipe_without_scale(tmp_path: Path) -> None:
    run = claim(tmp_path / "deep" / "run", recipe(scale__workers=2), SOURCE)
    assert read_json(run.path / "run.json") == {"recipe": science(recipe()), "source": SOURCE}
    assert "scale" not in science(recipe())
    assert run.artifacts == run.path / "artifacts"


def test_an_empty_folder_and_one_left_by_a_killed_claim_are_taken(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0123abcd").write_text('{"rec')
    assert claim(tmp_path, recipe(), SOURCE).path == tmp_path
    assert read_record(tmp_path)["source"] == SOURCE


def test_the_same_settings_take_the_folder_again_and_keep_what_it_holds(tmp_path: Path) -> None:
    run = claim(tmp_path, recipe(), SOURCE)
    run.record(ingested="0a")
    (run.artifacts / ".heads-0a.11111111").mkdir(parents=True)
    again = claim(tmp_path, recipe(scale__workers=4), {**SOURCE, "path": "./photos"})
    assert again == run
    assert read_record(tmp_path)["ingested"] == "0a"
    assert list(run.artifacts.iterdir()) == []  # what a killed stage left half-written


@pytest.mark.parametrize(
    ("values", "source", "expected"),
    [
        ({"num_clusters": 4}, SOURCE, r"num_clusters is 3 there and 4 here"),
        ({"heads__count": 2}, SOURCE, r"heads\.count is 10 there and 2 here"),
        ({"reliable__neighbors": 5}, SOURCE, r"reliable\.neighbors is None there and 5 here"),
        ({"image__mean": [0.5, 0.5, 0.5]}, SOURCE, r"image\.mean is \[0\.485.* there and \[0\.5"),
        ({}, {"path": "others", "digest": "folder-0b"}, r"other images \(photos; here others\)"),
    ],
)
def test_a_run_of_other_settings_or_images_is_refused_with_both_and_not_touched(
    tmp_path: Path, values: dict[str, Any], source: dict[str, str], expected: str
) -> None:
    claim(tmp_path, recipe(), SOURCE)
    before = contents(tmp_path)
    with pytest.raises(StorageError, match=expected + r".*choose another --out"):
        claim(tmp_path, recipe(**values), source)
    assert contents(tmp_path) == before


def test_a_folder_of_other_files_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="holds files that are not a run's; choose an empty or new folder"):
        claim(tmp_path, recipe(), SOURCE)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize(
    "content",
    [b"", b'{"recipe": {', b"\xff\xfe", b"[]", b"{}", b'{"recipe": [], "source": {}}', b'{"recipe": {}, "source": 3}'],
)
def test_a_damaged_record_is_refused_with_what_to_do_and_not_touched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"run\.json .*; restore it, or delete the folder .* and run again"):
        claim(tmp_path, recipe(), SOURCE)
    assert contents(tmp_path) == {"run.json": content}


@pytest.mark.parametrize(
    "record", ['{"recipe": {}, "source": {}}', '{"recipe": {"heads": 3}, "source": {"digest": 1}}']
)
def test_a_record_of_something_else_is_of_other_images(tmp_path: Path, record: str) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(StorageError, match="other images"):
        claim(tmp_path, recipe(), SOURCE)


@pytest.mark.parametrize("place", ["file", "broken link"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    out.write_text("mine") if place == "file" else out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="out is a file; choose a folder"):
        claim(out, recipe(), SOURCE)
    assert os.path.lexists(out)


@pytest.mark.parametrize("below", ["file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot be written \(.+\); free some space or choose another --out"):
        claim(tmp_path / below, recipe(), SOURCE)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("url", ["s3://bucket/run", "file:///data/run", "gs://bucket"])
def test_a_url_is_refused_before_a_folder_of_that_name_is_made(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="is a URL that was taken for a path"):
        claim(Path(url), recipe(), SOURCE)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_refuses_a_claim_and_leaves_the_folder_claimable(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(StorageError, match=r"File too large.*free some space"):
        claim(tmp_path / "run", recipe(), SOURCE)
    assert contents(tmp_path) == {}
    claim(tmp_path / "run", recipe(), SOURCE)


def test_a_full_disk_leaves_a_record_and_a_table_as_they_were(tmp_path: Path) -> None:
    run = claim(tmp_path, recipe(), SOURCE)
    run.add_seconds("heads", 1.0)

    def write(folder: Path) -> dict[str, Any]:
        (folder / "assignments.parquet").write_bytes(b"new")
        return {}

    artifact = publish(run.artifacts, "assignments", "0a", write)
    (tmp_path / "assignments.parquet").write_bytes(b"old")
    before = contents(tmp_path)
    with full_disk():
        for action in (
            lambda: run.record(shards_root="x"),
            lambda: run.add_seconds("heads", 2.0),
            lambda: run.publish_table(artifact, "assignments.parquet"),
        ):
            with pytest.raises(StorageError, match="cannot be written"):
                action()
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    run.publish_table(artifact, "assignments.parquet")
    assert (tmp_path / "assignments.parquet").read_bytes() == b"new"


def test_a_record_gains_values_and_keeps_the_others(tmp_path: Path) -> None:
    run = claim(tmp_path, recipe(), SOURCE)
    run.record(ingested="0a")
    run.record(shards_root="artifacts")
    assert read_record(tmp_path) == {
        "recipe": science(recipe()),
        "source": SOURCE,
        "ingested": "0a",
        "shards_root": "artifacts",
    }


def test_the_seconds_of_interrupted_attempts_add_up(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, tmp_path / "artifacts")
    run.add_seconds("heads", 1.25)
    run.add_seconds("joint", 2.0)
    run.add_seconds("heads", 0.5)
    assert read_json(tmp_path / "timing.json") == {"heads": 1.75, "joint": 2.0}


def test_the_progress_of_a_stage_begins_empty_and_leaves_other_stages_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, tmp_path / "artifacts")
    write_json(run.progress("heads") / "0.json", 1)
    write_json(run.progress("joint") / "0.json", 1)
    assert list(run.progress("heads").iterdir()) == []
    assert len(list((tmp_path / "progress" / "joint").iterdir())) == 1
    assert run.progress("heads").is_absolute()


def test_progress_where_a_file_is_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "progress").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        RunFolder(tmp_path, tmp_path / "artifacts").progress("heads")


# A run that shares the artifacts of another


def test_a_run_shares_the_artifacts_of_another_and_goes_on_without_being_told_again(tmp_path: Path) -> None:
    base = claim(tmp_path / "base", recipe(), SOURCE)
    run = claim(tmp_path / "runs" / "more", recipe(num_clusters=4), SOURCE, base.path)
    assert run.artifacts.resolve() == base.artifacts
    assert run.owner.resolve() == base.path
    assert read_record(run.path)["artifacts_root"] == "../../base/artifacts"
    assert claim(run.path, recipe(num_clusters=4), SOURCE).artifacts == run.artifacts
    assert claim(run.path, recipe(num_clusters=4), SOURCE, base.path).artifacts == run.artifacts
    run.note_seconds("heads", "0a", 2.5)
    assert base.seconds_of("heads-0a") == 2.5


def test_a_folder_behind_a_link_shares_too(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep" / "runs")
    base = claim(tmp_path / "home" / "base", recipe(), SOURCE)
    for _ in range(2):
        run = claim(tmp_path / "runs" / "more", recipe(num_clusters=4), SOURCE, base.path)
        assert run.artifacts == base.artifacts


def test_while_another_process_is_in_the_run_that_is_shared_nothing_is_begun(tmp_path: Path) -> None:
    claim(tmp_path / "base", recipe(), SOURCE)
    shutil.copytree(tmp_path / "base", tmp_path / "busy")
    with (tmp_path / "busy" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"another process is running in .*busy"):
            claim(tmp_path / "run", recipe(num_clusters=4), SOURCE, tmp_path / "busy")
    assert not (tmp_path / "run").exists()


def test_two_folders_that_are_copied_together_still_share(tmp_path: Path) -> None:
    claim(tmp_path / "here" / "base", recipe(), SOURCE)
    claim(tmp_path / "here" / "run", recipe(num_clusters=4), SOURCE, tmp_path / "here" / "base")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    run = claim(tmp_path / "there" / "run", recipe(num_clusters=4), SOURCE)
    assert run.artifacts == tmp_path / "there" / "base" / "artifacts"


@pytest.mark.parametrize(
    ("values", "source", "expected"),
    [
        ({"seed": 5}, SOURCE, r"base was made with seed=0, and here it is 5; use seed=0, or leave --from out"),
        ({"image__size": 48}, SOURCE, r"base was made with image\.size=\d+, and here it is 48"),
        ({}, {"path": "others", "digest": "folder-0b"}, r"base holds a run of other images \(photos; here others\)"),
    ],
)
def test_a_run_of_other_images_has_nothing_to_share(
    tmp_path: Path, values: dict[str, Any], source: dict[str, str], expected: str
) -> None:
    claim(tmp_path / "base", recipe(), SOURCE)
    before = contents(tmp_path)
    with pytest.raises(StorageError, match=expected):
        claim(tmp_path / "run", recipe(**values), source, tmp_path / "base")
    assert contents(tmp_path) == before


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "base", recipe(), SOURCE)
    with pytest.raises(StorageError, match="--from and --out are both"):
        claim(tmp_path / "base", recipe(), SOURCE, tmp_path / "base")
    with pytest.raises(StorageError, match=r"missing.run\.json does not exist"):
        claim(tmp_path / "run", recipe(), SOURCE, tmp_path / "missing")
    claim(tmp_path / "alone", recipe(), SOURCE)
    with pytest.raises(StorageError, match="alone began without --from; leave --from out"):
        claim(tmp_path / "alone", recipe(), SOURCE, tmp_path / "base")
    claim(tmp_path / "run", recipe(num_clusters=4), SOURCE, tmp_path / "base")
    with pytest.raises(StorageError, match=r"run shares the artifacts of another run; give that one to --from"):
        claim(tmp_path / "third", recipe(num_clusters=5), SOURCE, tmp_path / "run")
    assert not (tmp_path / "third").exists()


def test_a_run_whose_artifacts_are_gone_says_so(tmp_path: Path) -> None:
    claim(tmp_path / "base", recipe(), SOURCE)
    claim(tmp_path / "run", recipe(num_clusters=4), SOURCE, tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"shares the artifacts of the run .*base, which is gone"):
        claim(tmp_path / "run", recipe(num_clusters=4), SOURCE)


def test_what_two_make_at_once_is_made_once(tmp_path: Path) -> None:
    made, turns, begun = list[int](), list[str](), threading.Event()

    def make(number: int) -> None:
        run = RunFolder(tmp_path / f"trial-{number}", tmp_path / "artifacts")
        with run.alone("encoder", "0a"):
            turns.append(f"in {number}")
            begun.set()
            if not made:
                time.sleep(0.2)
                made.append(number)
            turns.append(f"out {number}")

    threads = [threading.Thread(target=make, args=(number,)) for number in range(5)]
    threads[0].start()
    begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert made == [0]
    assert len(turns) == 10
    assert all(first.replace("in", "out") == second for first, second in zip(turns[::2], turns[1::2], strict=True))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_others_are_made_at_the_same_time_and_one_that_failed_may_be_made_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, tmp_path / "artifacts")
    with run.alone("encoder", "0a"), run.alone("encoder", "0b"), run.alone("heads", "0a"):
        pass
    with pytest.raises(KeyError), run.alone("encoder", "0a"):
        raise KeyError
    with run.alone("encoder", "0a"):
        assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == [".encoder-0a.lock"]
