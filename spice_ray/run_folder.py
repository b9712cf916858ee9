"""The folder of a run: whose settings it holds, where its artifacts are, and what it gives to its user.

run.json               the recipe without scale, and what was asked for where K was chosen or the prior estimated;
                       where the images came from; the artifacts of the result and where they are: artifacts_root
                       where a run shares those of another, or a sweep's winner those of its run
artifacts/             what each stage left behind
assignments.parquet    the product: one row per image that was read
rejects.parquet        one row per image that was not
clusters.html          what the clusters are and how far to trust them, told without labels
cluster_count.json     where K was chosen, the scores of all candidates
prior.json             where it was estimated, the shares of the clusters
timing.json            seconds per stage
seconds/               of each artifact, which sweeps tell what they saved by
checkpoints/, progress/   of stages under way; may be deleted
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spice_ray import mirror
from spice_ray.config import Recipe
from spice_ray.contracts import LABELS, SHARDS
from spice_ray.errors import StorageError
from spice_ray.run_identity import check_base, check_same
from spice_ray.storage import Artifact, clear_staging, open_artifact, read_json, reporting_disk_errors, write_json

_RECORD = "run.json"
_PREDICTIONS = "predict.json"
_LOCKS: dict[Path, IO[str]] = {}
"""Open files whose locks this process holds."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder that belongs to one recipe and one source of images."""

    path: Path
    artifacts: Path
    """The root of its artifacts: below ``path``, or those of the run that a sweep's trial shares."""

    @property
    def owner(self) -> Path:
        """The folder of the run that the artifacts are of."""
        return self.artifacts.parent

    @property
    def artifacts_root(self) -> str:
        """The folder of the artifacts as the run's record names it: relative to ``path``, or another server's URL."""
        if mirror.is_mirrored(self.artifacts) != mirror.is_mirrored(self.path):
            return mirror.url_of(self.artifacts)
        return os.path.relpath(os.path.abspath(self.artifacts), os.path.abspath(self.path))

    @property
    def checkpoints(self) -> Path:
        """Where stages under way keep what they go on from."""
        return self.path / "checkpoints"

    @property
    def shared_checkpoints(self) -> Path:
        """The same for all runs that have the artifacts: of what is large, and made by one of them at a time."""
        is_local = not (mirror.is_mirrored(self.path) or mirror.is_mirrored(self.owner))
        return self.owner / "checkpoints" if is_local else self.checkpoints

    def progress(self, stage: str) -> Path:
        """Where the processes of a stage say how far they are; empty at the beginning of the stage.

        Raises:
            StorageError: The disk refused.
        """
        folder = self.path / "progress" / stage
        with reporting_disk_errors(folder):
            mirror.remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            return folder.resolve()

    def record(self, **values: Any) -> None:
        """Put values into run.json.

        Raises:
            StorageError: It cannot be read, or the disk refused.
        """
        write_json(self.path / _RECORD, {**read_record(self.path), **values})

    def record_settled(self, asked: Recipe, settled: Recipe) -> None:
        """Put the recipe with the chosen K and the estimated prior into run.json, and what was asked for beside it.

        Raises:
            StorageError: As :meth:`record`.
        """
        wanted, held = science(asked), science(settled)
        self.record(recipe=held, asked={key: value for key, value in wanted.items() if value != held[key]})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Note that ``stage`` took so long; what an interrupted attempt took is added to.

        Raises:
            StorageError: timing.json cannot be read, or the disk refused.
        """
        file = self.path / "timing.json"
        known = read_json(file) if mirror.exists(file) else {}
        write_json(file, {**known, stage: round(known.get(stage, 0.0) + seconds, 3)})

    @property
    def is_finished(self) -> bool:
        """Whether all stages have been run, with these settings."""
        return "artifacts" in read_record(self.path)

    def begin_seconds(self) -> None:
        """Note that stages take time, where none has taken any yet.

        Raises:
            StorageError: The disk refused.
        """
        if not mirror.exists(self.path / "timing.json"):
            write_json(self.path / "timing.json", {})

    def note_seconds(self, kind: str, print_: str, seconds: float) -> None:
        """Note how long an artifact was made.

        Raises:
            StorageError: The disk refused.
        """
        file = self._seconds_of(f"{kind}-{print_}")
        with reporting_disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"seconds": round(seconds, 3)})

    def seconds_of(self, name: str) -> float | None:
        """How long the artifact of that name was made; None where nobody noted it."""
        file = self._seconds_of(name)
        return float(read_json(file)["seconds"]) if mirror.exists(file) else None

    def _seconds_of(self, name: str) -> Path:
        return self.owner / "seconds" / f"{name}.json"

    @contextmanager
    def alone(self, kind: str, print_: str) -> Iterator[None]:
        """Let no other process make the same artifact for as long as the context lasts: it waits, and finds it made.

        Of a folder on a server no process is kept out.

        Raises:
            StorageError: The disk refused.
        """
        if mirror.is_mirrored(self.owner):
            yield
            return
        file = self.owner / "checkpoints" / f".{kind}-{print_}.lock"
        with reporting_disk_errors(file):
            held = _held(file)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            held.close()

    def publish_table(self, artifact: Artifact, name: str) -> None:
        """Give the user a copy of an artifact's table beside run.json.

        Raises:
            StorageError: The artifact lacks the table, or the disk refused.
        """
        temporary, table = self.path / f".{name}.part", artifact.file(name)
        with reporting_disk_errors(self.path):
            shutil.copyfile(table, temporary)
            mirror.deliver(temporary, self.path / name)


def _held(file: Path) -> IO[str]:
    """The file, held by this process alone; whoever holds it removes it in the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        held = file.open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file), os.fstat(held.fileno())):
                return held
        held.close()  # it was removed while this process waited for it


