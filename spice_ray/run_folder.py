"""The folder of a run: whose settings it holds, where its artifacts are, and what it gives to its user.

run.json               the recipe without scale, where the images came from, the artifacts of the result
artifacts/             what each stage left behind
assignments.parquet    the product: one row per image that was read
rejects.parquet        one row per image that was not
timing.json            seconds per stage
checkpoints/, progress/   of stages under way; may be deleted
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_ray.config import Recipe
from spice_ray.errors import StorageError
from spice_ray.storage import Artifact, clear_staging, read_json, write_json


@dataclass(frozen=True)
class RunFolder:
    """A run folder that belongs to one recipe and one source of images."""

    path: Path
    artifacts: Path
    """The root of its artifacts: below ``path``, or those of the run that a sweep's trial shares."""

    @property
    def checkpoints(self) -> Path:
        """Where stages under way keep what they go on from."""
        return self.path / "checkpoints"

    def progress(self, stage: str) -> Path:
        """Where the processes of a stage say how far they are; empty at the beginning of the stage."""
        folder = self.path / "progress" / stage
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder.resolve()

    def record(self, **values: Any) -> None:
        """Put values into run.json."""
        write_json(self.path / "run.json", {**read_json(self.path / "run.json"), **values})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Note that ``stage`` took so long; what an interrupted attempt took is added to."""
        file = self.path / "timing.json"
        known = read_json(file) if file.exists() else {}
        write_json(file, {**known, stage: round(known.get(stage, 0.0) + seconds, 3)})

    def publish_table(self, artifact: Artifact, name: str) -> None:
        """Give the user a copy of an artifact's table beside run.json."""
        temporary = self.path / f".{name}.part"
        shutil.copyfile(artifact.file(name), temporary)
        os.replace(temporary, self.path / name)


def science(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what has no influence on results."""
    return recipe.model_dump(mode="json", exclude={"scale"})


def claim(path: Path, recipe: Recipe, source: dict[str, str]) -> RunFolder:
    """Make a run folder, or take one that holds the same settings.

    Args:
        path: The folder; made where it does not exist.
        recipe: The run's.
        source: Where the images come from: ``path``, for people, and ``digest``, equal for the same images.

    Raises:
        StorageError: The folder holds something else; nothing in it was touched.
    """
    wanted = {"recipe": science(recipe), "source": source}
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file; choose a folder for --out")
    if (path / "run.json").is_file():
        _check_same(path, read_json(path / "run.json"), wanted)
    elif path.is_dir() and any(path.iterdir()):
        raise StorageError(f"{path} holds files that are not a run's; choose an empty or new folder for --out")
    else:
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "run.json", wanted)
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror}); choose another --out") from None
    run = RunFolder(path, path / "artifacts")
    clear_staging(run.artifacts)
    return run


def _check_same(path: Path, held: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(held, dict) or not {"recipe", "source"} <= held.keys():
        raise StorageError(f"{path / 'run.json'} is not a run's; choose another --out")
    if held["source"]["digest"] != wanted["source"]["digest"]:
        raise StorageError(
            f"{path} holds a run of other images ({held['source']['path']}; here {wanted['source']['path']}), or they "
            "changed since; choose another --out"
        )
    before, now = _flat(held["recipe"]), _flat(wanted["recipe"])
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise StorageError(
                f"{path} holds another run's settings ({key} is {before.get(key)} there and {now.get(key)} here); "
                "choose another --out, or use the same settings to go on"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
