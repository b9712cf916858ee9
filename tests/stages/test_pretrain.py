"""Stage 1 in plain torch: against a slow twin, over 1, 2 and 4 real workers, and interrupted."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from spice_ray.contracts import Health
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import LaneBatchNorm2d, build_encoder
from spice_ray.core.lanes import ResidentLanes, Stream
from spice_ray.core.moco import ProjectedEncoder, cosine
from spice_ray.core.order import stream_key
from spice_ray.errors import TrainingError
from spice_ray.settings import Pretrain
from spice_ray.stages.accumulation import Parts
from spice_ray.stages.contrast import MoCo
from spice_ray.stages.pretrain import _Trainer, pretrain
from tests.small_lanes import resident

CPU = torch.device("cpu")
SEED, STEPS, STOP = 5, 20, 7
FILES = [9, 7, 10, 8, 8, 8, 7, 9]  # lane g owns files g and g + 4: lanes of 17, 15, 17 and 17 images
CASES = {
    "digits": ("digits", {}),
    "natural": ("natural", {"symmetric": True}),
    # Batch norm of four rows behind a linear layer: rounding grows faster here than in the others.
    "byol": ("digits", {"loss": "byol", "lr": 0.0001}),
    "simclr": ("natural", {"loss": "simclr", "lr": 0.005}),
}
"""Views, and settings."""
MOCO = ["digits", "natural"]
IN_PARTS = [case for case in CASES if case != "simclr"]  # whose rows all meet each other
EVERYWHERE = [(2, case) for case in CASES] + [(4, case) for case in MOCO]


class KilledError(Exception):
    """What a kill is to the loop."""


class Recorder:
    """Keeps losses; with ``stop``, saves a snapshot after that step and interrupts the loop."""

    def __init__(self, state: dict[str, Any] | None = None, stop: int | None = None, file: Path | None = None) -> None:
        self.state, self.stop, self.file = state, stop, file
        self.losses: list[float] = []
        self.health: dict[int, list[float]] = {}
        self.gradient = torch.empty(0)

    def wrap(self, module):
        self.module = module
        return wrap(module)

    def restore(self):
        return self.state

    def note_health(self, epoch, loss, health):
        self.health[epoch] = [loss.item(), *health]

    def advance(self, step, total, loss, snapshot):
        self.losses.append(loss.item())
        if step == 1:
            self.gradient = torch.cat([weights.grad.flatten() for weights in self.module.parameters()])
        first = self.state["step"] if self.state else 0
        assert (step, total) == (first + len(self.losses), STEPS)
        if step == self.stop:
            state = snapshot()
            if collectives.rank() == 0:
                torch.save(state, self.file)
            raise KilledError


def settings(**changes: Any) -> Pretrain:
    values = {"lanes": 4, "encoder": "convnet", "epochs": 5, "batch_size": 16, "queue_size": 32, "projection_dim": 16}
    # At a rate of 0.05 already, weights that differ in the 7th digit may differ in the 3rd after these 20 steps.
    training = {"temperature": 0.2, "momentum": 0.9, "lr": 0.02, "weight_decay": 1e-3, "warmup_epochs": 1}
    return Pretrain(**(values | training | changes))


def augmentation(family: str) -> Augmentation:
    return Augmentation(family, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def dataset() -> Tensor:
    coarse = torch.rand(sum(FILES), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (255 * F.interpolate(coarse, size=16, mode="bilinear")).to(torch.uint8)


def worker_lanes(num_lanes: int = 4, rows_per_lane: int = 4) -> ResidentLanes:
    """The lanes of this process among ``num_lanes``."""
    share = num_lanes // collectives.world_size()
    lane_ids = list(range(collectives.rank() * share, (collectives.rank() + 1) * share))
    stream = Stream(stream_key(SEED, "pretrain"), rows_per_lane, window=100)
    return resident(dataset(), FILES, lane_ids, num_lanes, stream)


def fit(trainer: _Trainer, step: int, lanes: ResidentLanes) -> Tensor:
    batch = lanes.batch(step)
    return trainer.fit(batch.images, batch.draws, *trainer.contrast.of_step(step, STEPS))


def wrap(module):
    if collectives.world_size() == 1:
        return module
    return DistributedDataParallel(module, broadcast_buffers=False)


def train(case: str, recorder: Recorder, accumulate: int = 1, *, compiled: bool = False) -> dict[str, Any]:
    family, changes = CASES[case]
    encoder = pretrain(
        settings(**changes),
        worker_lanes(),
        augmentation(family),
        num_images=sum(FILES),
        seed=SEED,
        device=CPU,
        wrap=recorder.wrap,
        progress=recorder,
        accumulate=accumulate,
        compiled=compiled,
    )
    found = {"losses": recorder.losses, "health": recorder.health, "gradient": recorder.gradient}
    return {**found, "encoder": encoder.state_dict()}


def train_interrupted(case: str, file: Path) -> dict[str, Any]:
    """Stop after some steps, and go on in a run of its own from what was saved."""
    before = Recorder(stop=STOP, file=file)
    with pytest.raises(KilledError):
        train(case, before)
    if dist.is_initialized():
        dist.barrier()
    result = train(case, Recorder(torch.load(file, weights_only=True)))
    return {**result, "losses": before.losses + result["losses"]}


def work(rank: int, folder: Path) -> None:
    """What each of four workers does, and then the first two of them; runs in processes of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/four", rank=rank, world_size=4)
    torch.save({case: train(case, Recorder()) for case in MOCO}, folder / f"4-{rank}.pt")
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
        results = {case: train(case, Recorder()) for case in CASES}
        results |= {f"{case} resumed": train_interrupted(case, folder / f"{case}.pt") for case in MOCO}
        results |= {f"{case} in parts": train(case, Recorder(), accumulate=2) for case in IN_PARTS}
        torch.save(results, folder / f"2-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Of 1, 2 and 4 workers, each rank's losses and encoders."""
    ranks = {n: [torch.load(folder / f"{n}-{r}.pt", weights_only=True) for r in range(n)] for n in (2, 4)}
    return {1: [{case: train(case, Recorder()) for case in CASES}], **ranks}


def assert_close(state: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    difference = (found["gradient"] - expected["gradient"]).norm()
    assert 0 < expected["gradient"].norm() < torch.inf
    assert difference < 1e-5 * expected["gradient"].norm()
    assert_close(found["encoder"], expected["encoder"])


@pytest.mark.parametrize("case", IN_PARTS)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_losses_and_the_encoder_of_a_whole_one(results, case, parts):
    assert_same_training(train(case, Recorder(), accumulate=parts), results[1][0][case])


@pytest.mark.parametrize(("case", "parts"), [("natural", 1), pytest.param("digits", 2, marks=pytest.mark.faults)])
def test_compiled_encoders_give_the_losses_and_the_encoder_of_plain_ones(results, case, parts, monkeypatch):
    def refuse(norm: LaneBatchNorm2d, x: Tensor) -> Tensor:
        raise AssertionError("an encoder was not compiled")

    monkeypatch.setattr(LaneBatchNorm2d, "one_by_one", refuse)
    assert_same_training(train(case, Recorder(), parts, compiled=True), results[1][0][case])


@pytest.mark.parametrize("case", IN_PARTS)
def test_two_workers_with_batches_in_parts_give_the_losses_and_the_encoder_of_one(results, case):
    assert_same_training(results[2][0][f"{case} in parts"], results[1][0][case])


@pytest.mark.parametrize(("workers", "case"), EVERYWHERE)
def test_any_number_of_workers_gives_the_losses_and_the_encoder_of_one(results, case, workers):
    alone, together = results[1][0][case], results[workers][0][case]
    assert_same_training(together, alone)
    assert list(together["health"]) == [1, 2, 3, 4, 5]
    for epoch, signs in together["health"].items():
        assert signs == pytest.approx(alone["health"][epoch], rel=1e-3, abs=1e-4)
        assert signs[0] == together["losses"][4 * epoch - 1]


@pytest.mark.parametrize(("workers", "case"), EVERYWHERE)
def test_all_workers_end_with_the_same_encoder_and_losses(results, case, workers):
    first, *others = (result[case] for result in results[workers])
    for other in others:
        assert other["losses"] == first["losses"]
        assert other["health"] == first["health"]
        assert_close(other["encoder"], first["encoder"], tolerance=0)


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_worker_ends_where_an_undisturbed_one_does_to_the_bit(results, case, tmp_path):
    resumed = train_interrupted(case, tmp_path / "state.pt")
    assert resumed["losses"] == results[1][0][case]["losses"]
    assert_close(resumed["encoder"], results[1][0][case]["encoder"], tolerance=0)


@pytest.mark.parametrize("case", MOCO)
def test_two_interrupted_workers_end_where_two_undisturbed_ones_do_to_the_bit(results, case):
    for result in results[2]:
        assert result[f"{case} resumed"]["losses"] == result[case]["losses"]
        assert_close(result[f"{case} resumed"]["encoder"], result[case]["encoder"], tolerance=0)


@pytest.mark.parametrize("case", MOCO)
def test_one_worker_can_go_on_where_two_were_interrupted(results, folder, case):
    resumed = train(case, Recorder(torch.load(folder / f"{case}.pt", weights_only=True)))
    assert resumed["losses"] == pytest.approx(results[1][0][case]["losses"][STOP:], rel=1e-4)
    assert_close(resumed["encoder"], results[1][0][case]["encoder"])


class Listener:
    """Hears of nothing but health."""

    def __init__(self) -> None:
        self.health: list[Health] = []

    def restore(self):
        return None

    def advance(self, step, total, loss, snapshot):
        pass

    def note_health(self, epoch, loss, health):
        self.health.append(health)


def test_a_run_in_which_all_images_become_alike_stops_and_says_so():
    listener = Listener()
    with pytest.raises(TrainingError, match=r"stage 1 collapsed, in epoch \d+ of 40 the projections lie on a line"):
        pretrain(
            settings(epochs=40, optimizer="adamw", lr=0.5),
            worker_lanes(),
            augmentation("digits"),
            num_images=sum(FILES),
            seed=SEED,
            device=CPU,
            wrap=wrap,
            progress=listener,
        )
    # A quarter of the epochs is let pass: a new encoder finds all images alike too.
    assert 10 < len(listener.health) < 40
    assert listener.health[-1].effective_rank < 1.5


@pytest.mark.parametrize("case", CASES)
def test_every_weight_learns_in_bf16(case):
    # Autocast keeps the weights it has cast: those of a pass without gradient must not serve one with.
    family, changes = CASES[case]
    trainer = _Trainer(settings(**changes, precision="bf16"), Parts(4, 1), augmentation(family), SEED, CPU, wrap)
    before = [weights.detach().clone() for weights in trainer.query.parameters()]
    for step in range(2):
        assert torch.isfinite(fit(trainer, step, worker_lanes()))
    for (name, weights), old in zip(trainer.query.named_parameters(), before, strict=True):
        assert weights.dtype == torch.float32
        assert not torch.equal(weights, old), name


# One lane: batch norm over the whole batch, for which a plain twin is short


def twin_losses(*, symmetric: bool) -> list[float]:
    """Eq. 1 with MoCo's algorithm 1, for one lane; the two directions of a symmetric loss are added up."""
    query = ProjectedEncoder(build_encoder("convnet", stream_key(SEED, "encoder")), 16, stream_key(SEED, "projector"))
    momentum = copy.deepcopy(query)
    queue = _moco(settings(lanes=1)).queue.keys.clone()
    optimizer = torch.optim.SGD(query.parameters(), lr=1, momentum=0.9, weight_decay=0.3)
    lanes, losses = worker_lanes(1, 16), []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * cosine(step, STEPS, 4)
        batch = lanes.batch(step)
        views = [
            augmentation("natural").contrastive(batch.images, batch.draws, stream_key(SEED, "pretrain", view))
            for view in (0, 1)
        ]
        with torch.no_grad():
            for old, new in zip(momentum.parameters(), query.parameters(), strict=True):
                old.copy_(0.9 * old + 0.1 * new)
            keys = [momentum(view) for view in (reversed(views) if symmetric else views[1:])]
        loss = torch.zeros(())
        for view, own in zip(views, keys, strict=False):
            queries = query(view)
            positives = (queries * own).sum(dim=1).div(0.2).exp()
            negatives = (queries @ queue.T).div(0.2).exp().sum(dim=1)
            loss = loss - (positives / (positives + negatives)).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([queue, *keys])[-32:]
        losses.append(loss.item() / len(keys))
    return losses


@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_are_those_of_a_plain_twin(symmetric, tmp_path):
    recorder = Recorder(stop=6, file=tmp_path / "state.pt")
    with pytest.raises(KilledError):
        pretrain(
            settings(lanes=1, symmetric=symmetric, weight_decay=0.3),
            worker_lanes(1, 16),
            augmentation("natural"),
            num_images=sum(FILES),
            seed=SEED,
            device=CPU,
            wrap=recorder.wrap,
            progress=recorder,
        )
    assert recorder.losses == pytest.approx(twin_losses(symmetric=symmetric), rel=1e-4)


# Keys


def _moco(pretrain_settings: Pretrain) -> MoCo:
    return MoCo(pretrain_settings, Parts(pretrain_settings.lanes, 1), SEED, CPU)


def test_keys_come_back_in_the_order_of_their_queries():
    moco = _moco(settings())
    moco.momentum_encoder.model.eval()  # without batch statistics each row is on its own
    views = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = moco.momentum_encoder.model(views)
    for step in range(5):
        torch.testing.assert_close(moco.encode_keys(*moco.of_step(step, STEPS), views), expected, rtol=1e-5, atol=1e-6)


def key_groups(moco: MoCo, step: int, views: Tensor) -> list[set[int]]:
    """For each row, the rows whose keys change when it changes: its key's batch-norm group."""
    shuffle = moco.of_step(step, STEPS)[0]
    keys, groups = moco.encode_keys(shuffle, views), []
    for row in range(len(views)):
        changed = views.clone()
        changed[row] = 3 * changed[row].flip(-1) + 1
        difference = (moco.encode_keys(shuffle, changed) - keys).abs().amax(dim=1)
        groups.append(set(torch.nonzero(difference > 1e-6).flatten().tolist()))
    return groups


def test_no_key_is_normalised_among_the_rows_of_its_querys_lane():
    moco = _moco(settings(batch_size=32))
    views = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    for step in (0, 1):
        groups = key_groups(moco, step, views)
        for row, group in enumerate(groups):
            assert len(group | {row}) == len(group) == 8
            assert group != set(range(row % 4, 32, 4))
        seen.append(groups)
    assert seen[0] != seen[1]  # each step shuffles anew


def test_the_queue_takes_in_each_steps_keys_and_keeps_the_rest():
    trainer = _Trainer(settings(), Parts(4, 1), augmentation("none"), SEED, CPU, wrap)
    lanes, queue = worker_lanes(), trainer.contrast.queue
    before = queue.keys.clone()
    for step in range(4):
        fit(trainer, step, lanes)
        halves = [slice(0, 16), slice(16, 32)]
        new, old = halves[step % 2], halves[1 - step % 2]
        assert torch.equal(queue.keys[old], before[old])
        assert not torch.isclose(queue.keys[new], before[new]).all(dim=1).any()
        torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(32))
        before = queue.keys.clone()


if __name__ == "__main__":
    import torch._dynamo  # by every optimiser, and slower than the training: once, before the workers part

    torch.set_num_threads(1)
    start_processes(work, (Path(sys.argv[1]),), nprocs=4, start_method="fork")
