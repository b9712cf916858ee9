"""The settings of the stages: one strict, frozen model each; every field takes part in the fingerprints it shapes."""

import difflib
import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from spice_ray.shares import ESTIMATE, check_shares

Precision = Literal["fp32", "bf16"]
Optimizer = Literal["sgd", "adamw"]
Views = Literal["natural", "digits", "none"]
EncoderName = Literal[
    "convnet",
    "resnet18_small",
    "resnet34_small",
    "resnet18_pooled",
    "resnet34_pooled",
    "resnet18",
    "resnet34",
    "wrn28_2",
    "wrn28_8",
    "wrn37_2",
]
ADAPTIVE = "adaptive"
_LIBRARY_MODEL = re.compile(r"(torchvision|timm)/[\w.-]+")
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors and nothing changes after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, on and true as truth values, and pydantic would read those as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{info.field_name}={str(value).lower()} is a truth value; give a number or a name")
        return value


class Image(Settings):
    """What an image is to the encoder, and what a view may do to it."""

    size: Annotated[int, Field(ge=8, le=1024)]
    """Side of the square images in the shards, pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of red, green and blue in [0, 1], which is taken off; unless told otherwise ImageNet's."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """What they are divided by then."""
    views: Views = "natural"
    """natural: crops, flips and colour; digits: small distortions, never flipped or recoloured; none: no change."""


_NEEDED_BY_LOSS = {
    "moco": ("queue_size", "temperature", "momentum"),
    "simclr": ("temperature",),
    "byol": ("momentum",),
}


class Pretrain(Settings):
    """Stage 1, contrastive learning (paper III-A, eq. 1); skipped where ``weights`` are given."""

    lanes: PositiveInt = 8
    """G: the batch-norm groups a global batch is made of; a worker serves whole lanes."""
    encoder: str = "resnet18_small"
    """A shipped encoder; for given ``weights`` also torchvision/NAME or timm/NAME."""
    weights: Annotated[str, Field(min_length=1)] | None = None
    """A local file of the encoder's weights (safetensors, or torch's), or the folder of another run's encoder; the
    encoder is frozen until stage 3, and the other settings here have no effect."""
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """What the file of ``weights`` must hold; a run notes it here."""
    epochs: PositiveInt
    """How often every image is seen, in two views."""
    batch_size: PositiveInt
    """B: rows of a global batch, over all workers."""
    loss: Literal["moco", "simclr", "byol"] = "moco"
    """MoCo-v2's with a queue, SimCLR's among the batch, or BYOL's without negatives."""
    queue_size: PositiveInt | None = None
    """Q: negative keys of MoCo, a multiple of ``batch_size`` and at most a quarter of the images."""
    projection_dim: PositiveInt = 128
    """P: numbers of a projection, in which views are compared."""
    temperature: PositiveFloat | None = None
    """tau, of MoCo and SimCLR."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """m, of MoCo and BYOL: share of the momentum encoder that stays at each step; BYOL's rises to 1 towards the end."""
    symmetric: bool = False
    """MoCo's loss in both directions, which are added up; those of SimCLR and BYOL always are."""
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The least part of a photograph's area that a view shows; of ``natural`` views."""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the views that are blurred; of ``natural`` ones."""
    optimizer: Optimizer = "sgd"
    """SGD with momentum 0.9, or AdamW."""
    lr: PositiveFloat
    """For batches of ``batch_size``: of a batch c times as large, c times as much with SGD (Goyal et al. 2017)."""
    weight_decay: NonNegativeFloat
    """Of all weights with MoCo and SGD, as in MoCo's code; else not of biases and batch norm's."""
    warmup_epochs: NonNegativeFloat = 0
    """Epochs in which the learning rate rises; then it falls along half a cosine."""
    precision: Precision = "fp32"
    """bf16 computes in half precision where that is safe; fp32 on a GPU has TF32 in convolutions, as torch has."""

    @field_validator("encoder")
    @classmethod
    def _check_encoder(cls, name: str) -> str:
        shipped = get_args(EncoderName)
        if name not in shipped and not _LIBRARY_MODEL.fullmatch(name):
            close = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
            advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(shipped)}"
            raise ValueError(
                f"unknown pretrain.encoder={name!r}; {advice} (and torchvision/NAME or timm/NAME with pretrain.weights)"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is not None:
            return self
        if self.is_library_model:
            raise ValueError(
                f"pretrain.encoder={self.encoder} needs pretrain.weights, a local file of its weights: stage 1 trains "
                "the shipped encoders alone"
            )
        if self.weights_sha256 is not None:
            raise ValueError("pretrain.weights_sha256 is of no use without pretrain.weights; give both or neither")
        self._check_batches()
        self._check_loss()
        return self

    @property
    def is_library_model(self) -> bool:
        """Whether the encoder is one of torchvision or timm."""
        return "/" in self.encoder

    def _check_batches(self) -> None:
        _divides("pretrain.lanes", self.lanes, "pretrain.batch_size", self.batch_size)
        if self.batch_size // self.lanes < 2:
            raise ValueError(
                f"pretrain.batch_size={self.batch_size} leaves fewer than 2 rows to each of "
                f"pretrain.lanes={self.lanes} batch-norm groups; raise the batch size or lower the lanes"
            )

    def _check_loss(self) -> None:
        for name in _NEEDED_BY_LOSS[self.loss]:
            if getattr(self, name) is None:
                raise ValueError(f"pretrain.loss={self.loss} needs pretrain.{name}, which is not given")
        if self.loss == "moco" and self.queue_size is not None:
            twice = " twice" if self.symmetric else ""
            _divides(f"pretrain.batch_size{twice}", self.keys_per_step, "pretrain.queue_size", self.queue_size)

    @property
    def keys_per_step(self) -> int:
        """How many keys each step of MoCo puts into the queue."""
        return self.batch_size * (2 if self.symmetric else 1)


class Heads(Settings):
    """Stage 2, prototype pseudo-labelling (paper III-B, eqs. 2-5)."""

    count: PositiveInt = 10
    """H: heads that are trained, of which one is chosen."""
    epochs: PositiveInt
    """How often every image is labelled anew and learnt from."""
    round_size: PositiveInt
    """M: images labelled in one round; all of them where there are fewer."""
    confident_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a cluster's images in a round whose mean is its prototype: those that the head is surest of."""
    assignment: Literal["overlap", "exclusive"] = "overlap"
    """Whether an image may be labelled for several clusters in a round (the paper's choice), or for one alone."""
    repeats: PositiveInt = 8
    """Passes over the labelled images of a round."""
    batch_size: PositiveInt = 128
    """Labelled images of a step."""
    lr: PositiveFloat = 0.005
    """Of Adam, without a schedule."""
    loss: Literal["double_softmax", "cross_entropy", "tempered"] = "double_softmax"
    """The paper's cross-entropy of a softmax of a softmax (eq. 4), plain cross-entropy, or one with a temperature."""
    entropy_weight: NonNegativeFloat = 0
    """How much the entropy of a batch's mean prediction, which is to be large, counts beside the loss."""
    label_view: Literal["weak", "strong"] = "weak"
    """Views whose probabilities choose the prototypes (E-step); the strong ones: the first of them."""
    train_view: Literal["weak", "strong"] = "strong"
    """Views that learn the pseudo-labels (M-step)."""
    start: Literal["random", "kmeans"] = "random"
    """What chooses the first prototypes: heads of random weights, or k-means, which then is one head more; of all these
    the one is chosen whose clusters fit the nearest neighbours best."""
    views: Annotated[int, Field(ge=0)] = 0
    """How many nearest neighbours of each stand for its strong views; 0: itself."""
    more: Annotated[int, Field(ge=0)] = 10
    """Heads that may be trained beyond ``count`` where every one so far has merged clusters."""
    consensus: bool = False
    """Let the heads whose loss is near the least one vote on each cluster; else it is the chosen head's."""
    prior: tuple[float, ...] | Literal["estimate"] | None = None
    """How the images are shared among the clusters, the largest share first; none: equally. A recipe may name a text
    file with one share per line. The word estimate: as the embedding suggests."""

    @field_validator("prior", mode="before")
    @classmethod
    def _check_prior(cls, value: Any) -> Any:
        return value if value in (None, ESTIMATE) else check_shares(value)


class ImageHeads(Heads):
    """Stage 2 on images."""

    start: Literal["random", "kmeans"] = "random"
    """What chooses the first prototypes: heads of random weights; k-means is for embeddings that are given."""
    views: PositiveInt = 4
    """Strong views of each image whose features are kept for the heads."""

    @field_validator("start")
    @classmethod
    def _check_start(cls, start: str) -> str:
        if start != "random":
            raise ValueError(
                f"heads.start={start} is for embeddings that are given, and this recipe is one of images; use "
                "heads.start=random"
            )
        return start


class Reliable(Settings):
    """Reliable pseudo-labels (paper III-C, eqs. 6-7)."""

    neighbors: PositiveInt | Literal["adaptive"] | None = None
    """Ns; none: N / (6 K), at least 10 and at most 100; adaptive: the same of each sample's own cluster, a sixth of its
    size."""
    min_consistency: Annotated[float, Field(ge=0, lt=1)]
    """tau_c: a sample is reliable when a larger share of its neighbours has its label."""
    min_confidence: Annotated[float, Field(ge=0, lt=1)] = 0
    """A sample is reliable only when its head is surer than this; 0: no such gate."""
    index: Literal["exact", "ivf"] = "exact"
    """How neighbours are found: exact compares all rows; ivf, for many millions of them, those of the nearest of
    faiss's inverted lists, as many as find 99 % of the neighbours of a sample."""
    balance: Literal["none", "weights", "smallest"] = "none"
    """Of clusters with different numbers of reliable samples: none: as they are; weights: each cluster counts the same;
    smallest: as in the published code, each keeps as many as the smallest has."""
    strict: bool = False
    """A cluster without a reliable sample is an error."""

    @field_validator("neighbors", mode="before")
    @classmethod
    def _check_neighbors(cls, value: Any) -> Any:
        is_count = value is None or isinstance(value, bool) or (str(value).isdecimal() and int(value) >= 1)
        if not is_count and value != ADAPTIVE:
            raise ValueError(
                f"reliable.neighbors={value} cannot be used; give a whole number of at least 1, or {ADAPTIVE}"
            )
        return value


class ImageReliable(Reliable):
    """What stage 3 learns from on images."""

    labels: Annotated[str, Field(min_length=1)] | None = None
    """Parquet file of labels that are known, ``label`` in 0..K-1 by ``sample_id`` or ``source``: they take the place of
    reliable pseudo-labels, and nothing else of this section counts. With ``joint.init=scratch`` stages 1 and 2 are left
    out."""
    labels_digest: str | None = None
    """Of what the file holds; a run fills it in."""


class Joint(Settings):
    """Stage 3, joint training (paper III-C, eqs. 8-9)."""

    lanes: PositiveInt = 8
    """As ``pretrain.lanes``; it divides ``labelled_batch``."""
    encoder: EncoderName | None = None
    """Another encoder than stage 1's, only with ``init: scratch``."""
    init: Literal["stage2", "scratch"] = "stage2"
    """Whether training goes on from the encoder and the chosen head, or begins with random weights."""
    steps: Annotated[int, Field(ge=0)]
    """Optimiser steps; 0: no stage 3, and the result is the chosen head's."""
    rounds: PositiveInt = 1
    """Train so many times, ``steps`` each: before each but the first, reliable samples are chosen anew among what the
    model predicts by then, by neighbours in its own embedding."""
    patience: Annotated[int, Field(ge=100)] | None = None
    """Stop where the share of images whose views agree with confidence has not grown for so many steps; none: never."""
    labelled_batch: PositiveInt
    """B: reliable samples of a global batch."""
    unlabelled_ratio: PositiveInt = 7
    """mu: unlabelled rows for each labelled one."""
    confidence: Annotated[float, Field(ge=0, lt=1)]
    """tau: a weak view's prediction surer than this becomes the label of the strong view."""
    threshold: Literal["fixed", "adaptive"] = "fixed"
    """fixed: tau is ``confidence``; adaptive: as sure as predictions are on average, less for clusters that are
    predicted less (FreeMatch), and ``confidence`` counts for ``patience`` alone; the averages forget as ``ema`` says.
    For few given labels."""
    unlabelled_weight: NonNegativeFloat = 1
    """lambda: how much the unlabelled images count beside the reliable ones."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Share of the averaged weights, which are the result, that stays at each step."""
    optimizer: Optimizer = "sgd"
    """SGD with Nesterov's momentum 0.9, or AdamW."""
    lr: PositiveFloat
    """At the beginning; it falls along 7/16 of a cosine."""
    weight_decay: NonNegativeFloat
    """Not of biases and batch norm's weights."""
    one_pass: bool = True
    """Weak and strong views share batch-norm statistics; false: weak views of the unlabelled go first, alone."""
    precision: Precision = "fp32"
    """As ``pretrain.precision``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _divides("joint.lanes", self.lanes, "joint.labelled_batch", self.labelled_batch)
        if self.encoder is not None and self.init == "stage2":
            raise ValueError(
                f"joint.encoder={self.encoder} needs joint.init=scratch: stage 2's weights fit its own encoder alone"
            )
        return self


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        lower, upper = value - value % divisor, value + divisor - value % divisor
        near = f"{upper}" if lower == 0 else f"{lower} or {upper}"
        raise ValueError(f"{divisor_name}={divisor} does not divide {name}={value}; use {name}={near}")
