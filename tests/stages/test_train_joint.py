"""Stage 3 in plain torch: against a slow twin, over 1, 2 and 4 real workers, and interrupted."""

import copy
import math
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

from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import LaneBatchNorm2d, build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.core.lanes import ResidentLanes, Stream
from spice_ray.core.order import stream_key, with_replacement
from spice_ray.settings import Joint
from spice_ray.stages.train_joint import TrainedJoint, train_joint
from tests.small_lanes import resident

CPU = torch.device("cpu")
SEED, STEPS, STOP, CLUSTERS = 5, 20, 7, 3
FILES = [9, 7, 10, 8, 8, 8, 7, 9]  # lane g owns files g and g + 4
TOTAL = sum(FILES)
LABELS = torch.arange(TOTAL) % CLUSTERS
WEIGHTS = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0]).repeat(14)[:TOTAL]
CASES = {"digits": ("digits", {}), "natural": ("natural", {"one_pass": False, "threshold": "adaptive"})}
"""Views, and settings."""


class KilledError(Exception):
    """What a kill is to the loop."""


class Recorder:
    """Keeps losses; with ``stop``, saves a snapshot after that step and interrupts the loop."""

    def __init__(self, state: dict[str, Any] | None = None, stop: int | None = None, file: Path | None = None) -> None:
        self.state, self.stop, self.file = state, stop, file
        self.losses: list[float] = []

    def restore(self):
        return self.state

    def advance(self, step, total, loss, snapshot):
        self.losses.append(loss.item())
        first = self.state["step"] if self.state else 0
        assert (step, total) == (first + len(self.losses), STEPS)
        if step == self.stop:
            state = snapshot()
            if collectives.rank() == 0:
                torch.save(state, self.file)
            raise KilledError


def settings(**changes: Any) -> Joint:
    values = {"lanes": 4, "steps": STEPS, "labelled_batch": 8, "unlabelled_ratio": 2, "confidence": 0.4, "ema": 0.9}
    return Joint(**(values | {"lr": 0.01, "weight_decay": 1e-3} | changes))


