"""A run as a straight line of artifacts: each is opened where it is complete, and else made.

What all runs share is here; ``image_pipeline.py`` has the paper's three stages, ``embedding_pipeline.py`` begins behind
stage 1.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from spice_ray import mirror
from spice_ray.config import Recipe
from spice_ray.contracts import CLUSTER_COUNT, HEADS, LABELS, NEIGHBORS, PRIOR, RELIABLE
from spice_ray.core.order import stream_key
from spice_ray.core.unsupervised_loss import perfect_loss
from spice_ray.errors import StorageError
from spice_ray.image_counts import num_neighbors
from spice_ray.run_folder import RunFolder
from spice_ray.runtime.bank import open_bank
from spice_ray.runtime.cluster_count import TABLE, describe, publish_cluster_count
from spice_ray.runtime.data import Shards, find_left_out, open_shards
from spice_ray.runtime.heads import HeadPool, publish_heads, train_ensemble
from spice_ray.runtime.inference import training_ids
from spice_ray.runtime.neighbors import WIDEST, NeighborJob, publish_neighbors, rows_of_part
from spice_ray.runtime.prior import SHARES, describe_prior, publish_prior
from spice_ray.runtime.progress import Done, ProgressWriter, Reporter, watched
from spice_ray.runtime.reliable import check_clusters, describe_reliable, publish_reliable
from spice_ray.settings import ADAPTIVE, Settings
from spice_ray.shards import check_shards, splits_of
from spice_ray.shares import ESTIMATE
from spice_ray.stages.kmeans_start import best_start, choose_by_neighbors, fit_starts
from spice_ray.storage import Artifact, fingerprint, open_artifact

Show = Callable[[Done], None]
_LOOKS = 10


@dataclass(frozen=True)
class Pipeline(ABC):
    """One run: where it is, what it is made of, and whom to tell."""

    run: RunFolder
    recipe: Recipe
    shards_artifact: Artifact
    labels: Artifact | None
    reporter: Reporter
    most_neighbors: int = field(default=WIDEST, kw_only=True)
    """Neighbours that are looked for where reliable labels ask no more: as many as any trial of a sweep asks."""
    left_out: frozenset[str] | None = field(default=None, kw_only=True)
    """Damaged shard files, where somebody has looked for them already."""

    def __post_init__(self) -> None:
        """Refuse shards that the recipe does not fit.

        Raises:
            ConfigError: Says in what.
        """
        check_shards(self.recipe, self.shards_artifact)

    @property
    @abstractmethod
    def embedding(self) -> Artifact:
        """The frozen embedding and the heads' views."""

    @property
    def frozen(self) -> Artifact:
        """Where the unit rows of the frozen embedding are."""
        return self.embedding

    @property
    def neighbors_as_views(self) -> int:
        """How many nearest neighbours stand for views of each row."""
        return 0

    @property
    @abstractmethod
    def assignments(self) -> Artifact:
        """Every image's cluster."""

    @property
    @abstractmethod
    def made(self) -> list[Artifact]:
        """All that the assignments were made of, the shards first."""

    @cached_property
    def damaged(self) -> frozenset[str]:
        """Shard files that are left out; only looked for where that is allowed, as every file is read for it."""
        if self.left_out is not None:
            return self.left_out
        return find_left_out(self.shards_artifact, self.recipe.scale, self.reporter)

    @cached_property
    def all_shards(self) -> Shards:
        """Every image."""
        return open_shards(self.shards_artifact, None, self.damaged)

    @cached_property
    def train_shards(self) -> Shards:
        """The images that stages 2 and 3 see."""
        return open_shards(self.shards_artifact, splits_of(self.recipe.protocol, first_stage=False), self.damaged)

    @cached_property
    def cluster_count(self) -> Artifact | None:
        """K where the recipe leaves it open."""
        recipe = self.recipe
        if recipe.min_clusters is None:
            return None
        embedding = self.frozen
        settings = {"least": recipe.min_clusters, "most": recipe.num_clusters, **self._common()}

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_cluster_count(self._root, print_, recipe, embedding, training_ids(self.train_shards))

        found = self._artifact(CLUSTER_COUNT, "number of clusters", "candidates", settings, [embedding], make)
        self.run.publish_table(found, TABLE)
        self.reporter.note(describe(found, recipe.asked_clusters))
        return found

    @cached_property
    def prior(self) -> Artifact | None:
        """The shares of the clusters where the recipe has them estimated."""
        recipe = self._with_count
        if recipe.heads.prior != ESTIMATE:
            return None
        embedding = self.frozen
        settings = {"num_clusters": recipe.num_clusters, **self._common()}

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_prior(self._root, print_, recipe, embedding, training_ids(self.train_shards))

        found = self._artifact(PRIOR, "shares of the clusters", "clusters", settings, [embedding], make)
        self.run.publish_table(found, SHARES)
        self.reporter.note(describe_prior(found))
        return found

    @cached_property
    def settled(self) -> Recipe:
        """The recipe with the K and the prior that were given or found: what comes after the embedding goes by it."""
        recipe = self._with_count
        if self.prior is None:
            return recipe
        heads = recipe.heads.model_copy(update={"prior": tuple(self.prior.manifest["shares"])})
        return recipe.model_copy(update={"heads": heads})

    @property
    def _with_count(self) -> Recipe:
        if self.cluster_count is None:
            return self.recipe
        chosen = self.cluster_count.manifest["num_clusters"]
        return self.recipe.model_copy(update={"num_clusters": chosen, "min_clusters": None})

    @cached_property
    def heads(self) -> Artifact:
        """Stage 2."""
        recipe = self.settled
        embedding = self.embedding
        settings = {"heads": settings_of(recipe.heads), "num_clusters": recipe.num_clusters, **self._common()}

        def make(print_: str, progress: Path, show: Show) -> None:
            ids, finished = training_ids(self.train_shards), self.run.checkpoints / f"heads-{print_}"
            bank, choice = open_bank(embedding), None
            starts = fit_starts(bank, ids, recipe) if recipe.heads.start == "kmeans" else []
            heads = [start.head for start in starts]
            pool = HeadPool(recipe, recipe.scale, embedding, ids, progress, finished, heads)
            trained = watched(partial(train_ensemble, pool, recipe.heads, recipe.num_clusters), progress, show)
            if starts:
                trained.append(best_start(starts, bank, ids, recipe))
                choice = choose_by_neighbors(trained, bank, ids, recipe)
            publish_heads(self._root, print_, recipe, bank, trained, choice)
            mirror.remove(finished)

        return self._artifact(HEADS, "stage 2: clustering heads", "epochs", settings, [embedding], make)

    @cached_property
    def neighbors(self) -> Artifact:
        """Who the nearest of each row are, in the embedding."""
        return self.neighbors_in(self.frozen)

    def neighbors_in(self, embedding: Artifact) -> Artifact:
        """Who the nearest of each row of ``embedding`` are: at least as many as the reliable labels ask.

        The first of more neighbours are the same, so that no fingerprint has those that are exact.
        """
        recipe = self.settled
        num_rows = self.train_shards.num_counted
        asked = num_neighbors(recipe.reliable, num_rows, recipe.num_clusters)
        k = min(max(self.most_neighbors, self.neighbors_as_views, asked or 0), num_rows - 1)
        settings: dict[str, Any] = {"neighbors": k, "protocol": recipe.protocol}
        lists_key = None
        if recipe.reliable.index == "ivf":
            settings |= {"index": "ivf", "seed": recipe.seed}
            lists_key = stream_key(recipe.seed, "lists")

        def make(print_: str, progress: Path, show: Show) -> None:
            width = embedding.manifest["embed_dim"]
            part_rows = rows_of_part(num_rows, width, recipe.scale.gpus_per_worker if lists_key is None else 0)
            parts = self.run.checkpoints / f"{NEIGHBORS}-{print_}"
            job = NeighborJob(
                embedding.file("embedding.npy"), width, training_ids(self.train_shards), k, part_rows, parts, lists_key
            )
            tell = ProgressWriter(progress, "all").write
            watched(lambda: publish_neighbors(self._root, print_, job, recipe.scale, tell), progress, show)

        found = self._artifact(NEIGHBORS, "nearest neighbours", "rows", settings, [embedding], make)
        recall = found.manifest["recall"]
        if recall is not None:
            self.reporter.note(
                f"neighbours are looked for in {recall['probes']} of {recall['lists']} lists, which have "
                f"{recall['share']:.2%} of those of {recall['rows']} sampled rows"
            )
        return found

    @cached_property
    def reliable(self) -> Artifact:
        """Reliable pseudo-labels."""
        return self.reliable_among(self.heads, self.neighbors)

    def reliable_among(self, labelled: Artifact, neighbors: Artifact) -> Artifact:
        """The reliable ones of the pseudo-labels that stage 2, or a round of stage 3, has given."""
        recipe = self.settled
        asked = num_neighbors(recipe.reliable, self.train_shards.num_counted, recipe.num_clusters)
        settings = {"reliable": {**settings_of(recipe.reliable), "neighbors": asked or ADAPTIVE}, **self._common()}
        for name in ("strict", "labels", "labels_digest"):
            settings["reliable"].pop(name, None)

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_reliable(self._root, print_, recipe, labelled, neighbors, training_ids(self.train_shards))

        parents = [labelled] if recipe.reliable.index == "exact" else [labelled, neighbors]
        found = self._artifact(RELIABLE, "reliable pseudo-labels", "images", settings, parents, make)
        check_clusters(found, recipe)
        self.reporter.note(describe_reliable(found))
        return found

    def finish(self) -> Artifact:
        """Run all stages and give the user the tables."""
        result = self.assignments
        self.run.publish_table(result, "assignments.parquet")
        self.run.publish_table(self.shards_artifact, "rejects.parquet")
        prints = {artifact.kind: artifact.fingerprint for artifact in (*self.made, result)}
        if HEADS in prints:
            self._tell_loss()
        found = [artifact for artifact in (self.cluster_count, self.prior) if artifact is not None]
        if found:
            prints |= {artifact.kind: artifact.fingerprint for artifact in found}
            self.run.record_settled(self.recipe, self.settled)
        self.run.begin_seconds()  # a run that shares all with another has made nothing
        root, own = self.shards_artifact.path.parent.resolve(), self.run.artifacts.resolve()
        self.run.record(
            artifacts={**prints, LABELS: self.labels.fingerprint if self.labels else None},
            damaged=sorted(self.damaged),
            # Shards of this run's own move with it; others stay where they are.
            shards_root=self.run.artifacts_root if root == own else mirror.url_of(root),
        )
        return result

    @property
    def _root(self) -> Path:
        return self.run.artifacts

    def _common(self) -> dict[str, Any]:
        return {"seed": self.recipe.seed, "protocol": self.recipe.protocol}

    def _artifact(
        self,
        kind: str,
        title: str,
        unit: str,
        settings: dict[str, Any],
        parents: list[Artifact],
        make: Callable[[str, Path, Show], None],
    ) -> Artifact:
        """Open the artifact, or make it under the eyes of the user."""
        print_ = fingerprint(kind, settings, [parent.fingerprint for parent in parents])
        found = open_artifact(self._root, kind, print_)
        if found is not None:
            return found
        with self.run.alone(kind, print_):
            found = open_artifact(self._root, kind, print_)
            if found is not None:  # by another trial of a sweep, meanwhile
                return found
            start = time.monotonic()
            with self.reporter.stage(title, unit) as show, timed(self.run, title):
                make(print_, self.run.progress(kind), show)
            self.run.note_seconds(kind, print_, time.monotonic() - start)
        return _opened(self._root, kind, print_)

    def _tell_loss(self) -> None:
        told, best = self.heads.manifest, perfect_loss(self.settled.num_clusters)
        losses, merged = told["losses"], told["num_merged"]
        self.reporter.note(
            f"least unsupervised loss of {len(losses)} heads: {min(losses):.4f} (the largest: {max(losses):.4f}, "
            f"perfect clusters: {best:.4f})"
        )
        if told["modularities"] is not None:
            self.reporter.note(_describe_choice(told["chosen"], told["modularities"]))
        if merged == len(losses):
            self.reporter.note(
                f"every one of the {merged} heads has merged clusters or is unsure of as much: the images may have "
                f"other clusters than num_clusters={self.settled.num_clusters}, or need a better encoder"
            )


