"""Sweeps: which settings are tried, as a file says, checked as strictly as a recipe."""

import itertools
import json
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from spice_ray.errors import ConfigError
from spice_ray.recipe import first_sentence, nearest, read_yaml, setting_keys
from spice_ray.settings import PositiveInt, Settings

Value = int | float | str | bool | None
Values = dict[str, Value]
"""Settings of one trial by their dotted keys."""
Stage = Literal["encoder", "heads", "joint"]
STAGES: tuple[Stage, ...] = ("encoder", "heads", "joint")

_STAGE_OF_SECTION: dict[str, Stage] = {"pretrain": "encoder", "heads": "heads", "reliable": "joint", "joint": "joint"}
_OF_ALL_TRIALS = (
    *("pretrain.weights", "pretrain.weights_sha256", "heads.prior", "heads.start"),
    *("reliable.index", "reliable.labels", "reliable.labels_digest", "joint.rounds"),
)
"""What says which images, classes or files there are, and not how they are learnt; and whether trials are light."""
MOST_TRIALS_CHECKED = 1000
_MOST_STEPS = 1e9


class Range(Settings):
    """Numbers between two bounds, which count: any, or only those that are whole steps above the first."""

    uniform: tuple[int | float, int | float] | None = None
    """Each as likely as any other."""
    log_uniform: tuple[int | float, int | float] | None = None
    """Each logarithm as likely as any other."""
    step: int | float | None = None

    @field_validator("uniform", "log_uniform", mode="before")
    @classmethod
    def _check_bounds(cls, bounds: Any, info: ValidationInfo) -> Any:
        """YAML reads 1e-3 as text."""
        try:
            if not isinstance(bounds, list | tuple) or any(isinstance(value, bool) for value in bounds):
                raise TypeError
            low, high = (value if isinstance(value, int | float) else float(value) for value in bounds)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{info.field_name}={bounds} cannot be used; give two numbers, such as [0.5, 0.9]"
            ) from None
        return low, high

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.uniform is None) == (self.log_uniform is None):
            raise ValueError("a range needs uniform or log_uniform with two bounds, and not both")
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"the bounds {low:g} and {high:g} of a range must rise")
        if self.is_log and low <= 0:
            raise ValueError(f"log_uniform needs bounds above 0, and {low:g} is not")
        if self.step is not None and not (high - low) / _MOST_STEPS < self.step <= high - low:
            raise ValueError(f"step={self.step:g} does not fit between the bounds {low:g} and {high:g}")
        return self

    @property
    def is_log(self) -> bool:
        """Whether logarithms are what is even."""
        return self.log_uniform is not None

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """The least and the greatest."""
        found = self.log_uniform if self.uniform is None else self.uniform
        assert found is not None
        return found

    @property
    def are_whole(self) -> bool:
        """Whether only whole numbers are meant: those of whole bounds, by whole steps."""
        return all(isinstance(number, int) for number in (*self.bounds, 1 if self.step is None else self.step))

    def draw(self, rng: random.Random) -> int | float:
        """One of them."""
        low, high = self.bounds
        return self.snap(
            math.exp(rng.uniform(math.log(low), math.log(high))) if self.is_log else rng.uniform(low, high)
        )

    def snap(self, number: float) -> int | float:
        """The nearest of them."""
        low, high = self.bounds
        found = number
        step = 1 if self.are_whole and self.step is None else self.step
        if step is not None:
            steps = min(round((found - low) / step), math.floor((high - low) / step + 1e-9))
            found = low + steps * step
        found = min(max(found, low), high)
        # The sum of steps has errors that nobody wants to read.
        return round(found) if self.are_whole else float(f"{found:.12g}")


Space = dict[str, Annotated[list[Value] | Range, Field(union_mode="left_to_right")]]


class EarlyStopping(Settings):
    """Asynchronous successive halving (ASHA, Li et al. 2020): stage 3 of bad trials ends early."""

    looks: Annotated[int, Field(ge=2, le=20)] = 4
    """How often each trial is judged, at equal distances; the last time at its end."""
    factor: Annotated[int, Field(ge=2, le=20)] = 2
    """f: one of so many trials goes on behind the looks 1, f, f^2, ..."""


