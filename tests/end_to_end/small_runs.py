"""A small corpus, and a recipe that runs through all stages in seconds."""

import json
from dataclasses import dataclass
from pathlib import Path

from spice_ray import workflow
from spice_ray.config import ImageRecipe
from spice_ray.recipe import load_recipe
from spice_ray.runtime.progress import SilentReporter

NUM_IMAGES = 600
OVERRIDES = {
    "pretrain.epochs": 8,
    "pretrain.batch_size": 64,
    "pretrain.queue_size": 128,
    "heads.count": 3,
    "heads.more": 0,
    "heads.epochs": 4,
    "heads.repeats": 2,
    "reliable.min_consistency": 0.5,
    "joint.steps": 60,
}


@dataclass(frozen=True)
class Corpus:
    """The same encoded images as Parquet with true labels, with noise for labels, and as a folder."""

    parquet: Path
    poisoned: Path
    folder: Path


class Notes(SilentReporter):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def small_recipe(*more: str) -> ImageRecipe:
    recipe = load_recipe("digits", [*(f"{key}={value}" for key, value in OVERRIDES.items()), *more])
    assert isinstance(recipe, ImageRecipe)
    return recipe


def cluster(data: Path, out: Path, *more: str) -> Path:
    workflow.run(workflow.prepare(small_recipe(*more), str(data), out), SilentReporter())
    return out


def damage(shards: Path, part: str) -> int:
    """Flip a bit of a part; gives the part's number of rows."""
    content = bytearray((shards / part).read_bytes())
    content[len(content) // 2] ^= 1
    (shards / part).write_bytes(content)
    files = json.loads((shards / "manifest.json").read_text())["files"]
    return int(next(file["rows"] for file in files if file["name"] == part))
