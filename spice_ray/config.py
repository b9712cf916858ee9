"""The settings of a run: those of its stages, and Scale, which says how and never what.

Every field of the science takes part in the fingerprints of the artifacts it shapes; ``scale`` takes part in none.
How a recipe is read from YAML and overridden is in ``recipe.py``.
"""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from spice_ray.settings import (
    Heads,
    Image,
    ImageHeads,
    ImageReliable,
    Joint,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Pretrain,
    Reliable,
    Settings,
)
from spice_ray.shares import ESTIMATE


class Scale(Settings):
    """How the work is spread; no result depends on it beyond the order of summation."""

    workers: PositiveInt | Literal["auto"] = 1
    """Training workers, and actors that embed and assign. auto: as many as the cluster holds and the lanes can be
    shared among; when training loses one, those that are left go on, each of which then computes more of a batch."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """1, or a part of a GPU that several share; 0: workers compute on processors."""
    cpus_per_worker: PositiveInt = 1
    """Processors of each worker and actor."""
    accumulate: PositiveInt = 1
    """Parts that a worker computes a batch in, one after the other: a batch that its memory would not hold at once.
    SimCLR's batches stay whole in stage 1."""
    compile: bool = False
    """Have torch compile the encoders that are trained, and a GPU record the steps of stages 1 and 3 (CUDA graphs), or
    with several workers how views are made. They begin some minutes later, for steps that are meant to be faster on a
    GPU, and are not on a processor; every node needs a compiler (gcc and g++) and Python's headers."""
    head_actors: PositiveInt | None = None
    """Actors that share the heads, or the search for neighbours; none: one per head where the cluster has room, else
    one per free processor."""
    head_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each head actor, on which it trains its heads side by side."""
    bank_memory: NonNegativeFloat | None = None
    """GiB of Ray's object store that the features for the heads may take; larger ones are mapped from the files of the
    run. None: half of what is free there."""
    resident_memory: NonNegativeFloat | None = None
    """GiB of images that a training worker may hold; more are streamed. None: half of what is free."""
    skip_damaged: bool = False
    """Go on without the images of damaged shard files, the one setting here that may change a result."""
    wait_seconds: NonNegativeFloat = 0
    """How long a cluster that grows by itself may take to hold the workers, before they are too many for it."""
    checkpoint_seconds: PositiveFloat = 30
    """Between two checkpoints of training."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often training goes on after a worker was lost."""

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        is_name = isinstance(value, str) and value != "auto" and not value.isdecimal()
        if is_name or (isinstance(value, int) and not isinstance(value, bool) and value < 1):
            raise ValueError(f"scale.workers={value} cannot be used; give a whole number of at least 1, or auto")
        return value

    @property
    def least_workers(self) -> int:
        """What a cluster must hold."""
        return 1 if self.workers == "auto" else self.workers


MOST_CLUSTERS = 50
"""What ``num_clusters: auto`` tries at most."""
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")


