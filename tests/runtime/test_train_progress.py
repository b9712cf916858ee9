"""What a training worker tells Ray Train, whose side of it is a plain list here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from pyarrow.fs import LocalFileSystem

from spice_ray.errors import StorageError, TrainingError
from spice_ray.runtime.train_progress import ERROR_FILE, TrainProgress, on_cpu
from spice_ray.storage import read_json

CPU = torch.device("cpu")


class Trainer:
    """Ray Train's report: keeps the checkpoints that it is told of, and writes each when asked to."""

    def __init__(self, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writers: list[Callable[[], Any]] = []
        self.known: Path | None = None
        place = SimpleNamespace(experiment_fs_path=str(storage), storage_filesystem=LocalFileSystem())
        context = SimpleNamespace(get_storage=lambda: place)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray.train, "report", self.report)
        monkeypatch.setattr(ray.train, "get_checkpoint", self.checkpoint)
        storage.mkdir()

    def report(self, metrics: dict[str, Any], *, checkpoint: Any, checkpoint_upload_fn: Any, **_: Any) -> None:
        name = f"checkpoint_{len(self.writers)}"
        self.writers.append(lambda: checkpoint_upload_fn(checkpoint, name))

    def checkpoint(self) -> Any:
        return None if self.known is None else ray.train.Checkpoint.from_directory(self.known)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(tmp_path / "storage", monkeypatch)


def progress_in(folder: Path, seconds: float = 0) -> TrainProgress:
    folder.mkdir(exist_ok=True)
    return TrainProgress(CPU, seconds, folder)


def advance(progress: TrainProgress, steps: range, total: int, weights: torch.Tensor) -> None:
    """Steps whose loss is their number, and whose weights are it too."""
    for step in steps:
        weights.fill_(step)
        progress.advance(step, total, torch.tensor(float(step)), lambda done=step: {"step": done, "weights": weights})


def tell(progress: TrainProgress, losses: list[float], total: int) -> None:
    for step, loss in enumerate(losses, 1):
        progress.advance(step, total, torch.tensor(loss), dict)


def saved(writer: Callable[[], Any]) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(Path(writer().path) / "state.pt", weights_only=True)
    return found


def test_a_checkpoint_holds_the_state_and_all_losses_of_its_step(trainer: Trainer, tmp_path: Path) -> None:
    advance(progress_in(tmp_path / "progress"), range(1, 13), 100, torch.zeros(3))
    state = saved(trainer.writers[0])  # written only now, when training has gone on
    assert state["step"] == 10
    assert state["losses"].tolist() == list(range(1, 11))
    assert state["weights"].tolist() == [10, 10, 10]


def test_there_is_no_queue_of_checkpoints_that_are_not_written_yet(trainer: Trainer, tmp_path: Path) -> None:
    progress, weights = progress_in(tmp_path / "progress"), torch.zeros(3)
    advance(progress, range(1, 41), 100, weights)
    assert len(trainer.writers) == 1
    trainer.writers[0]()
    advance(progress, range(41, 61), 100, weights)
    assert len(trainer.writers) == 2


def test_losses_are_in_a_table_from_checkpoint_to_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    progress, weights, table = progress_in(tmp_path / "progress"), torch.zeros(3), tmp_path / "progress" / "losses.csv"
    for steps, written in ((range(1, 11), 10), (range(11, 25), 20), (range(25, 41), 30)):
        advance(progress, steps, 100, weights)
        assert table.read_text().splitlines() == ["step,loss", *(f"{step},{step}" for step in range(1, written + 1))]
        trainer.writers[-1]()


def test_losses_behind_the_checkpoint_that_a_run_goes_on_from_are_forgotten(trainer: Trainer, tmp_path: Path) -> None:
    first = progress_in(tmp_path / "progress")
    advance(first, range(1, 11), 100, torch.zeros(3))
    trainer.known = Path(trainer.writers[0]().path)
    advance(first, range(11, 21), 100, torch.zeros(3))
    second = progress_in(tmp_path / "progress", seconds=1000)
    assert second.restore() is not None
    advance(second, range(11, 16), 15, torch.zeros(3))
    assert (tmp_path / "progress" / "losses.csv").read_text().splitlines()[-1] == "15,15"


def test_a_run_that_goes_on_knows_its_losses_from_the_first_step(trainer: Trainer, tmp_path: Path) -> None:
    advance(progress_in(tmp_path / "progress"), range(1, 11), 15, torch.zeros(3))
    trainer.known = Path(trainer.writers[0]().path)
    second = progress_in(tmp_path / "progress")
    assert second.restore() is not None
    advance(second, range(11, 16), 15, torch.zeros(3))
    lines = (tmp_path / "progress" / "losses.csv").read_text().splitlines()
    assert lines == ["step,loss", *(f"{step},{step}" for step in range(1, 16))]


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(trainer: Trainer, tmp_path: Path) -> None:
    progress = progress_in(tmp_path / "progress")
    with pytest.raises(TrainingError, match="the loss of step 10 is not a number"):
        tell(progress, [1.0] * 8 + [float("nan")] * 30, 100)
    assert not trainer.writers


def test_a_loss_that_is_no_number_is_found_at_the_last_step(tmp_path: Path) -> None:
    progress = progress_in(tmp_path / "progress", seconds=1000)
    with pytest.raises(TrainingError, match="the loss of step 3 is not a number"):
        tell(progress, [1.0, 1.0, float("inf")], 3)


def test_a_refused_checkpoint_leaves_a_sentence_and_nothing_half_written(trainer: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "progress"
    advance(progress_in(folder), range(1, 11), 100, torch.zeros(3))
    blocked = tmp_path / "storage" / "checkpoint_0"
    (blocked / "state.pt").mkdir(parents=True)  # where no file can be written, whoever asks
    with pytest.raises(StorageError, match=r"the checkpoint .*checkpoint_0 was not written"):
        trainer.writers[0]()
    assert not blocked.exists()
    assert "make room there and run the same command again" in read_json(folder / ERROR_FILE)["sentence"]


def test_a_copy_is_not_changed_by_what_happens_to_its_original() -> None:
    weights = torch.zeros(2)
    state = {"model": {"weights": weights}, "groups": [{"lr": 0.1, "state": weights}], "step": 3}
    copied = on_cpu(state)
    weights.fill_(1)
    assert copied["model"]["weights"].tolist() == copied["groups"][0]["state"].tolist() == [0, 0]
    assert (copied["groups"][0]["lr"], copied["step"]) == (0.1, 3)
