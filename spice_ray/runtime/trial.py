"""One trial of a sweep: the stages that it changes, and what its clusters are worth."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.config import ImageRecipe
from spice_ray.contracts import JOINT, SCORE, Health
from spice_ray.core.joint import JointModel
from spice_ray.core.objectives import negative_mutual_information, neighbor_disagreement
from spice_ray.errors import TrainingError
from spice_ray.readers.parts import images_of, read_part
from spice_ray.runtime.bank import open_bank
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.inference import final_loss, predict_all, readable_ids, training_ids
from spice_ray.runtime.looks import Look, Looks
from spice_ray.runtime.memory import device_of, image_budget
from spice_ray.runtime.train_progress import check_loss
from spice_ray.runtime.weights import load_head, load_joint
from spice_ray.runtime.workers import Host, augmentation_of, initial_joint, may_compile, publish_skipped, run_joint
from spice_ray.stages.assign import predict
from spice_ray.stages.train_heads import shares_of
from spice_ray.storage import Artifact, fingerprint, open_artifact, publish
from spice_ray.sweep import EarlyStopping, Sweep

_STEPS_BETWEEN_CHECKS = 10
_NEIGHBORS = 20
"""Whose labels are compared: as many in every trial, whatever its own Ns is."""
_ROWS = 1 << 13
Tell = Callable[[Look], None]
"""Hears the objective of a trial that is not over."""


@dataclass(frozen=True)
class Judge:
    """Judges every trial by the same measure, whatever the trial's own settings are."""

    sweep: Sweep
    recipe: ImageRecipe
    """That of the run which is swept: shares and confident fraction are its."""
    num_sharing: int
    """Trials that share a machine's memory."""

    def settings(self) -> dict[str, Any]:
        """What the measure depends on, for fingerprints."""
        heads = self.recipe.heads
        return {
            "objective": self.sweep.objective,
            "judged_by": self.sweep.judged_by,
            "fraction": heads.confident_fraction,
            "prior": heads.prior,
        }

    def value(self, pipeline: ImagePipeline, logits: NDArray[np.float32], features: NDArray[np.floating]) -> float:
        """The objective of all rows that count.

        Args:
            pipeline: The trial's.
            logits: Of all images, (N, K).
            features: What they were computed of, (N, D).

        Raises:
            TrainingError: It is not a number.
        """
        # Some objectives give a number even where the classifier gives none.
        value = self._value(pipeline, logits, features) if np.isfinite(logits).all() else math.nan
        if not math.isfinite(value):
            raise TrainingError(f"the objective {self.sweep.objective} is not a number: training diverged")
        return value

    def _value(self, pipeline: ImagePipeline, logits: NDArray[np.float32], features: NDArray[np.floating]) -> float:
        counted = training_ids(pipeline.train_shards)
        match self.sweep.objective:
            case "unsupervised_loss":
                return final_loss(logits, features, counted, self.recipe)
            case "mutual_information":
                return negative_mutual_information(torch.from_numpy(logits[counted]))
            case "neighbor_disagreement":
                # In the frozen embedding, whose neighbours are known already.
                nearest = np.load(pipeline.neighbors.file("neighbors.npy"), mmap_mode="c")[:, :_NEIGHBORS]
                labels = torch.from_numpy(logits[counted].argmax(axis=1))
                shares = shares_of(self.recipe.heads, logits.shape[1])
                return neighbor_disagreement(labels, torch.from_numpy(nearest), shares)


class Found(NamedTuple):
    """What came of a trial."""

    objective: float
    num_reliable: int
    note: str
    used: list[str]
    """The artifacts that it is made of."""


def run_trial(pipeline: ImagePipeline, judge: Judge, tell: Tell | None) -> Found | None:
    """Make what is missing, and judge it; None where the trial was stopped before.

    Args:
        pipeline: The trial's; artifacts are where those of the run are.
        judge: The sweep's.
        tell: Where stage 3 is trained in this process, hears the objective at each look but the last; else None.

    Raises:
        SpiceError: A stage cannot be run.
    """
    if judge.sweep.judged_by == "heads":
        score = _score(pipeline, judge, pipeline.heads, lambda _: _predictions_of_heads(pipeline))
        made = [pipeline.shards_artifact, pipeline.encoder, pipeline.embedding, pipeline.heads]
        return Found(score, 0, "", _names(made))
    if tell is not None and not _train_here(pipeline, judge, tell):
        return None
    joint = pipeline.joint
    if tell is not None:
        score = _score(pipeline, judge, joint, lambda _: _predictions_of(pipeline, load_joint(joint)))
    else:
        score = _score(pipeline, judge, joint, partial(_predictions_by_pool, pipeline))
    reliable = pipeline.last_round.reliable
    return Found(score, sum(reliable.manifest["kept"]), joint.manifest["skipped"] or "", _names(pipeline.made))


def _names(artifacts: list[Artifact]) -> list[str]:
    return [artifact.path.name for artifact in artifacts]


Predictions = tuple[NDArray[np.float32], NDArray[np.floating]]
"""Logits and features of all images, (N, K) and (N, D)."""


def _score(pipeline: ImagePipeline, judge: Judge, model: Artifact, predictions: Callable[[Path], Predictions]) -> float:
    """The objective of a trial, computed once; predictions may be mapped from a folder that is gone afterwards."""
    print_ = fingerprint(SCORE, judge.settings(), [model.fingerprint])
    found = open_artifact(pipeline.run.artifacts, SCORE, print_)
    if found is None:
        # A network file system keeps what is still mapped for a moment.
        with TemporaryDirectory(dir=pipeline.run.path, ignore_cleanup_errors=True) as folder:
            value = judge.value(pipeline, *predictions(Path(folder)))
        found = publish(pipeline.run.artifacts, SCORE, print_, lambda folder: {"objective": value})
    return float(found.manifest["objective"])


