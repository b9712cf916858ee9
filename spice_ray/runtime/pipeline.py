"""The paper's three stages as a straight line of artifacts: each is opened where it is complete, and else made."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from spice_ray.config import Recipe, num_neighbors, perfect_loss
from spice_ray.contracts import ASSIGNMENTS, EMBEDDING, ENCODER, HEADS, JOINT, LABELS, RELIABLE
from spice_ray.errors import StorageError
from spice_ray.run_folder import RunFolder
from spice_ray.runtime.data import Shards, check_lanes, open_shards
from spice_ray.runtime.heads import open_bank, publish_heads, train_heads
from spice_ray.runtime.inference import publish_assignments, publish_embedding, training_ids
from spice_ray.runtime.progress import Done, Reporter, watched
from spice_ray.runtime.reading import find_damaged
from spice_ray.runtime.reliable import check_clusters, publish_reliable, why_skip
from spice_ray.runtime.train import fit
from spice_ray.runtime.workers import JointJob, PretrainJob, publish_skipped, run_joint, run_pretrain
from spice_ray.shards import check_shards, splits_of
from spice_ray.storage import Artifact, fingerprint, open_artifact

Show = Callable[[Done], None]
_LOOKS = 10


@dataclass(frozen=True)
class Pipeline:
    """One run: where it is, what it is made of, and whom to tell."""

    run: RunFolder
    recipe: Recipe
    shards_artifact: Artifact
    labels: Artifact | None
    reporter: Reporter

    def __post_init__(self) -> None:
        """Refuse images that the recipe does not fit.

        Raises:
            ConfigError: They are too few, or of another size.
        """
        recipe = self.recipe
        check_shards(recipe, self.shards_artifact)
        check_lanes(self.pretrain_shards, recipe.pretrain.lanes, "pretrain.lanes")
        check_lanes(self.train_shards, recipe.joint.lanes, "joint.lanes")

    @cached_property
    def damaged(self) -> frozenset[str]:
        """Shard files that are left out; only looked for where that is allowed, as every file is read for it."""
        if not self.recipe.scale.skip_damaged:
            return frozenset()
        shards = open_shards(self.shards_artifact, None)
        damaged = find_damaged(shards.path, shards.readable)
        if damaged:
            lost = sum(file.rows for file in shards.files if file.name in damaged)
            self.reporter.note(
                f"{lost} images of {shards.num_rows} are left out, their shard files are damaged: "
                f"{', '.join(sorted(damaged))}"
            )
        return damaged

    @cached_property
    def all_shards(self) -> Shards:
        """Every image."""
        return open_shards(self.shards_artifact, None, self.damaged)

    @cached_property
    def pretrain_shards(self) -> Shards:
        """The images that stage 1 sees."""
        return open_shards(self.shards_artifact, splits_of(self.recipe.protocol, first_stage=True), self.damaged)

    @cached_property
    def train_shards(self) -> Shards:
        """The images that stages 2 and 3 see."""
        return open_shards(self.shards_artifact, splits_of(self.recipe.protocol, first_stage=False), self.damaged)

    @cached_property
    def encoder(self) -> Artifact:
        """Stage 1."""
        recipe = self.recipe
        settings = {"pretrain": _settings(recipe.pretrain), "image": _settings(recipe.image), **self._common()}
        if self.damaged:
            settings["damaged"] = sorted(self.damaged)

        def make(print_: str, progress: Path, show: Show) -> None:
            job = PretrainJob(recipe.pretrain, recipe.image, self.pretrain_shards, recipe.seed, self._root, print_)
            watched(lambda: fit(run_pretrain, job, recipe.scale, self.run.checkpoints, progress), progress, show)

        return self._artifact(ENCODER, "stage 1: contrastive encoder", "steps", settings, [self.shards_artifact], make)

    @cached_property
    def embedding(self) -> Artifact:
        """The frozen embedding and the heads' views."""
        recipe = self.recipe
        encoder = self.encoder
        settings = {"views": recipe.heads.views, "image": _settings(recipe.image), "seed": recipe.seed}

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_embedding(
                self._root,
                print_,
                recipe,
                recipe.scale,
                encoder,
                self.all_shards,
                lambda done, total: show(Done(done, total, None)),
            )

        return self._artifact(EMBEDDING, "frozen embedding", "images", settings, [encoder], make)

    @cached_property
    def heads(self) -> Artifact:
        """Stage 2."""
        recipe = self.recipe
        embedding = self.embedding
        settings = {"heads": _settings(recipe.heads), "num_clusters": recipe.num_clusters, **self._common()}

        def make(print_: str, progress: Path, show: Show) -> None:
            bank, ids = open_bank(embedding), training_ids(self.train_shards)
            finished = self.run.checkpoints / f"heads-{print_}"
            work = partial(train_heads, recipe, recipe.scale, bank, ids, progress, finished)
            trained = watched(work, progress, show)
            publish_heads(self._root, print_, recipe, bank, trained)
            shutil.rmtree(finished, ignore_errors=True)

        return self._artifact(HEADS, "stage 2: clustering heads", "epochs", settings, [embedding], make)

    @cached_property
    def reliable(self) -> Artifact:
        """Reliable pseudo-labels."""
        recipe = self.recipe
        heads = self.heads
        neighbors = num_neighbors(recipe.reliable, self.train_shards.num_counted, recipe.num_clusters)
        settings = {"reliable": {**_settings(recipe.reliable), "neighbors": neighbors}, **self._common()}
        settings["reliable"].pop("strict")

        def make(print_: str, progress: Path, show: Show) -> None:
            ids = training_ids(self.train_shards)
            device = torch.device("cuda" if recipe.scale.gpus_per_worker and torch.cuda.is_available() else "cpu")
            publish_reliable(self._root, print_, recipe, heads, self.embedding, ids, device)

        found = self._artifact(RELIABLE, "reliable pseudo-labels", "images", settings, [heads], make)
        check_clusters(found, recipe)
        return found

    @cached_property
    def joint(self) -> Artifact:
        """Stage 3."""
        reliable = self.reliable
        self._warn_of_empty_clusters(reliable)

        def make(print_: str, progress: Path, show: Show) -> None:
            job, skip = self.joint_job(print_), self.why_skip_joint()
            if skip is not None:
                self.reporter.note(f"stage 3 is skipped: {skip}")
                publish_skipped(job, skip)
                return
            watched(lambda: fit(run_joint, job, self.recipe.scale, self.run.checkpoints, progress), progress, show)

        return self._artifact(JOINT, "stage 3: joint training", "steps", self._joint_settings(), [reliable], make)

    def make_shared(self) -> None:
        """Stages 1 and 2, once, before the trials of a sweep would each make them."""
        self.reporter.note(f"stages 1 and 2: {self.heads.path.name}")

    def joint_job(self, print_: str) -> JointJob:
        """What a worker of stage 3 is given."""
        recipe = self.recipe
        return JointJob(
            recipe.joint,
            recipe.image,
            self.train_shards,
            recipe.seed,
            recipe.num_clusters,
            self.encoder,
            self.heads,
            self.reliable,
            self._root,
            print_,
        )

    def joint_fingerprint(self) -> str:
        """The name that stage 3's artifact has or will have."""
        return fingerprint(JOINT, self._joint_settings(), [self.reliable.fingerprint])

    def why_skip_joint(self) -> str | None:
        """Why stage 3 cannot be trained, or None."""
        rows = [file.rows for file in self.train_shards.files]
        return why_skip(self.reliable, self.recipe, rows, self.recipe.joint.lanes)

    @cached_property
    def assignments(self) -> Artifact:
        """Every image's cluster."""
        recipe, joint = self.recipe, self.joint
        reliable = self.reliable
        settings = {"image": _settings(recipe.image), "fraction": recipe.heads.confident_fraction}

        def make(print_: str, progress: Path, show: Show) -> None:
            def report(done: int, total: int) -> None:
                show(Done(done, total, None))

            publish_assignments(self._root, print_, recipe, recipe.scale, joint, reliable, self.train_shards, report)

        return self._artifact(ASSIGNMENTS, "assignments", "images", settings, [joint, reliable], make)

    def finish(self) -> Artifact:
        """Run all stages and give the user the tables."""
        result = self.assignments
        self._tell_loss()
        self.run.publish_table(result, "assignments.parquet")
        self.run.publish_table(self.shards_artifact, "rejects.parquet")
        made = [self.shards_artifact, self.encoder, self.embedding, self.heads, self.reliable, self.joint]
        prints = {artifact.kind: artifact.fingerprint for artifact in (*made, result)}
        root, own = self.shards_artifact.path.parent.resolve(), self.run.artifacts.resolve()
        self.run.record(
            artifacts={**prints, LABELS: self.labels.fingerprint if self.labels else None},
            damaged=sorted(self.damaged),
            # Shards of this run's own move with it; others stay where they are.
            shards_root=os.path.relpath(root, self.run.path.resolve()) if root == own else str(root),
        )
        return result

    @property
    def _root(self) -> Path:
        return self.run.artifacts

    def _common(self) -> dict[str, Any]:
        return {"seed": self.recipe.seed, "protocol": self.recipe.protocol}

    def _joint_settings(self) -> dict[str, Any]:
        return {"joint": _settings(self.recipe.joint), "image": _settings(self.recipe.image), **self._common()}

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
        with self.reporter.stage(title, unit) as show, timed(self.run, title):
            make(print_, self.run.progress(kind), show)
        return _opened(self._root, kind, print_)

    def _warn_of_empty_clusters(self, reliable: Artifact) -> None:
        empty = [cluster for cluster, kept in enumerate(reliable.manifest["kept"]) if kept == 0]
        if empty:
            self.reporter.note(
                f"clusters {empty} have no reliable sample; stage 3 goes on without (kept: {reliable.manifest['kept']})"
            )

    def _tell_loss(self) -> None:
        loss, best = min(self.heads.manifest["losses"]), perfect_loss(self.recipe.num_clusters)
        self.reporter.note(f"least unsupervised loss of the heads: {loss:.4f} (perfect clusters: {best:.4f})")


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


def _settings(section: Any) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump(mode="json")
    return values
