"""Views are a function of (image, draw, key) alone: of no batch, thread or worker, and new for all they count by."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from spice_ray.core import augment, image_ops, order
from spice_ray.core.augment import Augmentation
from tests.core.photos import photos

KEY = order.stream_key(0, "test", 0)
MANY = torch.arange(20_000)
VIEWS = [(family, view) for family in ("natural", "digits", "none") for view in ("contrastive", "weak", "strong")]


def augmentation(family: str = "natural") -> Augmentation:
    return Augmentation(family, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.mark.parametrize("side", [16, 40])
@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_the_accelerators_way_of_replacing_rows_gives_the_same_view(
    family: str, view: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, draws = photos(24, side), torch.arange(24)
    expected = getattr(augmentation(family), view)(images, draws, KEY)
    monkeypatch.setattr(image_ops, "_replace_chosen", image_ops._replace_all)
    assert torch.equal(getattr(augmentation(family), view)(images, draws, KEY), expected)


@pytest.mark.parametrize("side", [9, 28, 40])
@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_a_row_depends_on_its_own_image_and_draw_to_the_bit(family, view, side):
    make = getattr(augmentation(family), view)
    images, draws = photos(23, side), torch.arange(23) * 1000 + 2**40
    whole = make(images, draws, KEY)
    alone = torch.cat([make(images[i : i + 1], draws[i : i + 1], KEY) for i in range(23)])
    sevens = torch.cat([make(images[i : i + 7], draws[i : i + 7], KEY) for i in range(0, 23, 7)])
    shuffle = torch.from_numpy(order.permutation(1, 23))
    workers = [make(images[worker::3], draws[worker::3], KEY) for worker in range(3)]
    assert torch.equal(whole, alone)
    assert torch.equal(whole, sevens)
    assert all(torch.equal(whole[worker::3], rows) for worker, rows in enumerate(workers))
    assert torch.equal(whole[shuffle], make(images[shuffle], draws[shuffle], KEY))


@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_a_batch_that_passes_in_several_parts_gives_what_its_halves_give(family, view):
    make, images, draws = getattr(augmentation(family), view), photos(350, 40), torch.arange(350)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert images.numel() > augment._LEVELS > augment._FEW_STEPS > augment._MANY_STEPS
    halves = torch.cat([make(images[:171], draws[:171], KEY), make(images[171:], draws[171:], KEY)])
    assert torch.equal(make(images, draws, KEY), halves)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("count", "side"), [(70, 50), (1, 230)])
@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_the_number_of_threads_changes_no_bit(family, view, count, side):
    make, images = getattr(augmentation(family), view), photos(count, side)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 3, 8):
        torch.set_num_threads(number)
        results.append(make(images, torch.arange(count) + 3, KEY))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("family", "view"), VIEWS)
@pytest.mark.parametrize("fill", [0, 255, None])
def test_views_are_finite_contiguous_float32_and_leave_their_image_alone(family, view, fill):
    images = photos(40, 33) if fill is None else torch.full((40, 3, 33, 33), fill, dtype=torch.uint8)
    before = images.clone()
    result = getattr(augmentation(family), view)(images, torch.arange(40), KEY)
    assert torch.equal(images, before)
    assert result.dtype == torch.float32
    assert result.shape == images.shape
    assert result.is_contiguous()
    assert result.isfinite().all()
    assert result.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_a_model_can_be_trained_on_views(family, view):
    images, weights = photos(4, 16), torch.ones(3, 16, 16, requires_grad=True)
    views = getattr(augmentation(family), view)(images, torch.arange(4), KEY)
    (views * weights).sum().backward()
    assert torch.equal(weights.grad, views.sum(0))


@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_no_images_give_no_views(family, view):
    nothing = torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    assert getattr(augmentation(family), view)(nothing, torch.empty(0, dtype=torch.int64), KEY).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("family", "view"), [pair for pair in VIEWS if pair[0] != "none"])
def test_another_draw_or_another_key_gives_another_view(family, view):
    make, images = getattr(augmentation(family), view), photos(1, 32).expand(30, -1, -1, -1)
    first = make(images, torch.arange(30), KEY)
    assert len({row.numpy().tobytes() for row in first}) >= 25  # of the 162 weak ones some come twice
    other = make(images, torch.arange(30), order.stream_key(0, "test", 1))
    assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) <= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize(("family", "view"), VIEWS)
def test_the_accelerator_gives_the_same_views(family, view, side):
    make, images, draws = getattr(augmentation(family), view), photos(200, side), torch.arange(200)
    difference = (make(images.cuda(), draws.cuda(), KEY).cpu() - make(images, draws, KEY)).abs()
    # A coordinate or a level that lies on an edge may fall to either side.
    assert (difference > 1e-4).float().mean() < 2e-3


# What the random numbers are counted by


def parameters(draws: Tensor, key: int) -> dict[str, Tensor]:
    """Every parameter of a natural image's views, one number per row each."""
    area, ratio = augment.crop_boxes(draws, key, 0.2)[:, 2:].log().unbind(1)
    brightness, contrast, saturation, hue = augment.jitter_factors(draws, key).unbind(1)
    (operation, strength), shifts = augment.drawn_operations(draws, key), augment.crop_shifts(draws, key, 4)
    top, left, hole = augment.cutout_boxes(draws, key, 32).unbind(1)
    coins = {name: augment.coin(draws, key, name, share) for name, share in (("flip", 0.5), ("grey", 0.2))}
    singles = (area + ratio, area - ratio, brightness, contrast, saturation, hue, augment.blur_sigmas(draws, key, 0.5))
    singles += (shifts[:, 0], shifts[:, 1], hole, top + hole // 2, left + hole // 2)
    slots = {f"operation {k}": operation[:, k] for k in range(4)} | {f"strength {k}": strength[:, k] for k in range(4)}
    return coins | {f"single {k}": values for k, values in enumerate(singles)} | slots


def test_the_parameters_of_one_row_are_uncorrelated():
    table = np.array([values.double().numpy() for values in parameters(MANY, KEY).values()])
    found = stats.spearmanr(table, axis=1)
    pairs = np.triu_indices(len(table), 1)
    # The four factors of a jitter share whether it happens at all, which leaves ranks uncorrelated.
    assert len(pairs[0]) == 231
    assert found.pvalue[pairs].min() > 1e-3 / len(pairs[0])
    assert stats.kstest(found.pvalue[pairs], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("other", ["seed", "stream", "view", "next draw", "draw far away"])
def test_seed_stream_view_and_draw_each_make_the_parameters_new(other):
    key = {
        "seed": order.stream_key(1, "test", 0),
        "stream": order.stream_key(0, "other", 0),
        "view": order.stream_key(0, "test", 1),
    }.get(other, KEY)
    draws = MANY + {"next draw": 1, "draw far away": 1 << 40}.get(other, 0)
    before, after = parameters(MANY, KEY), parameters(draws, key)
    found = [stats.spearmanr(before[name].double(), after[name].double()).pvalue for name in before]
    assert min(found) > 1e-3 / len(found)
