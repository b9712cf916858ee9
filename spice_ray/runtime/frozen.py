"""Weights that a user gives in the place of stage 1: found, checked, and copied into the run as its encoder.

The copy is named by the encoder, the image settings and what the file holds. Where the file lies, how stage 1 would
train and which images there are has no part in it, and the file is not needed once the copy is there.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from spice_ray.config import ImageRecipe
from spice_ray.contracts import ENCODER
from spice_ray.core.encoders import Encoder
from spice_ray.core.pretrained import count_other_norms, load_given
from spice_ray.errors import ConfigError
from spice_ray.run_folder import holds_run, read_record
from spice_ray.runtime.weights import build, read_given, save_weights
from spice_ray.storage import Artifact, fingerprint, open_artifact, publish


def pin_weights(recipe: ImageRecipe, run: Path) -> ImageRecipe:
    """The recipe with its weights as an absolute path, and the digest of what they hold.

    Args:
        recipe: One with ``pretrain.weights``.
        run: The run folder, which may not be there yet; it knows the digest of a file that is gone since.

    Raises:
        ConfigError: The file is missing, or holds something else than the recipe says.
        StorageError: The folder is not a run's.
    """
    settings = recipe.pretrain
    assert settings.weights is not None
    path = Path(os.path.abspath(os.path.expanduser(settings.weights)))
    digest = _noted_digest(path, run) if not os.path.lexists(path) else _digest(_file_of(path, recipe))
    if digest is None:
        raise ConfigError(f"pretrain.weights={settings.weights} does not exist; give a local file of weights")
    if settings.weights_sha256 not in (None, digest):
        raise ConfigError(
            f"pretrain.weights={settings.weights} has the SHA-256 {digest} and not pretrain.weights_sha256="
            f"{settings.weights_sha256}; give the file that the recipe was made with, or leave the digest out"
        )
    pinned = settings.model_copy(update={"weights": str(path), "weights_sha256": digest})
    return recipe.model_copy(update={"pretrain": pinned})


def check_given(recipe: ImageRecipe, root: Path) -> None:
    """Refuse weights that stages 2 and 3 could not use, before anything else is done.

    Args:
        recipe: One that :func:`pin_weights` gave.
        root: The run's artifacts; a copy that is there has been checked.

    Raises:
        ConfigError: There is no such model, the weights are not its, or stage 3 cannot train it.
    """
    found = open_artifact(root, ENCODER, given_fingerprint(recipe))
    check_trainable(recipe, _describe(recipe, _load(recipe)) if found is None else found.manifest)


def check_trainable(recipe: ImageRecipe, manifest: dict[str, Any]) -> None:
    """Refuse to train an encoder in stage 3 whose batch norms would mix the rows of lanes.

    Raises:
        ConfigError: ``manifest``, of the encoder, counts such batch norms and ``joint.init`` is stage2.
    """
    others = manifest.get("other_batch_norms", 0)
    if others and recipe.joint.init == "stage2" and recipe.joint.steps:
        raise ConfigError(
            f"joint.init=stage2 would train {manifest['arch']}, and {others} of its batch norms cannot be kept apart "
            "by lanes; set joint.init=scratch and joint.encoder to a shipped encoder, such as joint.encoder=resnet18"
        )


def given_settings(recipe: ImageRecipe) -> dict[str, Any]:
    """What the copy of given weights is named by."""
    settings = recipe.pretrain
    image = recipe.image.model_dump(mode="json")
    return {"encoder": settings.encoder, "weights_sha256": settings.weights_sha256, "image": image}


def given_fingerprint(recipe: ImageRecipe) -> str:
    """The name that the copy of given weights has or will have."""
    return fingerprint(ENCODER, given_settings(recipe), [])


def publish_given(root: Path, print_: str, recipe: ImageRecipe) -> Artifact:
    """Copy given weights into the run.

    Raises:
        ConfigError: As :func:`check_given`, or the file holds something else than it did.
    """
    encoder = _load(recipe)

    def write(folder: Path) -> dict[str, Any]:
        save_weights(encoder, folder / "encoder.safetensors")
        return _describe(recipe, encoder)

    return publish(root, ENCODER, print_, write)


def _load(recipe: ImageRecipe) -> Encoder:
    settings = recipe.pretrain
    encoder = build(settings.encoder, recipe.image.size)
    file = _file_of(Path(str(settings.weights)), recipe)
    state = read_given(file)
    if _digest(file) != settings.weights_sha256:
        raise ConfigError(f"{file} has changed since the run began; put it back, or choose another --out")
    load_given(encoder, settings.encoder, state, str(file))
    return encoder


def _describe(recipe: ImageRecipe, encoder: Encoder) -> dict[str, Any]:
    return {
        "arch": recipe.pretrain.encoder,
        "embed_dim": encoder.embed_dim,
        "image": recipe.image.model_dump(mode="json"),
        "frozen": True,
        "weights_sha256": recipe.pretrain.weights_sha256,
        "other_batch_norms": count_other_norms(encoder),
    }


def _file_of(path: Path, recipe: ImageRecipe) -> Path:
    """The file of weights that ``path`` is, or holds as another run's encoder.

    Raises:
        ConfigError: It is missing, or a folder of something else, of another encoder or of other colours.
    """
    arch, image = recipe.pretrain.encoder, recipe.image.model_dump(mode="json")
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"pretrain.weights={path} is not there any more; put it back")
        return path
    kind, _, print_ = path.name.partition("-")
    found = open_artifact(path.parent, kind, print_) if kind == ENCODER else None
    if found is None:
        raise ConfigError(
            f"pretrain.weights={path} is a folder and not a finished encoder of a run; give a run's folder "
            "artifacts/encoder-..., or a file of weights"
        )
    if found.manifest["arch"] != arch:
        raise ConfigError(
            f"pretrain.weights={path} is an encoder {found.manifest['arch']} and pretrain.encoder={arch}; set "
            f"pretrain.encoder={found.manifest['arch']}"
        )
    for name in ("mean", "std"):
        before, now = found.manifest["image"][name], image[name]
        if before != now:
            raise ConfigError(
                f"pretrain.weights={path} was trained on images of image.{name}={before} and here it is {now}; set "
                f"image.{name}={before}"
            )
    return found.file("encoder.safetensors")


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"pretrain.weights={file} cannot be read ({error.strerror}); make it readable") from None


def _noted_digest(path: Path, run: Path) -> str | None:
    """What run.json says that a file held, or None."""
    noted = read_record(run)["recipe"].get("pretrain", {}) if holds_run(run) else {}
    return noted.get("weights_sha256") if noted.get("weights") == str(path) else None
