"""What every setting means, from the docstrings of the settings themselves."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from spice_ray.config import ImageRecipe, Recipe
from spice_ray.errors import ConfigError
from spice_ray.recipe import nearest, setting_keys

_TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_WIDTH = 100


class SettingHelp(NamedTuple):
    """A setting in words."""

    key: str
    values: str
    """What it may be."""
    default: str | None
    """As YAML has it; None where a recipe has to give it."""
    text: str

    def __str__(self) -> str:
        """As it is printed."""
        default = "no default" if self.default is None else f"default {self.default}"
        body = textwrap.fill(self.text, _WIDTH, initial_indent="    ", subsequent_indent="    ")
        return f"{self.key}: {self.values} ({default})\n{body}"


def find_settings(asked: str | None) -> list[SettingHelp]:
    """The setting of that name, or those of that section; all of them where none is asked for.

    Raises:
        ConfigError: There is none of that name; says the nearest.
    """
    found = [help_ for help_ in _all() if asked is None or f"{help_.key}.".startswith(f"{asked}.")]
    if not found:
        sections = {key.partition(".")[0] for key in setting_keys()}
        raise ConfigError(f"unknown setting {asked!r}; {nearest(str(asked), [*setting_keys(), *sections])}")
    return found


def _all() -> Iterator[SettingHelp]:
    """Those of images, and behind them what differs for embeddings."""
    of_embeddings = {help_.key: help_ for help_ in _of(Recipe)}
    for help_ in _of(ImageRecipe):
        yield help_
        other = of_embeddings.get(help_.key, help_)
        if other != help_:
            yield other._replace(text=f"Of embeddings: {other.text}")


def _of(recipe: type[Recipe]) -> Iterator[SettingHelp]:
    schema = recipe.model_json_schema()
    for name, value in schema["properties"].items():
        if "$ref" not in value:
            yield _help(name, value)
            continue
        section = schema["$defs"][value["$ref"].rpartition("/")[2]]
        for key, inner in section["properties"].items():
            yield _help(f"{name}.{key}", inner)


def _help(key: str, schema: dict[str, Any]) -> SettingHelp:
    text = " ".join(schema.get("description", "").replace("``", "").split())
    return SettingHelp(key, _values(schema), _default(schema), text)


def _default(schema: dict[str, Any]) -> str | None:
    if "default" not in schema:
        return None
    value = schema["default"]
    return json.dumps(value).replace("null", "none") if value is None or isinstance(value, bool) else str(value)


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "null":
        return "none"
    if schema["type"] == "array":
        return "a list of numbers"
    bounds = [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    return " ".join([_TYPES[schema["type"]], " and ".join(bounds)]).strip()
