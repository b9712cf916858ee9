"""Whether a folder holds the run that is asked for, or one that has something for it."""

from pathlib import Path
from typing import Any

from spice_ray import mirror
from spice_ray.errors import StorageError

_WEIGHTS, _LABELS = "pretrain.weights_sha256", "reliable.labels_digest"
_OF_SHARDS = ("seed", "image.size")
"""Settings by which images are put into shards."""


def check_same(path: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Args:
        path: The folder.
        held: What its run.json holds.
        wanted: The same of the run that is asked for.

    Raises:
        StorageError: Says in what they differ.
    """
    if held["source"].get("digest") != wanted["source"]["digest"]:
        raise StorageError(
            f"{path} holds a run of other images ({held['source'].get('path')}; here {wanted['source']['path']}), or "
            "they changed since; choose another --out"
        )
    before, now = _flat({**held["recipe"], **held.get("asked", {})}), _flat(wanted["recipe"])
    if before.get(_WEIGHTS) is not None and now.get(_WEIGHTS) is not None:
        before, now = _without_idle(before), _without_idle(now)
    if before.get(_LABELS) is not None and now.get(_LABELS) is not None:  # which counts, wherever the file is
        now["reliable.labels"] = before.get("reliable.labels")
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        key, *others = differing
        more = f", and {len(others)} others differ" if others else ""
        raise StorageError(
            f"{path} holds another run's settings ({key} is {before.get(key)} there and {now.get(key)} here{more}); "
            "choose another --out (and, of a run, share what is the same by --from), or use the same settings to go on"
        )


def check_base(path: Path, base: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to share what another run has made where it is none of these images.

    Args:
        path: The folder of the run that is asked for.
        base: That of the other.
        held: What the other's run.json holds.
        wanted: The same of the run that is asked for.

    Raises:
        StorageError: Says why.
    """
    if path.resolve() == base.resolve():
        raise StorageError(f"--from and --out are both {path}; choose another --out")
    if mirror.is_mirrored(path) != mirror.is_mirrored(base):
        raise StorageError(f"{path} and {base} are not both on a server; choose an --out that is where --from is")
    if "artifacts_root" in held:
        raise StorageError(f"{base} shares the artifacts of another run; give that one to --from")
    source = wanted["source"]
    if held["source"].get("digest") != source["digest"]:
        raise StorageError(
            f"{base} holds a run of other images ({held['source'].get('path')}; here {source['path']}), or they "
            "changed since; leave --from out"
        )
    before, now = _flat(held["recipe"]), _flat(wanted["recipe"])
    for key in _OF_SHARDS:
        if before.get(key) != now.get(key):
            raise StorageError(
                f"{base} was made with {key}={before.get(key)}, and here it is {now.get(key)}; use {key}="
                f"{before.get(key)}, or leave --from out"
            )


def _without_idle(flat: dict[str, Any]) -> dict[str, Any]:
    """Flat settings but for the path of given weights, whose digest counts, and those without effect beside them."""
    counted = ("pretrain.encoder", _WEIGHTS)
    return {key: value for key, value in flat.items() if not key.startswith("pretrain.") or key in counted}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
