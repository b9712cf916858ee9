"""Sweeps: which settings are tried, checked as strictly as a recipe and before Ray is started."""

import itertools
import json
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from spice_ray.config import ImageRecipe, Recipe
from spice_ray.errors import ConfigError
from spice_ray.recipe import check_recipe, first_sentence, nearest, read_yaml, setting_keys, with_value
from spice_ray.settings import PositiveInt, Settings
from spice_ray.shares import ESTIMATE

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
_MOST_TRIALS = 100_000
_MOST_TRIALS_CHECKED = 1000
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
        corners = iter(()) if self.search == "grid" else itertools.islice(self._grid(), _MOST_TRIALS_CHECKED)
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


def check_trials(recipe: Recipe, sweep: Sweep) -> None:
    """Refuse a sweep one of whose trials could not be run.

    Raises:
        ConfigError: A value is out of its range, or does not fit the others or what the recipe leaves open.
    """
    if not isinstance(recipe, ImageRecipe):
        refuse_sweep()
    _check_combination(recipe, sweep)
    stages = {stage_of(key) for key in (*sweep.space, *sweep.trial) if not key.startswith("scale.")}
    if "encoder" in stages and (recipe.min_clusters is not None or recipe.heads.prior == ESTIMATE):
        name = f"num_clusters={recipe.asked_clusters}" if recipe.min_clusters is not None else "heads.prior=estimate"
        raise ConfigError(
            f"{name} is settled by the embedding, which this sweep varies, and then its trials could not be compared; "
            "give the number, or the shares, themselves"
        )
    _check_number(sweep)
    # A trial beyond that, of a vast grid, would be refused when its turn comes.
    for values in itertools.islice(sweep.examples(recipe.seed), 2 * _MOST_TRIALS_CHECKED):
        trial = trial_recipe(recipe, sweep, values)
        recipe_with(recipe, values)  # the winner's, without what all trials have
        if sweep.early_stopping is not None and not is_light(sweep, trial):
            raise ConfigError(
                "early_stopping judges trials within stage 3, on one worker and in one round; leave it out where stage "
                "3 is not swept, or scale.workers or joint.rounds is above 1"
            )


def _check_number(sweep: Sweep) -> None:
    sizes = [len(values) for values in sweep.space.values() if not isinstance(values, Range)]
    number = math.prod(sizes) if sweep.samples is None else sweep.samples
    if number > _MOST_TRIALS:
        remedy = "list fewer values, or use search: random" if sweep.samples is None else "lower samples"
        raise ConfigError(f"the sweep has {number} trials, and {_MOST_TRIALS} are the most; {remedy}")


def _check_combination(recipe: ImageRecipe, sweep: Sweep) -> None:
    """Refuse what has no effect beside given weights or labels, or would be made several times."""
    idle = [key for key in sweep.space if key.startswith("pretrain.")]
    if recipe.pretrain.weights is not None and idle:
        raise ConfigError(
            f"{idle[0]} cannot be swept with pretrain.weights, beside which it has no effect; leave one of them out"
        )
    if idle and "heads.views" in sweep.space:
        raise ConfigError(
            f"{idle[0]} and heads.views cannot be swept together: trials with the same encoder would each train it; "
            "sweep one after the other"
        )
    if "joint.confidence" in sweep.space and recipe.joint.threshold == "adaptive":
        raise ConfigError(
            "joint.confidence cannot be swept with joint.threshold=adaptive, beside which it has no effect; leave one "
            "of them out"
        )
    if recipe.reliable.labels is None:
        return
    if "joint.init" in sweep.trial:
        raise ConfigError(
            "trial: joint.init cannot be given with reliable.labels, as it says which stages there are; give it to the "
            "recipe"
        )
    if recipe.is_supervised and sweep.needs_neighbors:
        raise ConfigError(
            "objective=neighbor_disagreement needs an embedding, which reliable.labels with joint.init=scratch leaves "
            "out; use objective=unsupervised_loss"
        )
    idle = [key for key in sweep.space if key == "joint.init" or key.startswith("reliable.")]
    idle += [key for key in sweep.space if recipe.is_supervised and stage_of(key) != "joint"]
    if idle:
        raise ConfigError(
            f"{idle[0]} cannot be swept with reliable.labels: there are no pseudo-labels, and stages 1 and 2 are those "
            "of all trials or of none; sweep other settings of joint"
        )


def is_light(sweep: Sweep, trial: ImageRecipe) -> bool:
    """Whether a trial is one process that trains stage 3 by itself, behind stages that are finished before."""
    are_made_before = sweep.search != "tpe" or sweep.first_stage == "joint"
    return sweep.judged_by == "joint" and are_made_before and trial.scale.workers == trial.joint.rounds == 1


def refuse_sweep() -> NoReturn:
    """Say why runs on embeddings cannot be swept.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "a sweep varies the stages of runs on images, and this is a run on embeddings; "
        "run each threshold by itself, such as reliable.min_consistency=0.9, with an --out of its own"
    )


def trial_recipe(recipe: ImageRecipe, sweep: Sweep, values: Values) -> ImageRecipe:
    """The recipe that a trial is run by.

    Raises:
        ConfigError: A value is out of its range.
    """
    return recipe_with(recipe, {**sweep.trial, **values})


def any_trial(recipe: ImageRecipe, sweep: Sweep) -> ImageRecipe:
    """The recipe of one of the trials: whether they are light and how much they take is the same in all."""
    return trial_recipe(recipe, sweep, next(sweep.examples(recipe.seed)))


def recipe_with(recipe: ImageRecipe, values: Values) -> ImageRecipe:
    """A recipe with other settings.

    Raises:
        ConfigError: A value is out of its range.
    """
    settings = recipe.model_dump(mode="json")
    for key, value in values.items():
        settings = with_value(settings, key, value)
    found = check_recipe(settings)
    assert isinstance(found, ImageRecipe)
    return found


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
