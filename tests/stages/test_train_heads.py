"""Stage 2: what a head depends on, what it returns, and that it finds clusters."""

import hashlib
import io
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spice_ray.contracts import Bank
from spice_ray.core.heads import ClusterHead
from spice_ray.errors import TrainingError
from spice_ray.settings import Heads
from spice_ray.stages.features import Features
from spice_ray.stages.train_heads import TrainedHead, choose_head, evaluate_head, label_round, train_heads

CPU = torch.device("cpu")
SEED, CLUSTERS, COUNT, WIDTH = 4, 5, 400, 16
ABLATIONS = [
    {},
    {"assignment": "exclusive"},
    {"loss": "cross_entropy"},
    {"loss": "tempered"},
    {"entropy_weight": 1.0},
    {"label_view": "strong"},
    {"train_view": "weak"},
    {"prior": [0.24, 0.22, 0.2, 0.18, 0.16]},
]


def mixture() -> tuple[Bank, NDArray[np.int64]]:
    """Five Gaussians of unequal width, their order shuffled; each view has noise of its own."""
    generator = np.random.default_rng(0)
    labels_true = generator.permutation(np.arange(COUNT) % CLUSTERS)
    centres = 3 * np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))[0][:CLUSTERS]
    points = centres[labels_true] + 0.4 * generator.normal(size=(COUNT, WIDTH))

    def view(*shape: int) -> NDArray[np.float32]:
        return (points + 0.1 * generator.normal(size=(*shape, COUNT, WIDTH))).astype(np.float32)

    plain = view()
    embedding = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    return Bank(embedding, plain, view(), view(3)), labels_true


def settings(**changes: Any) -> Heads:
    return Heads(**({"epochs": 4, "round_size": 130, "repeats": 2, "batch_size": 32, "lr": 0.005} | changes))