def _train_here(pipeline: ImagePipeline, judge: Judge, tell: Tell) -> bool:
    """Stage 3 in this process, unless it is finished or cannot be trained; False where the trial was stopped before."""
    round_ = pipeline.first_round
    print_ = pipeline.joint_fingerprint(round_)
    looks = looks_of(pipeline, judge, print_)
    is_over = looks.stopped or open_artifact(pipeline.run.artifacts, JOINT, print_) is not None
    for number, value in looks.values.items():
        tell(Look(number, value, looks.file, is_over=is_over))
    if is_over:
        return not looks.stopped
    job, skip = pipeline.joint_job(round_, print_), pipeline.why_skip_joint(round_)
    if skip is not None:
        publish_skipped(job, skip)
        return True
    start = time.monotonic()
    scale = pipeline.recipe.scale
    device = _device(pipeline)

    def look(number: int, weights: dict[str, Tensor]) -> None:
        if number in looks.values:
            return
        model = initial_joint(job)
        model.load_state_dict(weights)
        value = judge.value(pipeline, *_predictions_of(pipeline, model))
        looks.keep(number, value)  # before it is told: the scheduler may end this process
        tell(Look(number, value, looks.file))

    progress = TrialProgress(judge.sweep.early_stopping, look)
    memory = image_budget(scale, device, judge.num_sharing)
    host = Host(device, lambda module: module, progress, memory, scale.accumulate, compiled=may_compile(scale))
    run_joint(job, host)
    pipeline.run.note_seconds(JOINT, print_, time.monotonic() - start)
    return True


def looks_of(pipeline: ImagePipeline, judge: Judge, print_: str) -> Looks:
    """The looks at the trial with that stage 3, whatever Ray Tune calls it."""
    stopping = judge.sweep.early_stopping
    settings = {**judge.settings(), "looks": None if stopping is None else stopping.looks}
    return Looks.read(pipeline.run.path.parent / f"looks-{fingerprint(SCORE, settings, [print_])}.json")


class TrialProgress:
    """A trial trains from its beginning to its end in one process, which may be told to stop at each look."""

    def __init__(
        self,
        stopping: EarlyStopping | None = None,
        look: Callable[[int, dict[str, Tensor]], None] = lambda number, weights: None,
    ) -> None:
        self._looks = 1 if stopping is None else stopping.looks
        self._look = look

    def restore(self) -> None:
        """There is nothing to go on from."""

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Look at the moving average of the weights where it is time.

        Raises:
            TrainingError: The loss is not a number.
        """
        if step % _STEPS_BETWEEN_CHECKS == 0 or step == total:
            check_loss(step, float(loss))
        number = next((number for number in range(1, self._looks) if step == total * number // self._looks), None)
        if number is not None and step < total:
            self._look(number, snapshot()["ema"])

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        """A trial of one process trains no encoder."""


def _device(pipeline: ImagePipeline) -> torch.device:
    return device_of(pipeline.recipe.scale.gpus_per_worker)


def _predictions_by_pool(pipeline: ImagePipeline, folder: Path) -> Predictions:
    """What the trial's classifier says of all images, by a pool of actors; features are mapped from the folder."""
    recipe, shards, file = pipeline.recipe, pipeline.train_shards, folder / "pooled.npy"
    found = predict_all(file, recipe, recipe.scale, pipeline.joint, shards, lambda done, total: None)
    return found.logits, found.pooled


@torch.inference_mode()
def _predictions_of(pipeline: ImagePipeline, model: JointModel) -> Predictions:
    """What a classifier says of all images, in this process; rows of damaged files stay zero."""
    shards, recipe = pipeline.train_shards, pipeline.recipe
    device = _device(pipeline)
    model, views = model.eval().to(device), augmentation_of(recipe.image)
    found = [
        predict(model, torch.from_numpy(images.copy()).to(device), views)
        for images in (
            images_of(read_part(shards.path, file, shards.format), shards.image_size) for file in shards.readable
        )
    ]
    ids = readable_ids(shards)
    logits, pooled = (
        _placed(torch.cat(parts).cpu().numpy(), ids, shards.num_rows)
        for parts in ([f.logits for f in found], [f.pooled for f in found])
    )
    return logits, pooled


def _placed(rows: NDArray[np.float32], ids: NDArray[np.int64], num_rows: int) -> NDArray[np.float32]:
    if len(rows) == num_rows:
        return rows
    placed = np.zeros((num_rows, rows.shape[1]), np.float32)
    placed[ids] = rows
    return placed


@torch.inference_mode()
def _predictions_of_heads(pipeline: ImagePipeline) -> Predictions:
    """What the chosen head says of all images."""
    bank, head = open_bank(pipeline.embedding), load_head(pipeline.heads)
    blocks = (bank.plain[start : start + _ROWS] for start in range(0, len(bank.plain), _ROWS))
    logits = torch.cat([head(torch.from_numpy(np.array(block, np.float32))) for block in blocks])
    return logits.numpy(), bank.embedding


def nested(recipe: ImageRecipe) -> ImageRecipe:
    """A trial's recipe where its stages start processes of their own.

    They are no more than it trains on: trials that wait for room which others hold, who wait for theirs, would wait for
    ever. The bank is mapped, so that trials with the same embedding hold it once and the object store not at all.
    """
    most = recipe.scale.least_workers
    own = {"workers": most, "head_actors": min(recipe.scale.head_actors or most, most), "bank_memory": 0}
    return recipe.model_copy(update={"scale": recipe.scale.model_copy(update=own)})
