"""From YAML and ``stage.key=value`` overrides to checked settings, before torch or Ray is imported.

Whatever cannot be used is refused in one sentence that names the nearest valid key.
"""

import difflib
import itertools
import os
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from spice_ray.config import ImageRecipe, Recipe, Sweep
from spice_ray.errors import ConfigError
from spice_ray.settings import Settings
from spice_ray.shares import ESTIMATE, read_shares

SWEPT_SECTIONS = ("reliable", "joint")
_IMAGE_SECTIONS = ImageRecipe.model_fields.keys() - Recipe.model_fields.keys()
_MOST_TRIALS_CHECKED = 1000
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")


def recipe_names() -> list[str]:
    """Names of the recipes that are shipped with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipes().iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str]) -> Recipe:
    """Read a shipped recipe or a YAML file and apply ``stage.key=value`` overrides.

    Raises:
        ConfigError: The recipe, a key or a value cannot be used; names the nearest valid one.
    """
    values = _read_yaml(_find_recipe(name_or_path))
    known = setting_keys(_type_of(values))
    for override in overrides:
        key, value = parse_override(override)
        check_key(key, known)
        values = with_value(values, key, value)
    return check_recipe(values)


def check_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe that ``values`` describe: of images where it has a section of theirs, else of embeddings.

    Where ``heads.prior`` names a file, the recipe holds what is in it.

    Raises:
        ConfigError: In one sentence, the first thing that is wrong.
    """
    type_ = _type_of(values)
    try:
        return type_.model_validate(_with_shares(values))
    except ValidationError as error:
        raise ConfigError(_first_sentence(error, setting_keys(type_))) from None


def load_sweep(file: str) -> Sweep:
    """Read a sweep's YAML.

    Raises:
        ConfigError: It is missing, or something in it cannot be used.
    """
    path = Path(file)
    if not os.path.isfile(path):
        raise ConfigError(f"sweep file {file} does not exist; give a YAML file such as tune_configs/thresholds.yaml")
    try:
        sweep = Sweep.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {_first_sentence(error, list(Sweep.model_fields))}") from None
    for key in sweep.space:
        _check_swept(key, path.name)
    return sweep


def check_trials(recipe: Recipe, sweep: Sweep) -> None:
    """Refuse a sweep one of whose trials could not be run.

    Raises:
        ConfigError: A value is out of its range, or does not fit the others; or there is no stage 3 to judge them by.
    """
    if not isinstance(recipe, ImageRecipe):
        refuse_sweep()
    idle = [key for key in sweep.space if key == "joint.init" or key.startswith("reliable.")]
    if recipe.reliable.labels is not None and idle:
        raise ConfigError(
            f"{idle[0]} cannot be swept with reliable.labels: there are no pseudo-labels, and stages 1 and 2 are those "
            "of all trials or of none; sweep other settings of joint"
        )
    if recipe.joint.rounds > 1:
        raise ConfigError(
            f"joint.rounds={recipe.joint.rounds} cannot be swept: trials train stage 3 once; use joint.rounds=1 and "
            "run the winner with more"
        )
    trials = itertools.product(*sweep.space.values())
    # A trial beyond that, of a random search in a vast space, would be refused when its turn comes.
    for values in itertools.islice(trials, _MOST_TRIALS_CHECKED):
        sweep_recipe(recipe, dict(zip(sweep.space, values, strict=True)))


def refuse_sweep() -> NoReturn:
    """Say why runs on embeddings cannot be swept.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "a sweep ranks its trials by the classifier of stage 3, which runs on embeddings do not have; "
        "run each threshold by itself, such as reliable.min_consistency=0.9, with an --out of its own"
    )


def sweep_recipe(recipe: ImageRecipe, values: dict[str, Any]) -> ImageRecipe:
    """The recipe of one trial.

    Raises:
        ConfigError: A value is out of its range.
    """
    settings = recipe.model_dump(mode="json")
    for key, value in values.items():
        settings = with_value(settings, key, value)
    trial = check_recipe(settings)
    assert isinstance(trial, ImageRecipe)
    return trial


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``stage.key=value``, the value read as YAML.

    Raises:
        ConfigError: It has another form, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value, such as heads.count=5")
    try:
        return key, yaml.safe_load(value)
    # Besides its own errors, PyYAML lets those of int() and date() through, and its parser recurses.
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"the value of override {text!r} is not valid YAML; write it as in a recipe, such as heads.count=5"
        ) from None


def with_value(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of ``values`` with the dotted ``key`` set.

    Raises:
        ConfigError: ``values`` have something else in the place of its section.
    """
    head, _, rest = key.partition(".")
    if not rest:
        return {**values, head: value}
    section = values.get(head)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"{head}={section!r} cannot be used: {head} is a section of settings such as {key}")
    return {**values, head: {**(section or {}), rest: value}}