class Recipe(Settings):
    """Everything that a run on finished embeddings is made of: stage 2 and reliable pseudo-labels, for any run."""

    num_clusters: Annotated[int, Field(ge=2)]
    """K; or a range such as 8-12 or the word auto, for one that is chosen by the embedding: then the most it may be."""
    min_clusters: Annotated[int, Field(ge=2)] | None = None
    """The least that K may be; none: K is ``num_clusters``. A range sets both."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """All random numbers depend on it, and the order of the images."""
    protocol: Literal["whole", "split"] = "whole"
    """whole: all images are learnt from, those of the split unlabeled in stage 1 alone. split: those of the split test
    are only given their clusters, by which the run is scored."""
    heads: Heads
    """Stage 2."""
    reliable: Reliable
    """Reliable pseudo-labels."""
    scale: Scale = Scale()
    """How the work is spread."""

    @model_validator(mode="before")
    @classmethod
    def _read_range(cls, values: Any) -> Any:
        """A range or the word auto, as the least and the most that K may be."""
        asked = values.get("num_clusters") if isinstance(values, dict) else None
        if asked is None or isinstance(asked, int | float) or str(asked).isdecimal():
            return values
        least, most = 2, MOST_CLUSTERS
        if asked != "auto":
            found = _RANGE.fullmatch(str(asked))
            least, most = (int(number) for number in found.groups()) if found else (0, 0)
        if not 2 <= least < most:
            raise ValueError(
                f"num_clusters={asked} cannot be used; give a whole number of at least 2, a range such as 8-12, or auto"
            )
        return {**values, "num_clusters": most, "min_clusters": least}

    @model_validator(mode="after")
    def _check_clusters(self) -> Self:
        if self.min_clusters is not None and self.min_clusters >= self.num_clusters:
            raise ValueError(
                f"min_clusters={self.min_clusters} is not below num_clusters={self.num_clusters}; write both as one "
                "range, such as num_clusters=8-12"
            )
        if self.heads.round_size < self.num_clusters:
            raise ValueError(
                f"heads.round_size={self.heads.round_size} is smaller than num_clusters={self.asked_clusters}; "
                "a labelling round needs at least one image per cluster"
            )
        return self

    @model_validator(mode="after")
    def _check_prior(self) -> Self:
        prior = self.heads.prior
        if not isinstance(prior, tuple):
            return self
        if self.min_clusters is not None:
            raise ValueError(
                f"heads.prior has a share for each cluster and num_clusters={self.asked_clusters} leaves their number "
                f"open; give one number, or heads.prior={ESTIMATE}"
            )
        if len(prior) != self.num_clusters:
            raise ValueError(
                f"heads.prior holds {len(prior)} shares and num_clusters={self.num_clusters}; give one share per "
                "cluster"
            )
        return self

    @property
    def asked_clusters(self) -> str:
        """K, or the range that it is chosen from, as one writes it."""
        return str(self.num_clusters) if self.min_clusters is None else f"{self.min_clusters}-{self.num_clusters}"


class ImageRecipe(Recipe):
    """Everything that a run on images is made of: all three stages."""

    image: Image
    """What an image is."""
    pretrain: Pretrain
    """Stage 1."""
    heads: ImageHeads
    reliable: ImageReliable
    joint: Joint
    """Stage 3."""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        most = math.gcd(*self._trained_lanes.values())
        workers = self.scale.least_workers
        for stage, lanes in self._trained_lanes.items():
            if lanes % workers:
                raise ValueError(
                    f"scale.workers={workers} does not divide {stage}.lanes={lanes}, and a worker serves "
                    f"whole lanes; use scale.workers={most} or a divisor of it, or more lanes"
                )
        for stage, lanes in self._trained_lanes.items():
            if lanes // workers % self.scale.accumulate:
                raise ValueError(
                    f"scale.accumulate={self.scale.accumulate} does not divide the {lanes // workers} lanes "
                    f"that each worker has of {stage}.lanes={lanes}, and a part is whole lanes; use "
                    f"scale.accumulate={most // workers} or a divisor of it"
                )
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.reliable.labels is None:
            return self
        if self.min_clusters is not None:
            raise ValueError(
                f"reliable.labels says which clusters there are and num_clusters={self.asked_clusters} leaves their "
                "number open; give one number"
            )
        if self.joint.steps == 0:
            raise ValueError(
                "joint.steps=0 leaves stage 3 out, which learns from reliable.labels; give steps, or no labels"
            )
        if self.joint.rounds > 1:
            raise ValueError(
                f"joint.rounds={self.joint.rounds} chooses reliable samples anew, and reliable.labels gives labels "
                "that stay; leave one of them out"
            )
        if self.is_supervised and self.heads.prior == ESTIMATE:
            raise ValueError(
                "heads.prior=estimate needs an embedding, which reliable.labels with joint.init=scratch leaves out; "
                "leave heads.prior out"
            )
        return self

    @property
    def is_supervised(self) -> bool:
        """Whether labels are given and stage 3 starts anew: then it is the only stage."""
        return self.reliable.labels is not None and self.joint.init == "scratch"

    @property
    def _trained_lanes(self) -> dict[str, int]:
        """Lanes of each stage that is trained."""
        joint = {"joint": self.joint.lanes}
        return (
            joint
            if self.pretrain.weights is not None or self.is_supervised
            else {"pretrain": self.pretrain.lanes, **joint}
        )

    @property
    def worker_counts(self) -> list[int]:
        """How many workers may share the lanes of every stage that is trained, ascending; one number unless auto."""
        if self.scale.workers != "auto":
            return [self.scale.workers]
        most = math.gcd(*self._trained_lanes.values()) // self.scale.accumulate
        return [workers for workers in range(1, most + 1) if most % workers == 0]

    @model_validator(mode="after")
    def _check_joint_encoder(self) -> Self:
        if self.pretrain.is_library_model and self.joint.init == "scratch" and self.joint.encoder is None:
            raise ValueError(
                f"joint.init=scratch needs joint.encoder, such as resnet18, where pretrain.encoder="
                f"{self.pretrain.encoder} is used with its weights alone"
            )
        return self
