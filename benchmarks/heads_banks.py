"""No benchmark of its own: what ``heads.py`` trains heads on, and the training itself under a clock."""

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from process_memory import Watch

from spice_ray.config import ImageRecipe, Recipe, Scale
from spice_ray.contracts import EMBEDDING, ENCODER
from spice_ray.core.metrics import clustering_accuracy
from spice_ray.readers.digits import DigitsSource
from spice_ray.recipe import load_recipe
from spice_ray.run_folder import read_record
from spice_ray.runtime.bank import open_bank
from spice_ray.runtime.data import open_shards
from spice_ray.runtime.heads import HeadPool, publish_heads, train_ensemble
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.inference import publish_embedding
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import SilentReporter
from spice_ray.storage import Artifact, open_artifact, publish
from spice_ray.workflow import prepare

STORED = {"embedding": np.float32, "plain": np.float16, "weak": np.float16, "strong": np.float16}
"""What the package keeps features as."""
_ROWS_AT_ONCE = 8192
Ints = NDArray[np.int64]
Result = TypeVar("Result")


def in_new_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """So that nothing which was in memory before, or is afterwards, is taken for the work's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# Training


class Trained(NamedTuple):
    """Heads, and how long they took."""

    ensemble: Artifact
    seconds: float
    """From the first word of an actor to the last head: Ray and torch were there, the bank was in place."""
    start_seconds: float
    """Before that: the bank is shared, actors start and import."""
    watch: Watch
    """What the processes took meanwhile."""

    @property
    def assignments(self) -> Ints:
        """The chosen head's cluster of every row, (N,)."""
        clusters: Ints = np.load(self.ensemble.file("assignments.npy"))
        return clusters


def train(recipe: Recipe, scale: Scale, embedding: Artifact, root: Path) -> Trained:
    """Stage 2 as a run does it, in a new folder below ``root``; here alone its interface is known."""
    folder = Path(tempfile.mkdtemp(dir=root))
    (folder / "progress").mkdir()
    ids = np.arange(embedding.manifest["num_images"])
    pool = HeadPool(recipe, scale, embedding, ids, folder / "progress", folder / "finished")
    times: list[float] = []
    with Watch() as watch:
        threading.Thread(target=_note_start, args=(folder / "progress", times, watch), daemon=True).start()
        start = time.perf_counter()
        heads = train_ensemble(pool, recipe.heads, recipe.num_clusters)
        end = time.perf_counter()
        ensemble = publish_heads(folder, "trained", recipe, open_bank(embedding), heads)
    return Trained(ensemble, end - times[0], times[0] - start, watch)


def _note_start(progress: Path, times: list[float], watch: Watch) -> None:
    """An actor writes how far it is as soon as it is there."""
    while not any(progress.glob("*.json")):
        time.sleep(0.01)
    times.append(time.perf_counter())
    watch.begin()


# Generated features


@dataclass(frozen=True)
class Mixture:
    """Equally large Gaussian clusters, of variance 1 about means that are ``radius`` long."""

    num_rows: int
    width: int
    num_clusters: int
    views: int
    """Strong views; 0 for embeddings that were given, whose views are they themselves."""
    radius: float = 6.0

    def recipe(self, *settings: str) -> Recipe:
        # Few epochs may leave heads unsure, and no further ones are wanted here. What is timed are the heads alone.
        own = (f"num_clusters={self.num_clusters}", f"heads.views={self.views}", "heads.lr=0.005", "heads.epochs=20")
        return load_recipe("embeddings", [*own, "heads.more=0", "heads.start=random", *settings])

    def write(self, root: Path) -> Artifact:
        """Publish an embedding store; the clusters are in ``labels.npy`` beside it."""
        return publish(root, EMBEDDING, f"{self.num_rows}-{self.width}-{self.views}", self._fill)

    def _fill(self, folder: Path) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        means = rng.normal(size=(self.num_clusters, self.width))
        means *= self.radius / np.linalg.norm(means, axis=1, keepdims=True)
        labels = rng.permutation(np.arange(self.num_rows) % self.num_clusters)
        np.save(folder / "labels.npy", labels)
        arrays = self._new_arrays(folder)
        for start in range(0, self.num_rows, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, self.num_rows))
            plain = means[labels[rows]] + rng.standard_normal((rows.stop - start, self.width), np.float32)
            arrays["plain"][rows] = plain
            arrays["embedding"][rows] = plain / np.linalg.norm(plain, axis=1, keepdims=True)
            if self.views:
                arrays["weak"][rows] = plain + 0.1 * rng.standard_normal(plain.shape, np.float32)
            for view in range(self.views):
                arrays["strong"][view, rows] = plain + 0.5 * rng.standard_normal(plain.shape, np.float32)
        for array in arrays.values():
            array.flush()
        return {"num_images": self.num_rows, "embed_dim": self.width, "views": self.views}

    def _new_arrays(self, folder: Path) -> dict[str, Any]:
        shapes: dict[str, tuple[int, ...]] = {name: (self.num_rows, self.width) for name in ("embedding", "plain")}
        if self.views:
            shapes |= {"weak": (self.num_rows, self.width), "strong": (self.views, self.num_rows, self.width)}
        return {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=STORED[name], shape=shape)
            for name, shape in shapes.items()
        }


