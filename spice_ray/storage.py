"""Artifact folders: what a stage leaves behind, named by what went into it.

An artifact is an immutable folder ``<kind>-<fingerprint>`` whose ``manifest.json`` is written last: its presence means
complete, so a rerun skips the stage, and a kill cannot leave half a folder that is taken for whole. The fingerprint is
a hash of the stage's settings, the parents' fingerprints and the format version; never of a label, a time, a host or a
path. Times go to ``timing.json``.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_ray import mirror
from spice_ray.errors import StorageError

FORMAT_VERSION = 5
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A complete artifact."""

    path: Path
    kind: str
    fingerprint: str
    manifest: dict[str, Any]

    def file(self, name: str) -> Path:
        """A file of the payload; of an artifact on a server it is fetched.

        Raises:
            StorageError: The file is missing although the artifact was complete.
        """
        file = mirror.local(self.path / name)
        if not file.exists():
            raise StorageError(
                f"{file} is missing from a finished artifact; delete the folder {self.path} and run again"
            )
        return file


def fingerprint(kind: str, settings: dict[str, Any], parents: list[str]) -> str:
    """16 hex digits that name what an artifact is made of."""
    text = json.dumps([FORMAT_VERSION, kind, settings, parents], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_artifact(root: Path, kind: str, print_: str) -> Artifact | None:
    """The artifact, or None where it is not complete.

    Raises:
        StorageError: Its manifest cannot be read.
    """
    path = root / f"{kind}-{print_}"
    manifest = path / MANIFEST
    if not mirror.exists(manifest):
        return None
    record = read_json(manifest, f"delete the folder {path} and run again")
    if not isinstance(record, dict) or record.get("fingerprint") != print_:
        raise StorageError(f"{manifest} is not that of {path.name}; delete the folder {path} and run again")
    return Artifact(path, kind, print_, record)


def publish(root: Path, kind: str, print_: str, write: Callable[[Path], dict[str, Any]]) -> Artifact:
    """Write an artifact under a temporary name, then give it its own.

    Args:
        root: The run's folder of artifacts.
        kind: What the artifact is, such as ``embedding``.
        print_: Its fingerprint.
        write: Writes the payload into the folder it is given and returns what the manifest records of it.

    Raises:
        StorageError: The disk refused.
    """
    final = root / f"{kind}-{print_}"
    with reporting_disk_errors(root):
        staging = mirror.staging_of(root) / f".{kind}-{print_}.{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        try:
            record = {"kind": kind, "fingerprint": print_, "format": FORMAT_VERSION, **write(staging)}
            write_json(staging / MANIFEST, record)
            _move(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    artifact = open_artifact(root, kind, print_)
    assert artifact is not None
    return artifact


def _move(staging: Path, final: Path) -> None:
    """Give a finished folder its name, unless another process published the same artifact first."""
    if mirror.is_mirrored(final):
        if mirror.exists(final / MANIFEST):
            shutil.rmtree(staging)
        else:
            mirror.deliver_folder(staging, final, last=MANIFEST)
        return
    if final.exists() and not (final / MANIFEST).exists():
        shutil.rmtree(final)
    try:
        os.replace(staging, final)
    except OSError:
        if not (final / MANIFEST).exists():
            raise
        shutil.rmtree(staging)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it.

    Raises:
        StorageError: The disk refused; an old file stays as it was.
        ValueError: The value holds NaN or infinity.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with reporting_disk_errors(path):
        mirror.write_bytes(path, text.encode())


def read_json(path: Path, remedy: str = "delete it and run again") -> Any:
    """Read a JSON file of a run folder.

    Args:
        path: The file.
        remedy: What the user is to do about a file that is damaged.

    Raises:
        StorageError: It is not there or not JSON.
    """
    try:
        return json.loads(mirror.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{path} does not exist; is {path.parent} the folder of a run?") from None
    except (OSError, ValueError, RecursionError):
        raise StorageError(f"{path} cannot be read as JSON; {remedy}") from None


def clear_staging(root: Path) -> None:
    """Remove what a killed run left half-written; what an ingest has done is kept, for it goes on from there."""
    staging = mirror.staging_of(root)
    if staging.is_dir():
        for folder in staging.glob(".*-*"):
            if not folder.name.startswith(".ingest-"):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reporting_disk_errors(root: Path, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Say in a sentence that ``root`` could not be written.

    Args:
        root: The file or folder that is written while the context lasts.
        passing: Errors that are not this disk's, even where they are a kind of OSError.

    Raises:
        StorageError: In the place of an OSError.
    """
    try:
        yield
    except passing:
        raise
    except OSError as error:
        raise StorageError(
            f"{root} cannot be written ({error.strerror or error}); free some space or choose another "
            "--out, then run the same command again"
        ) from error
