import json
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spice_ray.errors import StorageError
from spice_ray.storage import clear_staging, fingerprint, open_artifact, publish, read_json, write_json


def write_payload(folder: Path) -> dict[str, Any]:
    (folder / "payload.txt").write_text("content")
    return {"rows": 3}


def start(program: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_is_published_can_be_opened_with_its_payload_and_record(tmp_path: Path) -> None:
    made = publish(tmp_path / "new" / "root", "heads", "0a", write_payload)
    opened = open_artifact(tmp_path / "new" / "root", "heads", "0a")
    assert opened == made
    assert made.path.name == "heads-0a"
    assert made.manifest == {"kind": "heads", "fingerprint": "0a", "format": 5, "rows": 3}
    assert made.file("payload.txt").read_text() == "content"


def test_nothing_is_open_before_it_is_published(tmp_path: Path) -> None:
    assert open_artifact(tmp_path, "heads", "0a") is None
    (tmp_path / "heads-0a").mkdir()
    assert open_artifact(tmp_path, "heads", "0a") is None


def test_the_fingerprint_is_the_same_in_another_process_and_for_another_order_of_keys() -> None:
    here = fingerprint("heads", {"lr": 0.1, "count": 2}, ["a", "b"])
    program = "from spice_ray.storage import fingerprint; print(fingerprint('heads',{'count':2,'lr':.1},['a','b']))"
    there, _ = start(program).communicate()
    assert there.strip() == here
    assert len(here) == 16
    assert int(here, 16) >= 0


def test_every_input_moves_the_fingerprint() -> None:
    prints = [
        fingerprint("heads", {"lr": 0.1}, ["a", "b"]),
        fingerprint("joint", {"lr": 0.1}, ["a", "b"]),
        fingerprint("heads", {"lr": 0.2}, ["a", "b"]),
        fingerprint("heads", {"count": 0.1}, ["a", "b"]),
        fingerprint("heads", {"lr": 0.1}, ["b", "a"]),
        fingerprint("heads", {"lr": 0.1}, ["a"]),
        fingerprint("heads", {"lr": 0.1}, ["ab"]),
    ]
    assert len(set(prints)) == len(prints)


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        write_payload(folder)
        raise KeyError("lost")

    with pytest.raises(KeyError):
        publish(tmp_path, "heads", "0a", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_manifest_is_replaced_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "heads-0a").mkdir()
    (tmp_path / "heads-0a" / "half.txt").write_text("half")
    made = publish(tmp_path, "heads", "0a", write_payload)
    assert not (made.path / "half.txt").exists()
    (made.path / "payload.txt").write_text("first")
    again = publish(tmp_path, "heads", "0a", write_payload)
    assert again.file("payload.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["heads-0a"]


def test_a_process_killed_while_writing_leaves_nothing_that_opens_and_clearing_removes_the_rest(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from spice_ray.storage import publish
def write(folder):
    (folder / "payload.txt").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
publish(Path(sys.argv[1]), "heads", "0a", write)
"""
    process = start(program, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert open_artifact(tmp_path, "heads", "0a") is None
    assert len(list(tmp_path.iterdir())) == 1
    clear_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert publish(tmp_path, "heads", "0a", write_payload).file("payload.txt").exists()


def test_clearing_keeps_finished_artifacts_and_accepts_a_root_that_is_not_there(tmp_path: Path) -> None:
    made = publish(tmp_path, "heads", "0a", write_payload)
    clear_staging(tmp_path)
    clear_staging(tmp_path / "nowhere")
    assert made.file("payload.txt").exists()


def test_several_that_publish_one_artifact_at_once_all_get_it_whole(tmp_path: Path) -> None:
    def publish_together(root: Path, num_writers: int) -> list[str]:
        ready = threading.Barrier(num_writers)

        def write(folder: Path) -> dict[str, Any]:
            record = write_payload(folder)
            ready.wait(timeout=60)
            return record

        with ThreadPoolExecutor(num_writers) as pool:
            made = [pool.submit(publish, root, "heads", "0a", write) for _ in range(num_writers)]
        return [future.result().file("payload.txt").read_text() for future in made]

    for attempt in range(100):
        root = tmp_path / str(attempt)
        assert publish_together(root, 4) == ["content"] * 4
        assert [path.name for path in root.iterdir()] == ["heads-0a"]


@pytest.mark.parametrize("content", [b"", b'{"kind": "he', b"\xff\xfe"])
def test_a_damaged_manifest_says_which_folder_to_delete(tmp_path: Path, content: bytes) -> None:
    made = publish(tmp_path, "heads", "0a", write_payload)
    (made.path / "manifest.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"manifest\.json cannot be read as JSON; delete the folder .*heads-0a"):
        open_artifact(tmp_path, "heads", "0a")


def test_a_lost_payload_file_says_which_folder_to_delete(tmp_path: Path) -> None:
    made = publish(tmp_path, "heads", "0a", write_payload)
    made.file("payload.txt").unlink()
    with pytest.raises(StorageError, match=r"payload\.txt is missing .* delete the folder .*heads-0a"):
        made.file("payload.txt")


def test_a_root_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        publish(tmp_path / "root", "heads", "0a", write_payload)


def test_a_disk_that_takes_no_more_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    def write_much(folder: Path) -> dict[str, Any]:
        (folder / "payload.bin").write_bytes(bytes(1 << 20))
        return {}

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"File too large.*free some space"):
            publish(tmp_path, "heads", "0a", write_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_in_the_order_it_was_written(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "\u00e4"], "a": {"x": True}}
    write_json(tmp_path / "one.json", value)
    assert read_json(tmp_path / "one.json") == value
    assert list(read_json(tmp_path / "one.json")) == ["b", "a"]
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_a_reader_never_finds_half_a_file(tmp_path: Path) -> None:
    file, stop = tmp_path / "value.json", threading.Event()
    write_json(file, {"number": 0, "filling": ["x"] * 20_000})

    def rewrite() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_json(file, {"number": number, "filling": ["x"] * 20_000})

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        numbers = [json.loads(file.read_text())["number"] for _ in range(150)]
    finally:
        stop.set()
        writer.join()
    assert numbers == sorted(numbers)
    assert numbers[-1] > numbers[0]


def test_what_is_not_a_number_cannot_enter_a_file_and_the_old_one_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "value.json", float("nan"))
    assert os.listdir(tmp_path) == ["value.json"]
    assert read_json(tmp_path / "value.json") == 1


def test_a_missing_json_file_asks_for_the_folder_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run\.json does not exist; is .* the folder of a run\?"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_damaged_json_file_is_a_storage_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read as JSON"):
        read_json(tmp_path / "run.json")


def test_a_folder_in_the_place_of_a_json_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(StorageError, match="cannot be read as JSON"):
        read_json(tmp_path / "run.json")