def check_key(key: str, known: list[str]) -> None:
    """Refuse a dotted key that is not ``known``, the keys of the recipe.

    Raises:
        ConfigError: With the nearest valid key, where it is not one of another kind of recipe.
    """
    if key not in known and key in setting_keys():
        raise ConfigError(f"{key} is a setting of runs on images, and the recipe is one of embeddings; leave it out")
    if key not in known:
        raise ConfigError(f"unknown setting {key!r}; {_nearest(key, known)}")


def setting_keys(type_: type[Recipe] = ImageRecipe) -> list[str]:
    """Every key of a recipe that an override may set, such as ``pretrain.temperature``."""
    keys: list[str] = []
    for name, field in type_.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Settings):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def _with_shares(values: dict[str, Any]) -> dict[str, Any]:
    heads = values.get("heads")
    prior = heads.get("prior") if isinstance(heads, dict) else None
    if not isinstance(prior, str) or prior == ESTIMATE:
        return values
    try:
        return with_value(values, "heads.prior", read_shares(os.path.expanduser(prior)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _type_of(values: dict[str, Any]) -> type[Recipe]:
    return ImageRecipe if values.keys() & _IMAGE_SECTIONS else Recipe


_OF_ALL_TRIALS = ("reliable.index", "reliable.labels", "reliable.labels_digest", "joint.rounds")
"""Neighbours and given labels are made once for all trials, each of which trains stage 3 once."""


def _check_swept(key: str, file: str) -> None:
    known = [k for k in setting_keys() if k.partition(".")[0] in SWEPT_SECTIONS and k not in _OF_ALL_TRIALS]
    if key in known:
        return
    if key in setting_keys():
        raise ConfigError(
            f"{file}: {key} is shared by all trials of a sweep; a sweep varies keys of "
            f"{' and '.join(SWEPT_SECTIONS)}, such as joint.confidence"
        )
    raise ConfigError(f"{file}: unknown setting {key!r}; {_nearest(key, known)}")


def _recipes() -> Any:
    return resources.files("spice_ray") / "recipes"


def _find_recipe(name_or_path: str) -> Any:
    if name_or_path in recipe_names():
        return _recipes() / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):
            raise ConfigError(
                f"recipe file {name_or_path} does not exist; give a YAML file or one of the recipes "
                f"{', '.join(recipe_names())}"
            )
        return path
    raise ConfigError(f"unknown recipe {name_or_path!r}; {_nearest(name_or_path, recipe_names())}")


def _read_yaml(file: Any) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); make it readable or give another file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # see parse_override
        raise ConfigError(f"{file.name} is not valid YAML ({' '.join(str(error).split())}); correct it there") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} holds no settings; give a YAML mapping such as those of the shipped recipes")
    return values


def _nearest(word: str, known: list[str]) -> str:
    """The sentence that names the nearest of the known words, compared whole and by their last part."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        tails = {k.rpartition(".")[2]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), n=1, cutoff=0.5)]
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _first_sentence(error: ValidationError, known: list[str]) -> str:
    """One of the errors as a sentence; ``known`` are the keys there are."""
    errors = error.errors()
    # A misspelt key is reported by its name, rather than the right one as missing.
    first = next((e for e in errors if e["type"] in _UNKNOWN_KEY), errors[0])
    where = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case kind if kind in _UNKNOWN_KEY:
            return f"unknown setting {where!r}; {_nearest(where, known)}"
        case "missing":
            return f"{where} is missing; add it to the recipe, or as {where}=VALUE"
        case "value_error":
            return str(first["ctx"]["error"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}={first['input']!r} cannot be used: {message}"
