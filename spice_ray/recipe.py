"""From YAML and ``stage.key=value`` overrides to checked settings, before torch or Ray is imported.

Whatever cannot be used is refused in one sentence that names the nearest valid key.
"""

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from spice_ray.config import ImageRecipe, Recipe, Scale
from spice_ray.errors import ConfigError
from spice_ray.settings import Settings
from spice_ray.shares import ESTIMATE, read_shares

_IMAGE_SECTIONS = ImageRecipe.model_fields.keys() - Recipe.model_fields.keys()
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")


def recipe_names() -> list[str]:
    """Names of the recipes that are shipped with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipes().iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str]) -> Recipe:
    """Read a shipped recipe or a YAML file and apply ``stage.key=value`` overrides.

    Raises:
        ConfigError: The recipe, a key or a value cannot be used; names the nearest valid one.
    """
    values = read_yaml(_find_recipe(name_or_path))
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
        raise ConfigError(first_sentence(error, setting_keys(type_))) from None


def check_scale(values: dict[str, Any]) -> Scale:
    """The settings of how the work is spread, by themselves.

    Raises:
        ConfigError: In one sentence, the first thing that is wrong.
    """
    try:
        return Scale.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"scale: {first_sentence(error, list(Scale.model_fields))}") from None


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


def read_scale(overrides: list[str], of_others: str) -> Scale:
    """Settings of ``scale``, where no other can be given.

    Args:
        overrides: Such as ``scale.gpus_per_worker=1``.
        of_others: Why another setting cannot be given, such as "is settled by the run".

    Raises:
        ConfigError: There is another, or a value that cannot be used.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        if not key.startswith("scale."):
            raise ConfigError(f"{key} {of_others}; only settings of scale can be given here")
        check_key(key, setting_keys())
        settings = with_value(settings, key, value)
    return check_scale(settings.get("scale", {}))


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
        raise ConfigError(f"unknown setting {key!r}; {nearest(key, known)}")


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
    raise ConfigError(f"unknown recipe {name_or_path!r}; {nearest(name_or_path, recipe_names())}")


def read_yaml(file: Any) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); make it readable or give another file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # see parse_override
        raise ConfigError(f"{file.name} is not valid YAML ({' '.join(str(error).split())}); correct it there") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} holds no settings; give a YAML mapping such as those of the shipped recipes")
    return values


def nearest(word: str, known: list[str]) -> str:
    """The sentence that names the nearest of the known words, compared whole and by their last part."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        tails = {k.rpartition(".")[2]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), n=1, cutoff=0.5)]
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def first_sentence(error: ValidationError, known: list[str]) -> str:
    """One of the errors as a sentence; ``known`` are the keys there are."""
    errors = error.errors()
    # A misspelt key is reported by its name, rather than the right one as missing.
    first = next((e for e in errors if e["type"] in _UNKNOWN_KEY), errors[0])
    where = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case kind if kind in _UNKNOWN_KEY:
            return f"unknown setting {where!r}; {nearest(where, known)}"
        case "missing":
            return f"{where} is missing; add it to the recipe, or as {where}=VALUE"
        case "value_error":
            return str(first["ctx"]["error"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}={first['input']!r} cannot be used: {message}"
