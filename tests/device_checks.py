"""What stages compute on a device that is none of the processor's, against what they compute on the processor.

``python -m tests.device_checks NAME ...`` runs some of them, in a process of their own: what they make known to torch,
and replace, stays so.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.pretended_device import Pretended, make_known

if __name__ == "__main__":
    make_known()  # before anything of ours decorates functions with what it replaces

from spice_ray.contracts import Health
from spice_ray.core import neighbor_candidates as candidates
from spice_ray.core import recorded as records
from spice_ray.core.encoders import build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.core.lanes import ResidentLanes, Stream
from spice_ray.core.neighbors import NeighborSearch, exact_neighbors
from spice_ray.core.order import stream_key, with_replacement
from spice_ray.stages.assign import predict
from spice_ray.stages.embed import embed
from spice_ray.stages.features import Features
from spice_ray.stages.pretrain import pretrain
from spice_ray.stages.train_heads import TrainedHead, train_heads
from spice_ray.stages.train_joint import train_joint
from tests.pretended_device import DEVICE, Recording
from tests.small_lanes import resident_rows, serve, shard_files
from tests.stages import test_embed, test_pretrain, test_train_heads, test_train_joint

STAGES = ("optimizers", "pretrain", "train_heads", "train_joint")
HERE, THERE = torch.device("cpu"), torch.device(DEVICE)


def neighbors() -> None:
    """Searched for there as here, from wherever rows are, and however many of them are kept."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.full((2100, 16), 0.25)
    candidates.ON_GPU = candidates.ON_GPU._replace(queries=256, tile=64)  # several of each
    for many in (normalize(torch.randn(4200, 32, generator=generator)), alike, alike[:300]):
        rows = torch.cat((many, many[:50]))
        expected = [of_all[-400:] for of_all in exact_neighbors(rows, 10)]
        for given, where in ((rows.to(THERE), None), (rows, THERE), (rows.numpy(), THERE)):
            for kept in (0, rows.numel() * 2, rows.numel() * 4):
                search = NeighborSearch(given, 10, device=where, most_kept=kept)
                assert search._rows.device.type == DEVICE
                found = search.find(max(0, len(rows) - 400), len(rows))
                assert torch.equal(found[0], expected[0])
                assert torch.equal(found[1], expected[1])
                assert search.num_compared_with_all == (0 if many.shape[1] == 32 else len(found[0]))


def lanes_of(images: Tensor, files: list[int], stream: Stream, device: torch.device) -> ResidentLanes:
    """Of four lanes all."""
    lanes = serve(shard_files(files), [0, 1, 2, 3], 4)
    return ResidentLanes(lanes, resident_rows(images, lanes), stream, device)