def megabytes_of(embedding: Artifact) -> float:
    """What the features take, without the generated labels."""
    return sum(file.stat().st_size for file in embedding.path.glob("*.npy") if file.stem != "labels") / 1e6


# Digits


class Digits(NamedTuple):
    """An encoder that was trained on digits, and the images."""

    recipe: ImageRecipe
    encoder: Artifact
    shards: Artifact
    classes: Ints
    """Of each image, (N,)."""

    def embed(self, views: int, root: Path) -> Artifact:
        """The embedding store with that many strong views; the first ones are the same for any number."""
        heads = self.recipe.heads.model_copy(update={"views": views})
        recipe = self.recipe.model_copy(update={"heads": heads})
        name = f"seed-{recipe.seed}-views-{views}"
        shards = open_shards(self.shards, None)
        parts = root / f"{name}-parts"
        return publish_embedding(
            root, name, recipe, recipe.scale, self.encoder, shards, parts, lambda _done, _total: None
        )

    def accuracy(self, clusters: Ints) -> float:
        return clustering_accuracy(self.classes, clusters)


def open_digits(run: Path, seed: int, root: Path) -> Digits:
    """The encoder of a run of digits, which is trained there, with ``seed``, if the folder has none.

    The images are ingested anew below ``root``: a finished run may be of an older format, and is left as it is.
    """
    encoder = _find_encoder(run) or _train_encoder(run, seed)
    recipe = _digits_recipe(read_record(run)["recipe"]["seed"])
    shards, labels = _ingest(recipe, root / f"digits-{recipe.seed}")
    assert labels is not None
    table = pq.read_table(labels.file("labels.parquet"))
    classes = np.empty(len(table), np.int64)
    classes[table["sample_id"].to_numpy()] = table["label"].to_numpy()
    return Digits(recipe, encoder, shards, classes)


def _digits_recipe(seed: int) -> ImageRecipe:
    recipe = load_recipe("digits", [f"seed={seed}"])
    assert isinstance(recipe, ImageRecipe)
    return recipe


def _ingest(recipe: ImageRecipe, root: Path) -> tuple[Artifact, Artifact | None]:
    return ingest(DigitsSource(), root, image_size=recipe.image.size, seed=recipe.seed, reporter=SilentReporter())


def _find_encoder(run: Path) -> Artifact | None:
    folders = sorted((run / "artifacts").glob(f"{ENCODER}-*"))
    found = [open_artifact(folder.parent, ENCODER, folder.name.removeprefix(f"{ENCODER}-")) for folder in folders]
    return next((artifact for artifact in found if artifact is not None), None)


def _train_encoder(run: Path, seed: int) -> Artifact:
    """As ``spice-ray run digits`` would, which would go on from here."""
    print(f"training an encoder in {run}", flush=True)
    recipe = _digits_recipe(seed)
    prepared = prepare(recipe, "digits", run)
    shards, labels = _ingest(recipe, prepared.run.artifacts)
    return ImagePipeline(prepared.run, recipe, shards, labels, SilentReporter()).encoder