def augmentation(family: str) -> Augmentation:
    return Augmentation(family, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def dataset() -> Tensor:
    coarse = torch.rand(TOTAL, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (255 * F.interpolate(coarse, size=16, mode="bilinear")).to(torch.uint8)


def initial_model() -> JointModel:
    return JointModel(build_encoder("convnet", 1), ClusterHead(128, CLUSTERS, 2))


def streams(num_lanes: int = 4) -> tuple[ResidentLanes, ResidentLanes]:
    """The labelled and the unlabelled rows of this process, 8 and 16 of a global batch."""
    share = num_lanes // collectives.world_size()
    lane_ids = list(range(collectives.rank() * share, (collectives.rank() + 1) * share))
    rows = 8 // num_lanes
    labelled = Stream(stream_key(SEED, "labelled"), rows, 100, with_replacement, WEIGHTS > 0)
    unlabelled = Stream(stream_key(SEED, "unlabelled"), 2 * rows, window=100)
    return (
        resident(dataset(), FILES, lane_ids, num_lanes, labelled),
        resident(dataset(), FILES, lane_ids, num_lanes, unlabelled),
    )


def wrap(module):
    if collectives.world_size() == 1:
        return module
    return DistributedDataParallel(module, broadcast_buffers=False)


def train(joint: Joint, family: str, recorder: Recorder, accumulate: int = 1, *, compiled: bool = False) -> JointModel:
    labelled, unlabelled = streams(joint.lanes)
    trained = train_joint(
        joint,
        initial_model(),
        labelled,
        unlabelled,
        augmentation(family),
        labels=LABELS,
        weights=WEIGHTS,
        seed=SEED,
        device=CPU,
        wrap=wrap,
        progress=recorder,
        accumulate=accumulate,
        compiled=compiled,
    )
    assert trained.steps == STEPS
    return trained.model


def train_case(case: str, recorder: Recorder, accumulate: int = 1, *, compiled: bool = False) -> dict[str, Any]:
    family, changes = CASES[case]
    model = train(settings(**changes), family, recorder, accumulate, compiled=compiled)
    return {"losses": recorder.losses, "model": model.state_dict()}


def train_interrupted(case: str, file: Path) -> dict[str, Any]:
    """Stop after some steps, and go on in a run of its own from what was saved."""
    before = Recorder(stop=STOP, file=file)
    with pytest.raises(KilledError):
        train_case(case, before)
    if dist.is_initialized():
        dist.barrier()
    result = train_case(case, Recorder(torch.load(file, weights_only=True)))
    return {**result, "losses": before.losses + result["losses"]}


def work(rank: int, folder: Path) -> None:
    """What each of four workers does, and then the first two of them; runs in processes of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/four", rank=rank, world_size=4)
    torch.save({case: train_case(case, Recorder()) for case in CASES}, folder / f"4-{rank}.pt")
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
        results = {case: train_case(case, Recorder()) for case in CASES}
        results |= {f"{case} resumed": train_interrupted(case, folder / f"{case}.pt") for case in CASES}
        results |= {f"{case} in parts": train_case(case, Recorder(), accumulate=2) for case in CASES}
        torch.save(results, folder / f"2-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Of 1, 2 and 4 workers, each rank's losses and models."""
    ranks = {n: [torch.load(folder / f"{n}-{r}.pt", weights_only=True) for r in range(n)] for n in (2, 4)}
    return {1: [{case: train_case(case, Recorder()) for case in CASES}], **ranks}


# Workers differ by rounding, 1e-7 at each of the first steps; lanes of ten rows let that grow until the last one.
FIRST, AT_FIRST, IN_THE_END, IN_WEIGHTS = 12, 1e-5, 1e-3, 1e-2


def assert_close(state: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = IN_WEIGHTS) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) == STEPS
    assert found["losses"][:FIRST] == pytest.approx(expected["losses"][:FIRST], rel=AT_FIRST)
    assert found["losses"] == pytest.approx(expected["losses"], rel=IN_THE_END)
    assert_close(found["model"], expected["model"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_losses_and_the_model_of_one(results, case, workers):
    assert_same_training(results[workers][0][case], results[1][0][case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [2, 4])
def test_batches_in_parts_give_the_losses_and_the_model_of_whole_ones(results, case, parts):
    assert_same_training(train_case(case, Recorder(), accumulate=parts), results[1][0][case])


@pytest.mark.parametrize("case", CASES)
def test_two_workers_with_batches_in_parts_give_the_losses_and_the_model_of_one(results, case):
    assert_same_training(results[2][0][f"{case} in parts"], results[1][0][case])


@pytest.mark.parametrize("case", ["digits", pytest.param("natural", marks=pytest.mark.faults)])
def test_a_compiled_encoder_gives_the_losses_and_the_model_of_a_plain_one(results, case, monkeypatch):
    def refuse(norm: LaneBatchNorm2d, x: Tensor) -> Tensor:
        raise AssertionError("the encoder was not compiled")

    monkeypatch.setattr(LaneBatchNorm2d, "one_by_one", refuse)
    assert_same_training(train_case(case, Recorder(), compiled=True), results[1][0][case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", [2, 4])
def test_all_workers_end_with_the_same_model_and_losses(results, case, workers):
    first, *others = (result[case] for result in results[workers])
    for other in others:
        assert other["losses"] == first["losses"]
        assert_close(other["model"], first["model"], tolerance=0)


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_worker_ends_where_an_undisturbed_one_does_to_the_bit(results, case, tmp_path):
    resumed = train_interrupted(case, tmp_path / "state.pt")
    assert resumed["losses"] == results[1][0][case]["losses"]
    assert_close(resumed["model"], results[1][0][case]["model"], tolerance=0)


@pytest.mark.parametrize("case", CASES)
def test_two_interrupted_workers_end_where_two_undisturbed_ones_do_to_the_bit(results, case):
    for result in results[2]:
        assert result[f"{case} resumed"]["losses"] == result[case]["losses"]
        assert_close(result[f"{case} resumed"]["model"], result[case]["model"], tolerance=0)


@pytest.mark.parametrize("case", CASES)
def test_one_worker_can_go_on_where_two_were_interrupted(results, folder, case):
    resumed = train_case(case, Recorder(torch.load(folder / f"{case}.pt", weights_only=True)))
    assert resumed["losses"] == pytest.approx(results[1][0][case]["losses"][STOP:], rel=IN_THE_END)
    assert_close(resumed["model"], results[1][0][case]["model"])


# One lane: batch norm over the whole batch, for which a plain twin is short


def logits_of(model: JointModel, parts: list[Tensor], one_pass: bool) -> list[Tensor]:
    labelled, weak, strong = parts
    if one_pass:
        return list(model(torch.cat(parts)).split([8, 16, 16]))
    weak_logits = model(weak)
    both = model(torch.cat([labelled, strong]))
    return [both[:8], weak_logits, both[8:]]


def twin(one_pass: bool, weight: float, threshold: str) -> tuple[list[float], dict[str, Tensor]]:
    """Eqs. 8-9 written out: the losses and the moving average of the weights after STOP steps."""
    model, views, (labelled, unlabelled) = initial_model(), augmentation("natural"), streams(1)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = [[p for p in model.parameters() if (p.ndim > 1) is decayed] for decayed in (True, False)]
    optimizer = torch.optim.SGD(
        [{"params": groups[0], "weight_decay": 1e-3}, {"params": groups[1]}], lr=1, momentum=0.9, nesterov=True
    )
    losses, surest, means = [], 1 / CLUSTERS, [1 / CLUSTERS] * CLUSTERS
    for step in range(STOP):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * math.cos(7 * math.pi * step / (16 * STEPS))
        known, unknown = labelled.batch(step), unlabelled.batch(step)
        parts = [
            views.weak(known.images, known.draws, stream_key(SEED, "joint", "labelled")),
            views.weak(unknown.images, unknown.draws, stream_key(SEED, "joint", "weak")),
            views.strong(unknown.images, unknown.draws, stream_key(SEED, "joint", "strong")),
        ]
        sure, weak, strong = (logits.log_softmax(dim=1) for logits in logits_of(model, parts, one_pass))
        loss = torch.zeros(())
        for row, sample in zip(sure, known.sample_ids.tolist(), strict=True):
            loss = loss - WEIGHTS[sample] * row[sample % CLUSTERS] / 8
        levels = [0.4] * CLUSTERS if threshold == "fixed" else [surest * mean / max(means) for mean in means]
        for weak_row, strong_row in zip(weak.detach(), strong, strict=True):
            if weak_row.max().exp() > levels[weak_row.argmax()]:
                loss = loss - weight * strong_row[weak_row.argmax()] / 16
        probs = weak.detach().exp().tolist()
        surest = 0.9 * surest + 0.1 * sum(map(max, probs)) / 16
        means = [0.9 * mean + 0.1 * sum(of) / 16 for mean, of in zip(means, zip(*probs, strict=True), strict=True)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        average = {name: 0.9 * average[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
    return losses, average


@pytest.mark.parametrize(
    ("one_pass", "weight", "threshold"), [(True, 1.0, "fixed"), (False, 0.3, "fixed"), (True, 0.5, "adaptive")]
)
def test_losses_and_averaged_weights_are_those_of_a_plain_twin(one_pass, weight, threshold, tmp_path):
    recorder = Recorder(stop=STOP, file=tmp_path / "state.pt")
    changes = {"one_pass": one_pass, "unlabelled_weight": weight, "threshold": threshold}
    with pytest.raises(KilledError):
        train(settings(lanes=1, **changes), "natural", recorder)
    losses, average = twin(one_pass, weight, threshold)
    assert recorder.losses == pytest.approx(losses, rel=1e-4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["ema"]
    for name, value in average.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_learns_in_every_precision(precision, one_pass):
    # Autocast keeps the weights it has cast: those of a pass without gradient must not serve one with.
    joint = settings(precision=precision, one_pass=one_pass, weight_decay=0, ema=0, unlabelled_weight=0)
    trained = train(joint, "natural", Recorder())
    for before, (name, after) in zip(initial_model().parameters(), trained.named_parameters(), strict=True):
        assert not torch.equal(before, after), name


class Steps:
    """Counts steps; with ``stop``, keeps the state after that step and interrupts the loop."""

    def __init__(self, state: dict[str, Any] | None = None, stop: int | None = None) -> None:
        self.state, self.stop = state, stop
        self.told: list[tuple[int, int]] = []

    def restore(self):
        return self.state

    def advance(self, step, total, loss, snapshot):
        self.told.append((step, total))
        if step == self.stop:
            self.state = copy.deepcopy(snapshot())
            raise KilledError


def train_patiently(recorder: Steps) -> TrainedJoint:
    # Hardly anything is learnt at that rate, so that the agreeing share is a matter of luck from the first window on.
    joint = settings(steps=1000, patience=100, confidence=0, lr=1e-9)
    labelled, unlabelled = streams()
    known = {"labels": LABELS, "weights": WEIGHTS, "seed": SEED, "device": CPU, "wrap": wrap, "progress": recorder}
    return train_joint(joint, initial_model(), labelled, unlabelled, augmentation("digits"), **known)


def test_training_that_gains_nothing_any_more_ends_early_and_stays_so_when_it_is_resumed():
    whole = Steps()
    steps = train_patiently(whole).steps
    assert steps in range(200, 1000, 100)
    assert whole.told == [(step, 1000) for step in range(1, steps)] + [(steps, steps)]
    for stop in (steps - 40, steps):
        interrupted = Steps(stop=stop)
        with pytest.raises(KilledError):
            train_patiently(interrupted)
        resumed = Steps(interrupted.state)
        assert train_patiently(resumed).steps == steps
        assert interrupted.told + resumed.told == whole.told


if __name__ == "__main__":
    import torch._dynamo  # by every optimiser, and slower than the training: once, before the workers part

    torch.set_num_threads(1)
    start_processes(work, (Path(sys.argv[1]),), nprocs=4, start_method="fork")
