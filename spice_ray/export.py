"""The classifier of a finished run as one file, for use where there is no spice-ray (torch.export).

B images or vectors, S side of an image in pixels, D width of an embedding, K clusters.
"""

import importlib.metadata
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spice_ray import mirror
from spice_ray.config import ImageRecipe, Recipe
from spice_ray.contracts import HEADS, JOINT
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.errors import ConfigError
from spice_ray.recipe import check_recipe
from spice_ray.run_folder import open_made, read_finished
from spice_ray.runtime.weights import load_head, load_joint
from spice_ray.settings import Image
from spice_ray.storage import Artifact, reporting_disk_errors

FILE = "classifier.pt2"
DESCRIPTION = "spice_ray.json"
"""The file within, which says what goes in and what comes out."""
_ROWS = 2
"""Of the example by which a program is traced; with 1 it would take no other number."""


class ImageClassifier(nn.Module):
    """From pixels to the probabilities of the clusters."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: JointModel, image: Image) -> None:
        super().__init__()
        # What saves programs takes channels-last weights for views of others, and warns.
        self.model = model.to(memory_format=torch.contiguous_format)
        self.register_buffer("mean", torch.tensor(image.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(image.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities, float32, (B, K), of images, uint8, RGB, (B, 3, S, S)."""
        logits: Tensor = self.model((images.float() / 255 - self.mean) / self.std)
        return logits.softmax(dim=1)


class VectorClassifier(nn.Module):
    """From embeddings of another model to the probabilities of the clusters."""

    def __init__(self, head: ClusterHead, width: int) -> None:
        super().__init__()
        self.head = head
        self.length = math.sqrt(width)

    def forward(self, vectors: Tensor) -> Tensor:
        """Probabilities, float32, (B, K), of vectors of any length but 0, float32, (B, D)."""
        # In float64 the square of the largest float32 is a number.
        rows = vectors.double()
        rows = rows / rows.norm(dim=1, keepdim=True) * self.length
        # In half precision, as the head learnt them.
        return self.head(rows.half().float()).softmax(dim=1)


def export(run: Path, file: Path | None = None) -> Path:
    """Write the classifier of a finished run as a program of torch.export; gives the file.

    ``torch.export.load(file).module()`` is a function of a batch, and the file ``spice_ray.json`` within says of what.

    Args:
        run: The folder of a finished run, or of the winner of a sweep.
        file: Where to; ``run/classifier.pt2`` unless given.

    Raises:
        ConfigError: Torch cannot make a program of the encoder, or ``file`` is a folder.
        StorageError: The run is missing, unfinished or damaged, or the disk refused.
    """
    record, target = read_finished(run), file or run / FILE
    if not mirror.is_mirrored(target):
        if target.is_dir():
            raise ConfigError(f"--out {target} is a folder; name a file in it, such as {target / FILE}")
        with reporting_disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
    recipe = check_recipe(record["recipe"])
    model = open_made(run, record, JOINT if isinstance(recipe, ImageRecipe) else HEADS)
    classifier, example = _classifier_of(recipe, model)
    program = _traced(classifier.eval().requires_grad_(False), example, model)
    described = json.dumps(_description(recipe, model, example))
    written = io.BytesIO()
    torch.export.save(program, written, extra_files={DESCRIPTION: described})
    with reporting_disk_errors(target):
        mirror.write_bytes(target, written.getvalue())
    return target


def _classifier_of(recipe: Recipe, model: Artifact) -> tuple[nn.Module, Tensor]:
    """The classifier, and a batch as it takes them."""
    if isinstance(recipe, ImageRecipe):
        size = recipe.image.size
        return ImageClassifier(load_joint(model), recipe.image), torch.zeros(_ROWS, 3, size, size, dtype=torch.uint8)
    width = int(model.manifest["embed_dim"])
    return VectorClassifier(load_head(model), width), torch.ones(_ROWS, width)


def _traced(classifier: nn.Module, example: Tensor, model: Artifact) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=1)
    try:
        return torch.export.export(classifier, (example,), dynamic_shapes=({0: rows},))
    except Exception as error:  # whatever a library's model does that torch.export does not know
        raise ConfigError(
            f"{model.manifest.get('arch', 'the head')} cannot be exported ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); use the command predict, or a shipped encoder in stage 3"
        ) from None


def _description(recipe: Recipe, model: Artifact, example: Tensor) -> dict[str, Any]:
    """What goes in and what comes out."""
    wanted = "embeddings of the model that made those of the run, of any length; what gives is the chosen head"
    if isinstance(recipe, ImageRecipe):
        wanted = (
            "upright RGB images, transparency laid on white, the centre square scaled to "
            f"{recipe.image.size} pixels as Pillow's BICUBIC does it"
        )
    return {
        "takes": wanted,
        "dtype": str(example.dtype).removeprefix("torch."),
        "shape": ["rows", *example.shape[1:]],
        "gives": f"the probabilities of {recipe.num_clusters} clusters, float32; the greatest is the image's cluster",
        "num_clusters": recipe.num_clusters,
        "classifier": model.path.name,
        "spice_ray": importlib.metadata.version("spice-ray"),
        "torch": torch.__version__,
    }
