"""The paper's three stages on images, as a straight line of artifacts."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from spice_ray.config import ImageRecipe
from spice_ray.contracts import ASSIGNMENTS, EMBEDDING, ENCODER, JOINT, PREDICTIONS, RELIABLE
from spice_ray.core.order import stream_key
from spice_ray.errors import ConfigError, DataError
from spice_ray.image_counts import check_count
from spice_ray.readers.given_labels import read_given_labels
from spice_ray.runtime.data import Shards, check_lanes, open_shards
from spice_ray.runtime.frozen import check_trainable, given_settings, publish_given
from spice_ray.runtime.given_labels import MatchedLabels, match_given_labels, publish_given_labels
from spice_ray.runtime.inference import publish_assignments, publish_embedding, publish_predictions, training_ids
from spice_ray.runtime.pipeline import Pipeline, Show, settings_of
from spice_ray.runtime.progress import Done, watched
from spice_ray.runtime.reliable import GIVEN, why_a_lane_is_bare, why_skip
from spice_ray.runtime.train import fit
from spice_ray.runtime.workers import Host, JointJob, PretrainJob, publish_skipped, run_joint, run_pretrain
from spice_ray.shards import splits_of
from spice_ray.storage import Artifact, fingerprint
from spice_ray.sweep import Stage, stage_of


@dataclass(frozen=True)
class Round:
    """One training of stage 3."""

    number: int
    """Counted from 1."""
    reliable: Artifact
    """What it learns from."""
    neighbors: Artifact | None = None
    """By which that was chosen; none where labels are given."""
    before: Artifact | None = None
    """The classifier that it starts from; none in the first round."""


@dataclass(frozen=True)
class ImagePipeline(Pipeline):
    """A run on images."""

    recipe: ImageRecipe

    def __post_init__(self) -> None:
        """Refuse images that the recipe does not fit.

        Raises:
            ConfigError: They are too few, or of another size.
        """
        super().__post_init__()
        check_count(self.recipe, self.pretrain_shards.num_counted, self.train_shards.num_counted)
        if self.recipe.pretrain.weights is None and not self.recipe.is_supervised:
            check_lanes(self.pretrain_shards, self.recipe.pretrain.lanes, "pretrain.lanes")
        check_lanes(self.train_shards, self.recipe.joint.lanes, "joint.lanes")

    @cached_property
    def pretrain_shards(self) -> Shards:
        """The images that stage 1 sees."""
        return open_shards(self.shards_artifact, splits_of(self.recipe.protocol, first_stage=True), self.damaged)

    @cached_property
    def encoder(self) -> Artifact:
        """Stage 1, or the weights that are given in its place."""
        return self._trained_encoder() if self.recipe.pretrain.weights is None else self._given_encoder()

    def _given_encoder(self) -> Artifact:
        def make(print_: str, progress: Path, show: Show) -> None:
            publish_given(self._root, print_, self.recipe)

        return self._artifact(ENCODER, "stage 1: given weights", "files", given_settings(self.recipe), [], make)

    def _trained_encoder(self) -> Artifact:
        recipe = self.recipe
        pretrain = {key: value for key, value in settings_of(recipe.pretrain).items() if not key.startswith("weights")}
        settings = {"pretrain": pretrain, "image": settings_of(recipe.image), **self._common()}
        if self.damaged:
            settings["damaged"] = sorted(self.damaged)

        def make(print_: str, progress: Path, show: Show) -> None:
            job = PretrainJob(recipe.pretrain, recipe.image, self.pretrain_shards, recipe.seed, self._root, print_)
            watched(lambda: self._fit(run_pretrain, job, progress), progress, show)

        return self._artifact(ENCODER, "stage 1: contrastive encoder", "steps", settings, [self.shards_artifact], make)

    @cached_property
    def embedding(self) -> Artifact:
        """The frozen embedding and the heads' views."""
        recipe = self.recipe
        encoder = self.encoder
        settings = {"views": recipe.heads.views, "image": settings_of(recipe.image), "seed": recipe.seed}
        parents = [encoder]
        # A trained encoder is named by its images, a given one is not.
        if recipe.pretrain.weights is not None:
            parents.append(self.shards_artifact)
            settings["damaged"] = sorted(self.damaged)

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_embedding(
                self._root,
                print_,
                recipe,
                recipe.scale,
                encoder,
                self.all_shards,
                self.run.shared_checkpoints / f"{EMBEDDING}-{print_}",
                lambda done, total: show(Done(done, total, None)),
            )

        return self._artifact(EMBEDDING, "frozen embedding", "images", settings, parents, make)

    @cached_property
    def reliable(self) -> Artifact:
        """What stage 3 learns from: reliable pseudo-labels, or labels that are given."""
        recipe = self.recipe
        if recipe.reliable.labels is None:
            return super().reliable
        heads = None if recipe.is_supervised else self.heads
        settings = {"labels": recipe.reliable.labels_digest, "damaged": sorted(self.damaged), **self._common()}
        settings["num_clusters"] = recipe.num_clusters
        parents = [self.shards_artifact] if heads is None else [self.shards_artifact, heads]

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_given_labels(self._root, print_, self._matched_labels, recipe.num_clusters, heads)

        found = self._artifact(RELIABLE, "given labels", "images", settings, parents, make)
        if found.manifest["left_out"]:
            self.reporter.note(
                f"{found.manifest['left_out']} given labels are left out, of images that stage 3 does not see"
            )
        bare = [cluster for cluster, count in enumerate(found.manifest["kept"]) if count == 0]
        if bare:
            self.reporter.note(f"no given label is of the clusters {bare}, so that stage 3 learns nothing of them")
        return found

    @cached_property
    def _matched_labels(self) -> MatchedLabels:
        settings, shards = self.recipe.reliable, self.train_shards
        assert settings.labels is not None
        given = read_given_labels(settings.labels, self.recipe.num_clusters)
        if given.digest() != settings.labels_digest:
            raise DataError(f"{given.file} has changed since the run began; run the command again with a new --out")
        return match_given_labels(given, shards, training_ids(shards))

    @cached_property
    def joint(self) -> Artifact:
        """Stage 3."""
        return self._joint_of(self.last_round)

    @cached_property
    def first_round(self) -> Round:
        """What stage 3 begins with."""
        reliable = self.reliable  # first: it has stage 2 trained before neighbours are looked for
        neighbors = None if self.recipe.reliable.labels is not None else self.neighbors
        return Round(1, reliable, neighbors)

    @cached_property
    def last_round(self) -> Round:
        """What the last round of stage 3 learns from; those before it are trained for it."""
        round_ = self.first_round
        while round_.number < self.recipe.joint.rounds:
            joint = self._joint_of(round_)
            if joint.manifest["skipped"] is not None:
                break
            following = self._round_after(round_, joint)
            skip = self.why_skip_joint(following)
            if skip is not None:
                self.reporter.note(f"stage 3 ends with round {round_.number}: {skip}")
                break
            round_ = following
        return round_

    def _round_after(self, done: Round, joint: Artifact) -> Round:
        predictions = self._predictions_of(joint)
        neighbors = self.neighbors_in(predictions)
        reliable = self.reliable_among(predictions, neighbors)
        self.reporter.note(
            f"round {done.number + 1} of stage 3: {sum(reliable.manifest['kept'])} reliable samples, "
            f"{sum(done.reliable.manifest['kept'])} before"
        )
        return Round(done.number + 1, reliable, neighbors, joint)

    def _predictions_of(self, joint: Artifact) -> Artifact:
        recipe = self.settled
        assert isinstance(recipe, ImageRecipe)

        def make(print_: str, progress: Path, show: Show) -> None:
            def report(done: int, total: int) -> None:
                show(Done(done, total, None))

            publish_predictions(self._root, print_, recipe, recipe.scale, joint, self.train_shards, report)

        settings = {"image": settings_of(recipe.image)}
        return self._artifact(PREDICTIONS, "predictions for the next round", "images", settings, [joint], make)

    def _joint_of(self, round_: Round) -> Artifact:
        recipe = self.recipe

        def make(print_: str, progress: Path, show: Show) -> None:
            job, skip = self.joint_job(round_, print_), self.why_skip_joint(round_)
            if skip is not None:
                self.reporter.note(f"stage 3 is skipped: {skip}")
                publish_skipped(job, skip)
                return
            watched(lambda: self._fit(run_joint, job, progress), progress, show)

        title = "stage 3: joint training" + (f", round {round_.number}" if round_.before is not None else "")
        found = self._artifact(JOINT, title, "steps", self._joint_settings(), joint_parents(round_), make)
        if found.manifest["skipped"] is None and found.manifest["steps"] < recipe.joint.steps:
            steps = found.manifest["steps"]
            self.reporter.note(f"stage 3 ended after {steps} of {recipe.joint.steps} steps: nothing grew any more")
        return found

    def _fit(self, run: Callable[[Any, Host], None], job: PretrainJob | JointJob, progress: Path) -> None:
        recipe = self.recipe
        fit(run, job, recipe.scale, recipe.worker_counts, self.run.checkpoints, progress, self.reporter.note)

    def make_shared(self, first_key: str, *, neighbors: bool) -> Self:
        """What all trials of a sweep share, before each would make it: the stages above the first that they vary.

        Gives the run with its K and its prior.

        Args:
            first_key: A setting of the first stage that they vary.
            neighbors: Whether trials need neighbours of each row in the embedding.
        """
        if self.recipe.is_supervised or first_key.startswith("pretrain."):
            return self
        if stage_of(first_key) == "encoder":
            self._tell("stage 1", self.encoder)
            return self
        stage: Stage = "encoder" if stage_of(first_key) == "heads" else "heads"
        self.make_through(stage, neighbors=neighbors)
        settled = self.settled
        assert isinstance(settled, ImageRecipe)
        return replace(self, recipe=settled)

    def make_through(self, stage: Stage, *, neighbors: bool) -> None:
        """Make what the stages behind ``stage`` begin with: the embedding, or heads, and neighbours where needed."""
        self._tell("embedding", self.embedding)
        if neighbors:
            self._tell("neighbours", self.neighbors)
        if stage == "heads":
            self._tell("stage 2", self.heads)

    def _tell(self, name: str, made: Artifact) -> None:
        self.reporter.note(f"{name}: {made.path.name}")

    def finish(self) -> Artifact:
        """Run all stages and give the user the tables."""
        if not self.run.is_finished:
            self.check_labels()
        result = super().finish()
        for parts in self.run.shared_checkpoints.glob(f"{EMBEDDING}-*"):
            shutil.rmtree(parts, ignore_errors=True)  # of images of which some were found damaged later, say
        return result

    def check_labels(self, *, lanes_are_known: bool = True) -> None:
        """See that stage 3 can learn from given labels, if there are any, before the work of days.

        Raises:
            DataError: They are of other images.
            ConfigError: They leave a lane without any.
        """
        if self.recipe.reliable.labels is None:
            return
        known, rows = self._matched_labels.known, [file.rows for file in self.train_shards.files]
        bare = why_a_lane_is_bare(known, rows, self.recipe.joint.lanes, *GIVEN)
        if bare is not None and lanes_are_known:
            raise ConfigError(bare)

    def joint_job(self, round_: Round, print_: str) -> JointJob:
        """What a worker of stage 3 is given.

        Raises:
            ConfigError: It cannot train the encoder that was given.
        """
        recipe = self.recipe
        encoder, heads = (None, None) if recipe.is_supervised else (self.encoder, self.heads)
        if encoder is not None:
            check_trainable(recipe, encoder.manifest)
        return JointJob(
            recipe.joint,
            recipe.image,
            self.train_shards,
            # Another round sees other images and views.
            recipe.seed if round_.before is None else stream_key(recipe.seed, "round", round_.number),
            self.settled.num_clusters,
            recipe.joint.encoder or recipe.pretrain.encoder,
            encoder,
            heads,
            round_.before,
            round_.reliable,
            self._root,
            print_,
        )

    def joint_fingerprint(self, round_: Round) -> str:
        """The name that stage 3's artifact has or will have."""
        parents = [parent.fingerprint for parent in joint_parents(round_)]
        return fingerprint(JOINT, self._joint_settings(), parents)

    def why_skip_joint(self, round_: Round) -> str | None:
        """Why stage 3 cannot be trained, or None.

        Raises:
            ConfigError: The same, of labels that are given.
        """
        if self.recipe.joint.steps == 0:
            return "joint.steps=0 leaves it out"
        rows = [file.rows for file in self.train_shards.files]
        reason = why_skip(round_.reliable, self.settled, rows, self.recipe.joint.lanes)
        if reason is not None and self.recipe.reliable.labels is not None:
            raise ConfigError(reason)
        return reason

    @cached_property
    def assignments(self) -> Artifact:
        """Every image's cluster."""
        recipe, joint, reliable = self.settled, self.joint, self.last_round.reliable
        assert isinstance(recipe, ImageRecipe)
        settings = {"image": settings_of(recipe.image), "fraction": recipe.heads.confident_fraction}

        def make(print_: str, progress: Path, show: Show) -> None:
            def report(done: int, total: int) -> None:
                show(Done(done, total, None))

            publish_assignments(self._root, print_, recipe, recipe.scale, joint, reliable, self.train_shards, report)

        return self._artifact(ASSIGNMENTS, "assignments", "images", settings, [joint, reliable], make)

    @property
    def made(self) -> list[Artifact]:
        """Shards, and what each stage left behind."""
        found = [self.shards_artifact]
        if not self.recipe.is_supervised:
            found += [self.encoder, self.embedding, self.heads]
        last = self.last_round
        if last.neighbors is not None:
            found.append(last.neighbors)
        return [*found, last.reliable, self.joint]

    def _joint_settings(self) -> dict[str, Any]:
        """Of every round: what one is does not depend on how many follow."""
        joint = {key: value for key, value in settings_of(self.recipe.joint).items() if key != "rounds"}
        if self.recipe.is_supervised:  # no encoder is among the parents
            joint["encoder"] = self.recipe.joint.encoder or self.recipe.pretrain.encoder
        return {"joint": joint, "image": settings_of(self.recipe.image), **self._common()}


def joint_parents(round_: Round) -> list[Artifact]:
    """What a round of stage 3 is made of."""
    return [round_.reliable] if round_.before is None else [round_.reliable, round_.before]