def science(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what has no influence on results."""
    return recipe.model_dump(mode="json", exclude={"scale"})


def claim(path: Path, recipe: Recipe, source: dict[str, str], base: Path | None = None) -> RunFolder:
    """Make a run folder, or take one that holds the same settings.

    Args:
        path: The folder; made where it does not exist.
        recipe: The run's.
        source: Where the images come from: ``path``, for people, and ``digest``, equal for the same images.
        base: The folder of another run of these images, whose artifacts are shared; none: as ``path`` began.

    Raises:
        StorageError: A folder holds something else; nothing in them was touched.
    """
    check_held(path, recipe, source, base)
    owner = owner_of(path, base)
    run = RunFolder(path, owner / "artifacts")
    with reporting_disk_errors(path):
        if owner != path:
            _check_there(path, owner)
            lock(owner)  # first: while another run is in it nothing is begun here
        path.mkdir(parents=True, exist_ok=True)
        if not holds_run(path):
            shared = {} if owner == path else {"artifacts_root": run.artifacts_root}
            write_json(path / _RECORD, {"recipe": science(recipe), "source": source, **shared})
        lock(path)
    clear_staging(run.artifacts)
    return run


def owner_of(path: Path, base: Path | None) -> Path:
    """The folder of the run whose artifacts the run in ``path`` has, or, to begin with, shares: that of ``base``."""
    if base is not None:
        return base
    root = read_record(path).get("artifacts_root") if holds_run(path) else None
    return path if root is None else mirror.joined(path, root).parent


def claim_predictions(path: Path, model: str, source: dict[str, str]) -> RunFolder:
    """Make a folder for what a model says of other images, or take one that holds the same.

    Raises:
        StorageError: The folder holds something else; nothing in it was touched.
    """
    check_folder(path)
    wanted = {"model": model, "source": source}
    with reporting_disk_errors(path):
        if mirror.exists(path / _PREDICTIONS):
            held = read_json(path / _PREDICTIONS)
            if held["model"] != model or held["source"]["digest"] != source["digest"]:
                raise StorageError(
                    f"{path} holds the predictions of another run or of other images ({held['source'].get('path')}); "
                    "choose another --out"
                )
        else:
            _check_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / _PREDICTIONS, wanted)
        path.mkdir(parents=True, exist_ok=True)  # that of a URL may not be here yet
        lock(path)
    folder = RunFolder(path, path / "artifacts")
    clear_staging(folder.artifacts)
    return folder


def check_held(path: Path, recipe: Recipe, source: dict[str, str], base: Path | None = None) -> None:
    """Refuse a folder that holds something else than this run; nothing is touched.

    Raises:
        StorageError: Says what it holds; or why ``base`` has nothing for the run.
    """
    check_folder(path)
    with reporting_disk_errors(path):
        wanted = {"recipe": science(recipe), "source": source}
        if base is not None:
            check_base(path, base, read_record(base), wanted)
        if not holds_run(path):
            _check_empty(path)
            return
        check_same(path, read_record(path), wanted)
        if base is not None and owner_of(path, None) != base:
            held = owner_of(path, None)
            began = "without --from" if held == path else f"with --from {held}"
            raise StorageError(f"{path} began {began}; leave --from out, or choose another --out")


def lock(path: Path) -> None:
    """Keep other processes out of the folder for as long as this one lives: two would clear each other's work.

    Of a folder on a server only processes of this machine are kept out.

    Raises:
        StorageError: Another process is in it.
    """
    if path.resolve() in _LOCKS:
        return
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StorageError(f"another process is running in {path}; wait for it, or choose another --out") from None
    _LOCKS[path.resolve()] = file


def check_folder(path: Path) -> None:
    """Refuse a place where no folder can be.

    Raises:
        StorageError: It is a file, or a URL that was taken for a path.
    """
    if re.match("[a-z][a-z0-9+.-]+:/", str(path)):
        raise StorageError(f"{path} is a URL that was taken for a path; give what spice_ray.mirror.path_of makes of it")
    if mirror.is_file(path):
        raise StorageError(f"{path} is a file; choose a folder to write to")


def holds_run(path: Path) -> bool:
    """Whether the folder ``path`` is there and has a run.json."""
    return mirror.exists(path / _RECORD)


def read_record(path: Path) -> dict[str, Any]:
    """What the run.json of the folder ``path`` holds.

    Raises:
        StorageError: It is missing or damaged, or another program's.
    """
    remedy = f"restore it, or delete the folder {path} and run again"
    record = read_json(path / _RECORD, remedy)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in ("recipe", "source")):
        raise StorageError(f"{path / _RECORD} is not a run's; {remedy}")
    return record


def read_finished(path: Path) -> dict[str, Any]:
    """What the run.json of a finished run holds.

    Args:
        path: The run folder, or another that has a run.json of its own and shares a run's artifacts.

    Returns:
        ``recipe``; ``artifacts``, a fingerprint per kind; ``shards_root`` and ``artifacts_root``, the folders that hold
        shards with labels and all else, relative to ``path``.

    Raises:
        StorageError: It is missing or damaged, or not of a finished run.
    """
    record = read_json(path / _RECORD, f"restore it, or delete the folder {path} and run again")
    types = {"recipe": dict, "artifacts": dict, "shards_root": str}
    is_run = isinstance(record, dict) and all(isinstance(record.get(key), type_) for key, type_ in types.items())
    if not is_run or not {SHARDS, LABELS} <= record["artifacts"].keys():
        raise StorageError(f"{path / _RECORD} is not of a finished run; run the same command again")
    return {"artifacts_root": "artifacts", **record}


def open_made(path: Path, record: dict[str, Any], kind: str) -> Artifact:
    """An artifact of a finished run.

    Args:
        path: The run folder.
        record: What :func:`read_finished` gave of it.
        kind: One of those in the record.

    Raises:
        StorageError: It is not there any more.
    """
    root = mirror.joined(path, record["shards_root" if kind in (SHARDS, LABELS) else "artifacts_root"])
    artifact = open_artifact(root, kind, record["artifacts"][kind])
    if artifact is None:
        raise StorageError(f"{root} lacks {kind}-{record['artifacts'][kind]}; run the same command again to make it")
    return artifact


def _check_there(path: Path, owner: Path) -> None:
    if not holds_run(owner):
        raise StorageError(f"{path} shares the artifacts of the run {owner}, which is gone; choose another --out")
    mirror.make_here(owner)


def _check_empty(path: Path) -> None:
    if any(not name.startswith(f".{_RECORD}.") for name in mirror.names(path)):
        raise StorageError(f"{path} holds files that are not a run's; choose an empty or new folder for --out")