class Late:
    """Reads losses when training is over, as late as anybody may; keeps what others need to go on, and may go on."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state
        self.losses: list[Tensor] = []
        self.health: list[Health] = []
        self.states: dict[int, dict[str, Any]] = {}

    def restore(self) -> dict[str, Any] | None:
        """What an earlier one has kept."""
        return self.state

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        """Once an epoch."""
        self.health.append(health)

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], Any]) -> None:
        """Keep a copy, as a file would have it."""
        self.losses.append(loss)
        self.states[step] = tree_map_only(Tensor, lambda one: one.to(HERE, copy=True), snapshot())

    def learned(self, model: nn.Module) -> "Learned":
        """All that was seen."""
        weights = {name: one.cpu() for name, one in model.state_dict().items()}
        losses = torch.stack(self.losses).tolist()
        return Learned(next(model.parameters()).device.type, losses, self.health, self.states, weights)


class Learned(NamedTuple):
    """What came of a training."""

    device: str
    losses: list[float]
    health: list[Health]
    states: dict[int, dict[str, Any]]
    weights: dict[str, Tensor]


def assert_same(one: Any, other: Any) -> None:
    """All numbers are the same to the bit."""
    (values, tree), (others, same_tree) = tree_flatten(one), tree_flatten(other)
    assert tree == same_tree
    for value, of_other in zip(values, others, strict=True):
        assert torch.equal(value, of_other) if isinstance(value, Tensor) else value == of_other


def of_both(train: Callable[[torch.device], Learned]) -> None:
    """What is learned there is what is learned here."""
    here, there = train(HERE), train(THERE)
    assert (here.device, there.device) == ("cpu", DEVICE)
    assert_same(here[1:], there[1:])


def train_small_encoder(
    device: torch.device, case: str, accumulate: int, *, compiled: bool = False, state: dict[str, Any] | None = None
) -> Learned:
    """A case of stage 1."""
    family, changes = test_pretrain.CASES[case]
    late = Late(state)
    encoder = pretrain(
        test_pretrain.settings(**(changes | {"epochs": 2})),
        lanes_of(
            test_pretrain.dataset(),
            test_pretrain.FILES,
            Stream(stream_key(test_pretrain.SEED, "pretrain"), 4, window=100),
            device,
        ),
        test_pretrain.augmentation(family),
        num_images=sum(test_pretrain.FILES),
        seed=test_pretrain.SEED,
        device=device,
        wrap=test_pretrain.wrap,
        progress=late,
        accumulate=accumulate,
        compiled=compiled,
    )
    return late.learned(encoder)


SMALL_STEPS = 8
JOINT_CASES = [*test_train_joint.CASES.values(), ("natural", {"patience": 100, "optimizer": "adamw"})]


def train_small_joint(
    device: torch.device, number: int, *, compiled: bool = False, state: dict[str, Any] | None = None
) -> Learned:
    """A case of stage 3, every other one in parts."""
    family, changes = JOINT_CASES[number]
    weights = test_train_joint.WEIGHTS
    streams = (
        Stream(stream_key(test_train_joint.SEED, "labelled"), 2, 100, with_replacement, weights > 0),
        Stream(stream_key(test_train_joint.SEED, "unlabelled"), 4, window=100),
    )
    late = Late(state)
    trained = train_joint(
        test_train_joint.settings(**(changes | {"steps": SMALL_STEPS})),
        test_train_joint.initial_model(),
        *(lanes_of(test_train_joint.dataset(), test_train_joint.FILES, stream, device) for stream in streams),
        test_train_joint.augmentation(family),
        labels=test_train_joint.LABELS,
        weights=weights,
        seed=test_train_joint.SEED,
        device=device,
        wrap=test_train_joint.wrap,
        progress=late,
        accumulate=1 + number % 2,
        compiled=compiled,
    )
    return late.learned(trained.model)


ENCODERS: list[Callable[..., Learned]] = [
    partial(train_small_encoder, case=case, accumulate=1 + number % 2)
    for number, case in enumerate(test_pretrain.CASES)
]
JOINTS: list[Callable[..., Learned]] = [partial(train_small_joint, number=number) for number in range(len(JOINT_CASES))]
SMALL = ENCODERS + JOINTS


def contrast() -> None:
    """Stage 1."""
    for train in ENCODERS:
        of_both(train)


def joint() -> None:
    """Stage 3."""
    for train in JOINTS:
        of_both(train)


class Forgotten:
    """Progress of heads that nobody keeps."""

    def restore(self) -> None:
        """There is none."""

    def advance(self, num_epochs: int, snapshot: Any) -> None:
        """Look at it as those do who keep it."""
        snapshot()


def train_small_heads(device: torch.device, *, resident: bool = False, **changes: Any) -> list[TrainedHead]:
    """Stage 2, two side by side."""
    bank, _ = test_train_heads.mixture()
    return train_heads(
        Features(bank, device, resident=resident),
        [0, 3],
        test_train_heads.settings(**(changes | {"epochs": 2})),
        num_clusters=test_train_heads.CLUSTERS,
        seed=test_train_heads.SEED,
        train_ids=np.arange(len(bank.plain)),
        progress=Forgotten(),
        starts=[ClusterHead(test_train_heads.WIDTH, test_train_heads.CLUSTERS, key) for key in (8, 9)],
    )


def assert_same_heads(heads: list[TrainedHead], others: list[TrainedHead]) -> None:
    """Their losses and weights are the same."""
    for one, other in zip(heads, others, strict=True):
        assert one.losses == other.losses
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def heads() -> None:
    """Stage 2."""
    for changes in test_train_heads.ABLATIONS:
        here, there = (train_small_heads(device, resident=not changes, **changes) for device in (HERE, THERE))
        assert_same_heads(here, there)


def pretend_to_record() -> list[Recording]:
    """Let work there be recorded, and give the list that recordings will come into."""
    made = list[Recording]()
    stream: Any = SimpleNamespace(wait_stream=lambda other: None)

    class Graph(Recording):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    cuda = SimpleNamespace(
        CUDAGraph=Graph,
        graph=lambda graph, **how: graph.record(),
        current_stream=lambda device: stream,
        Stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
    )
    for module in (records, *(sys.modules[f"spice_ray.stages.{name}"] for name in STAGES)):
        changed: Any = module
        changed.can_record = lambda device: device.type == DEVICE
        changed.torch = SimpleNamespace(**(vars(torch) | {"cuda": cuda}))
        # What is compiled knows no such tensors.
        changed.compile_encoders = lambda model: None
    return made


def recorded() -> None:
    """Steps that are recorded there and replayed do what they do as they stand."""
    recordings = pretend_to_record()

    def both(train: Callable[[], Any]) -> tuple[Any, Any]:
        found = []
        for records._TIMES in (1 << 30, 2):
            assert not recordings
            found.append(train())
        return found[0], found[1]

    for changes in test_train_heads.ABLATIONS[:2]:
        assert_same_heads(*both(partial(train_small_heads, THERE, **changes)))
        assert recordings.pop().replays + recordings.pop().replays > 40  # of whole batches, and of last ones
    for train in SMALL:
        as_it_stands, found = both(partial(train, THERE, compiled=True))
        assert_same(as_it_stands, found)
        assert len(set(found.losses)) == len(found.losses)
        assert recordings.pop().replays == len(found.losses) - 2


def gone_on() -> None:
    """What is interrupted goes on, recorded or not, from what was recorded or not."""
    recordings = pretend_to_record()
    stop = 4
    for train in (SMALL[0], SMALL[-1]):  # SGD and AdamW
        recorded, plain = (train(THERE, compiled=compiled) for compiled in (True, False))
        kept = {True: recorded.states[stop], False: plain.states[stop]}
        for before in (True, False):
            for after in (True, False):
                recordings.clear()
                found = train(THERE, compiled=after, state=kept[before])
                assert bool(recordings) == after
                whole = recorded if after else plain
                if before == after:
                    assert_same(found.losses, whole.losses[stop:])
                    assert_same(found.weights, whole.weights)
                # A recorded step has its learning rate in float32.
                assert found.losses == pytest.approx(whole.losses[stop:], rel=1e-3)
                assert found.states[2 * stop]["step"] == 2 * stop


def features() -> None:
    """What is computed of images between stages and at the end."""
    ids = torch.arange(300)
    images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = list[list[Tensor]]()
    for device in (HERE, THERE):
        encoder, head = build_encoder("convnet", 1).eval().to(device), ClusterHead(128, 5, 2).eval().to(device)
        moved = images.to(device)
        embedded = embed(encoder, moved, ids.to(device), test_embed.AUGMENTATION, num_strong=2, seed=1)
        predicted = predict(JointModel(encoder, head), moved, test_embed.AUGMENTATION)
        found.append([*embedded, *predicted])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def strangers() -> None:
    """Two devices at once are refused, so that the other checks can fail."""
    here = torch.arange(3.0)
    there = here.to(THERE)
    assert there.device.type == DEVICE
    assert (there[there > 0] * 2).tolist() == [2, 4]
    there[torch.tensor([0])] = 5
    assert there.tolist() == [5, 1, 2]
    for wrong in (lambda: here + there, lambda: here[there > 0], lambda: torch.cat((here, there))):
        try:
            wrong()
        except AssertionError:
            continue
        raise SystemExit("tensors of two devices were not refused")


CHECKS: Sequence[Callable[[], Any]] = (neighbors, contrast, heads, joint, recorded, gone_on, features, strangers)

if __name__ == "__main__":
    with Pretended():
        for name in sys.argv[1:]:
            {one.__name__: one for one in CHECKS}[name]()