class Sweep(Settings):
    """Settings that are tried; every trial redoes only the stages that its settings change."""

    recipe: str
    space: Annotated[Space, Field(min_length=1)]
    """For each setting the values to try, or a range of numbers."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid: all combinations; random: independent ones; tpe: Optuna's, which learn from the trials so far."""
    samples: PositiveInt | None = None
    """Trials of a search that is none by a grid."""
    objective: Literal["unsupervised_loss", "neighbor_disagreement", "mutual_information"] = "unsupervised_loss"
    """What is least for the best trial."""
    trial: dict[str, Value] = Field(default_factory=dict)
    """Other settings of every trial, such as joint.steps=100 or scale.gpus_per_worker=0.5; the winner is run without
    them."""
    early_stopping: EarlyStopping | None = None
    concurrent: PositiveInt | None = None
    """Trials at once, at most; a cluster that grows by itself is asked for room for so many. None: as many as fit, and
    such a cluster is asked for room for one."""

    @field_validator("space", mode="before")
    @classmethod
    def _read_ranges(cls, space: Any) -> Any:
        """For each key a list, or a mapping that is a range; pydantic would name all that a value is not."""
        if not isinstance(space, dict):
            return space
        return {key: _read_tried(str(key), tried) for key, tried in space.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.search == "grid") != (self.samples is None):
            raise ValueError(
                "samples goes with search: random or tpe, which need it"
                if self.search == "grid"
                else f"search: {self.search} needs samples, the number of trials"
            )
        ranges = [key for key, values in self.space.items() if isinstance(values, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(f"{ranges[0]} is a range, which a grid cannot try; list its values, or use search: random")
        both = self.space.keys() & self.trial.keys()
        if both:
            raise ValueError(f"{min(both)} is in space and in trial; leave one of them out")
        for key in self.space:
            _check_swept(key)
        for key in self.trial:
            _check_of_trials(key)
        return self

    @property
    def judged_by(self) -> Stage:
        """The stage whose clusters are judged: heads where neither reliable labels nor stage 3 are swept."""
        return "joint" if any(stage_of(key) == "joint" for key in self.space) else "heads"

    @property
    def first_stage(self) -> Stage:
        """The first stage that differs between trials."""
        return min((stage_of(key) for key in self.space), key=STAGES.index)

    @property
    def needs_neighbors(self) -> bool:
        """Whether trials are judged by neighbours in the embedding."""
        return self.objective == "neighbor_disagreement"

    def trials(self, seed: int) -> list[Values] | None:
        """The settings of all trials, each once; None where each is only known by what came of those before."""
        if self.search == "tpe":
            return None
        rng = random.Random(seed)
        found: Iterable[Values] = (
            self._grid()
            if self.search == "grid"
            else ({key: _draw(values, rng) for key, values in self.space.items()} for _ in range(self.samples or 0))
        )
        return list({json.dumps(values): values for values in found}.values())

    def num_trials(self, seed: int) -> int:
        """How many there are."""
        found = self.trials(seed)
        return self.samples or 1 if found is None else len(found)

    @property
    def may_repeat(self) -> bool:
        """Whether trials may have equal settings: those of a search that learns, unless a number is any in a range."""
        ranges = [tried for tried in self.space.values() if isinstance(tried, Range)]
        return self.search == "tpe" and all(tried.step is not None or tried.are_whole for tried in ranges)

    def is_shared(self, key: str) -> bool:
        """Whether a setting of all trials is one of the stages that come before the first which they vary."""
        return not key.startswith("scale.") and STAGES.index(stage_of(key)) < STAGES.index(self.first_stage)

    def examples(self, seed: int) -> Iterator[Values]:
        """Trials at the corners of the space, and those that are known already."""
        corners = iter(()) if self.search == "grid" else itertools.islice(self._grid(), MOST_TRIALS_CHECKED)
        return itertools.chain(corners, self.trials(seed) or [])

    def _grid(self) -> Iterator[Values]:
        lists = [list(values.bounds) if isinstance(values, Range) else values for values in self.space.values()]
        return (dict(zip(self.space, values, strict=True)) for values in itertools.product(*lists))


def stage_of(key: str) -> Stage:
    """The first stage whose result a setting changes; views for the heads are made where images are embedded."""
    return "encoder" if key == "heads.views" else _STAGE_OF_SECTION[key.partition(".")[0]]


def load_sweep(file: str) -> Sweep:
    """Read a sweep's YAML.

    Raises:
        ConfigError: It is missing, or something in it cannot be used.
    """
    path = Path(file)
    if not os.path.isfile(path):
        raise ConfigError(f"sweep file {file} does not exist; give a YAML file such as tune_configs/thresholds.yaml")
    try:
        return Sweep.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {first_sentence(error, list(Sweep.model_fields))}") from None


def _read_tried(key: str, tried: Any) -> Any:
    if isinstance(tried, Range):
        return tried
    if isinstance(tried, dict):
        try:
            return Range.model_validate(tried)
        except ValidationError as error:
            raise ValueError(f"space.{key}: {first_sentence(error, list(Range.model_fields))}") from None
    if not isinstance(tried, list) or not tried or not all(map(_is_value, tried)):
        raise ValueError(
            f"space.{key}={tried} cannot be used; give a list of values, or a range such as {{uniform: [0.5, 0.9]}}"
        )
    return tried


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))


def _draw(values: list[Value] | Range, rng: random.Random) -> Value:
    return values.draw(rng) if isinstance(values, Range) else rng.choice(values)


def _check_swept(key: str) -> None:
    known = [k for k in setting_keys() if k.partition(".")[0] in _STAGE_OF_SECTION and k not in _OF_ALL_TRIALS]
    if key in known:
        return
    if key in setting_keys():
        raise ValueError(
            f"{key} is the same in all trials of a sweep; a sweep varies keys of "
            f"{', '.join(_STAGE_OF_SECTION)}, such as joint.confidence"
        )
    raise ValueError(f"unknown setting {key!r}; {nearest(key, known)}")


def _check_of_trials(key: str) -> None:
    known = [k for k in setting_keys() if k.partition(".")[0] in (*_STAGE_OF_SECTION, "scale")]
    if key not in known:
        raise ValueError(f"trial: unknown setting {key!r}; {nearest(key, known)}")
    if key in _OF_ALL_TRIALS:
        raise ValueError(f"trial: {key} is the run's own; give it to the recipe")