def _describe_choice(chosen: int, fits: list[float]) -> str:
    """Which of the heads, of which k-means is the last, has the clusters that fit the neighbours best."""
    *heads, start = fits
    name = "k-means" if chosen == len(heads) else f"head {chosen}"
    return (
        f"the clusters are those of {name}, by how they fit the nearest neighbours: modularity "
        f"{fits[chosen]:.4f} (the best head: {max(heads):.4f}, k-means: {start:.4f})"
    )


def _opened(root: Path, kind: str, print_: str) -> Artifact:
    """An artifact that another process has just published."""
    for _ in range(_LOOKS):
        found = open_artifact(root, kind, print_)
        if found is not None:
            return found
        time.sleep(1)  # a network file system shows new folders late
    raise StorageError(f"{kind}-{print_} did not appear in {root}; choose an --out that all nodes mount at one place")


@contextmanager
def timed(run: RunFolder, stage: str) -> Any:
    """Note how long a stage took, also when it was interrupted."""
    start = time.monotonic()
    try:
        yield
    finally:
        run.add_seconds(stage, time.monotonic() - start)


def settings_of(section: Settings) -> dict[str, Any]:
    """A section of the recipe as a fingerprint takes it."""
    values: dict[str, Any] = section.model_dump(mode="json")
    return values