class Epochs:
    """Keeps every state, and goes on from one."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state, self.states = state, dict[int, dict[str, Any]]()

    def restore(self) -> dict[str, Any] | None:
        return self.state

    def advance(self, num_epochs: int, snapshot: Any) -> None:
        file = io.BytesIO()
        torch.save(snapshot(), file)
        self.states[num_epochs] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def train_together(
    bank: Bank,
    indices: list[int],
    *,
    train_ids: NDArray[np.int64] | None = None,
    progress: Epochs | None = None,
    resident: bool = False,
    **changes: Any,
) -> list[TrainedHead]:
    return train_heads(
        Features(bank, CPU, resident=resident),
        indices,
        settings(**changes),
        num_clusters=CLUSTERS,
        seed=SEED,
        train_ids=np.arange(len(bank.plain)) if train_ids is None else train_ids,
        progress=progress or Epochs(),
    )


def train(bank: Bank, index: int = 0, **options: Any) -> TrainedHead:
    return train_together(bank, [index], **options)[0]


def digest(trained: TrainedHead) -> str:
    weights = b"".join(weight.numpy().tobytes() for weight in trained.weights.values())
    return hashlib.sha256(weights + repr(trained.losses).encode()).hexdigest()


def head_of(trained: TrainedHead) -> ClusterHead:
    head = ClusterHead(WIDTH, CLUSTERS, 0)
    head.load_state_dict(trained.weights)
    return head


@pytest.fixture(scope="module")
def bank() -> Bank:
    return mixture()[0]


# What a head depends on


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_head_is_the_same_to_the_bit_in_another_process_that_trains_others_first(bank):
    command = [sys.executable, __file__, "2", "0", "1"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
    assert [digest(train(bank, index)) for index in (0, 1, 2)] == [lines[1], lines[2], lines[0]]


def test_heads_of_other_numbers_are_other_heads(bank):
    assert len({digest(train(bank, index, epochs=1)) for index in range(4)}) == 4


def test_a_head_does_not_depend_on_the_processs_generator_and_leaves_it_alone(bank):
    torch.manual_seed(1)
    first = digest(train(bank, epochs=1))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert digest(train(bank, epochs=1)) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mapped_bank_gives_the_same_head_and_its_files_stay_as_they_were(bank, tmp_path):
    for name, array in bank._asdict().items():
        np.save(tmp_path / f"{name}.npy", array)
    before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    mapped = Bank(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in Bank._fields))
    assert digest(train(mapped)) == digest(train(bank))
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("changes", ABLATIONS)
def test_a_bank_is_never_written_not_even_where_it_could_be(changes):
    bank, _ = mixture()
    before = [array.copy() for array in bank]
    trained = train(bank, epochs=2, **changes)
    assert all(np.array_equal(array, kept) for array, kept in zip(bank, before, strict=True))
    for array in bank:
        array.flags.writeable = False
    assert digest(train(bank, epochs=2, **changes)) == digest(trained)


def test_rows_outside_the_training_split_have_no_influence(bank):
    train_ids = np.arange(0, COUNT, 2)
    poisoned = Bank(*(array.copy() for array in bank))
    for array in poisoned:
        array[..., 1::2, :] = np.nan
    assert digest(train(poisoned, train_ids=train_ids)) == digest(train(bank, train_ids=train_ids))


# What it returns


@pytest.mark.parametrize("lr", [0.005, 0.2])
def test_the_weights_returned_are_the_best_epochs(bank, lr):
    trained = train(bank, epochs=6, lr=lr)
    assert len(trained.losses) == 6
    assert trained.loss == min(trained.losses)
    assert trained.best_epoch == trained.losses.index(trained.loss)
    recomputed = evaluate_head(head_of(trained), Features(bank, CPU), np.arange(COUNT), settings(), CLUSTERS)
    assert recomputed == trained.loss


def test_later_epochs_leave_the_earlier_ones_as_they_were_and_the_best_may_not_be_the_last(bank):
    full = train(bank, epochs=6, lr=0.4)
    assert full.best_epoch < 5
    short = train(bank, epochs=full.best_epoch + 1, lr=0.4)
    assert short.losses == full.losses[: full.best_epoch + 1]
    assert all(torch.equal(short.weights[name], weight) for name, weight in full.weights.items())


def test_every_epoch_is_reported(bank):
    progress = Epochs()
    train(bank, epochs=3, repeats=1, progress=progress)
    assert list(progress.states) == [1, 2, 3]


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_training_goes_on_from_a_saved_state_to_the_bit(bank, epoch):
    progress = Epochs()
    whole = train(bank, lr=0.2, progress=progress)
    again = Epochs(progress.states[epoch])
    assert digest(train(bank, lr=0.2, progress=again)) == digest(whole)
    assert list(again.states) == list(range(epoch + 1, 5))


# Side by side


@pytest.mark.parametrize("changes", ABLATIONS)
def test_heads_side_by_side_are_those_trained_alone(bank, changes):
    # 3 rounds x 2 repeats x 4 batches x 4 epochs: 96 steps.
    together = train_together(bank, [4, 0, 2], **changes)
    for index, found in zip([4, 0, 2], together, strict=True):
        alone = train(bank, index, **changes)
        assert found.losses == pytest.approx(alone.losses, abs=1e-5)
        assert found.best_epoch == alone.best_epoch
        for name, weight in alone.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=1e-5, atol=1e-5)


def test_a_bank_that_was_copied_to_the_device_gives_the_same_head(bank):
    assert digest(train(bank, resident=True)) == digest(train(bank))


def test_a_bank_of_half_precision_gives_nearly_the_same_losses(bank):
    halved = bank._replace(**{name: getattr(bank, name).astype(np.float16) for name in ("plain", "weak", "strong")})
    assert train(halved).losses == pytest.approx(train(bank).losses, rel=2e-3)


def test_a_round_larger_than_the_images_takes_all_of_them(bank):
    assert digest(train(bank, epochs=1, round_size=10_000)) == digest(train(bank, epochs=1, round_size=COUNT))


def test_features_that_are_no_numbers_are_an_error_of_one_sentence(bank):
    broken = Bank(*(np.full_like(array, np.nan) for array in bank))
    with pytest.raises(TrainingError, match=r"head 3 .*lr"):
        train(broken, 3, epochs=1)


def test_an_epoch_without_a_loss_is_passed_over_and_a_better_one_taken_afterwards(bank, monkeypatch):
    losses = iter([math.nan, 1.75, math.nan, 1.5])
    monkeypatch.setattr("spice_ray.stages.train_heads.evaluate_head", lambda *_: next(losses))
    found = train(bank, epochs=4)
    assert (found.loss, found.best_epoch) == (1.5, 3)
    assert np.isnan(found.losses).tolist() == [True, False, True, False]


def labels_of(bank: Bank, rows: NDArray[np.int64], **changes: Any) -> Any:
    return label_round(ClusterHead(WIDTH, CLUSTERS, 1), Features(bank, CPU), rows, settings(**changes), CLUSTERS)


def test_the_e_step_reads_the_label_view_for_confidence_and_the_plain_one_for_similarity(bank):
    rows, poison = np.arange(50, 150), np.full_like(bank.plain, np.nan)
    for label_view, unread in (
        ("weak", {"plain": poison, "strong": poison[None]}),
        ("strong", {"plain": poison, "weak": poison}),
    ):
        expected = labels_of(bank, rows, label_view=label_view)
        same = labels_of(bank._replace(**unread), rows, label_view=label_view)
        assert torch.equal(same.indices, expected.indices)
        assert torch.equal(same.labels, expected.labels)
        for name, axis in ((label_view, -2), ("embedding", -2)):
            changed = bank._replace(**{name: np.flip(getattr(bank, name), axis).copy()})
            assert not torch.equal(labels_of(changed, rows, label_view=label_view).indices, expected.indices)


def test_the_m_step_reads_the_train_view_alone(bank):
    poison = np.full_like(bank.plain, np.nan)
    learnt = train(bank, epochs=1, train_view="weak")
    assert digest(train(bank._replace(strong=poison[None]), epochs=1, train_view="weak")) == digest(learnt)
    with pytest.raises(TrainingError):
        train(bank._replace(strong=poison[None]), epochs=1)


# Which is chosen


def trained_with(loss: float) -> TrainedHead:
    return TrainedHead({}, loss, 0, [loss])


def test_the_head_with_the_least_loss_is_chosen_and_of_equals_the_first():
    assert choose_head([trained_with(loss) for loss in (0.9, 0.7, 0.8)]) == 1
    assert choose_head([trained_with(loss) for loss in (0.9, 0.7, 0.8, 0.7)]) == 1
    assert choose_head([trained_with(0.5)] * 3) == 0


# That it learns


@pytest.mark.parametrize("changes", ABLATIONS)
def test_the_chosen_head_finds_a_mixture_of_gaussians(changes):
    bank, labels_true = mixture()
    heads = [train(bank, index, epochs=12, lr=0.02, round_size=COUNT, **changes) for index in range(5)]
    best = heads[choose_head(heads)]
    with torch.no_grad():
        labels = head_of(best)(torch.from_numpy(bank.plain)).argmax(dim=1).numpy()
    table = np.zeros((CLUSTERS, CLUSTERS), np.int64)
    np.add.at(table, (labels, labels_true), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    assert table[rows, columns].sum() / COUNT > 0.95
    if not changes:
        assert best.loss == pytest.approx(math.log(1 + (CLUSTERS - 1) / math.e), abs=0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared = mixture()[0]
    print(*(digest(train(shared, int(number))) for number in sys.argv[1:]))
