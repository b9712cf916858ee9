"""The recipes of a sweep's trials, checked before Ray is started."""

import itertools
import math
from typing import NoReturn

from spice_ray.config import ImageRecipe, Recipe
from spice_ray.errors import ConfigError
from spice_ray.recipe import check_recipe, with_value
from spice_ray.shares import ESTIMATE
from spice_ray.sweep import MOST_TRIALS_CHECKED, Range, Sweep, Values, stage_of

_MOST_TRIALS = 100_000


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
    for values in itertools.islice(sweep.examples(recipe.seed), 2 * MOST_TRIALS_CHECKED):
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
