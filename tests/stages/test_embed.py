"""Embedding: a row belongs to its image and its sample id, whoever encodes it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import build_encoder
from spice_ray.core.order import stream_key
from spice_ray.stages.embed import ROWS_AT_ONCE, Embedded, embed

AUGMENTATION = Augmentation("natural", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
COUNT, SEED = ROWS_AT_ONCE + 44, 3


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(images: Tensor, ids: Tensor, *, num_strong: int = 2, seed: int = SEED) -> Embedded:
    encoder = build_encoder("convnet", 1).eval()
    return embed(encoder, images, ids, AUGMENTATION, num_strong=num_strong, seed=seed)


@pytest.fixture(scope="module")
def whole(images) -> Embedded:
    return make(images, torch.arange(COUNT))


def rows_of(embedded: Embedded, rows: Tensor) -> Embedded:
    return Embedded(*(array[..., rows, :] for array in embedded))


def assert_close(one: Embedded, other: Embedded) -> None:
    for name, a, b in zip(Embedded._fields, one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_features_are_float32_on_the_cpu_with_one_row_per_image(whole):
    assert [tuple(array.shape) for array in whole] == [(COUNT, 128)] * 3 + [(2, COUNT, 128)]
    assert all(array.dtype == torch.float32 and array.device.type == "cpu" for array in whole)
    assert not any(array.requires_grad for array in whole)


def test_each_feature_is_the_pooled_feature_of_its_view(images, whole):
    encoder, ids = build_encoder("convnet", 1).eval(), torch.arange(COUNT)
    views = {
        "plain": AUGMENTATION.plain(images),
        "weak": AUGMENTATION.weak(images, ids, stream_key(SEED, "heads", "weak")),
        "first": AUGMENTATION.strong(images, ids, stream_key(SEED, "heads", "strong", 0)),
        "second": AUGMENTATION.strong(images, ids, stream_key(SEED, "heads", "strong", 1)),
    }
    with torch.no_grad():
        pooled = {name: encoder(view)[1] for name, view in views.items()}
    expected = Embedded(
        F.normalize(pooled["plain"], dim=1),
        pooled["plain"],
        pooled["weak"],
        torch.stack([pooled["first"], pooled["second"]]),
    )
    assert_close(whole, expected)


def test_embeddings_are_unit_rows(whole):
    torch.testing.assert_close(whole.embedding.norm(dim=1), torch.ones(COUNT))


def test_files_cut_at_the_rows_at_once_change_no_bit(images, whole):
    ids = torch.arange(COUNT)
    parts = [make(images[rows], ids[rows]) for rows in (slice(0, ROWS_AT_ONCE), slice(ROWS_AT_ONCE, COUNT))]
    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(array, torch.cat(pieces, dim=-2))


def test_files_cut_anywhere_give_the_same_rows(images, whole):
    rows = torch.arange(100, 131)
    assert_close(make(images[rows], rows), rows_of(whole, rows))


def test_rows_in_another_order_give_the_same_features(images, whole):
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))[:50]
    assert_close(make(images[rows], rows), rows_of(whole, rows))


def test_random_views_are_counted_by_sample_id_and_the_plain_view_is_not(images, whole):
    rows = torch.arange(40)
    moved = make(images[rows], rows + 1000)
    assert_close(Embedded(*moved[:2], *whole[2:]), Embedded(*(array[..., rows, :] for array in whole[:2]), *whole[2:]))
    for name in ("weak", "strong"):
        difference = getattr(moved, name) - getattr(whole, name)[..., rows, :]
        assert (difference.abs().amax(dim=-1) > 1e-4).float().mean() > 0.9


def test_strong_views_differ_and_the_first_ones_do_not_depend_on_their_number(images, whole):
    rows = torch.arange(40)
    more = make(images[rows], rows, num_strong=3)
    torch.testing.assert_close(more.strong[:2], whole.strong[:, rows], rtol=1e-4, atol=1e-5)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert ((more.strong[one] - more.strong[other]).abs().amax(dim=1) > 1e-4).float().mean() > 0.9


def test_another_seed_gives_other_views_of_the_same_images(images, whole):
    rows = torch.arange(40)
    other = make(images[rows], rows, seed=SEED + 1)
    torch.testing.assert_close(other.plain, whole.plain[rows], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other.weak, whole.weak[rows], atol=1e-3)
    assert not torch.allclose(other.strong, whole.strong[:, rows], atol=1e-3)


def test_embedding_changes_neither_encoder_nor_images(images):
    encoder = build_encoder("convnet", 1).eval()
    state, before = {name: value.clone() for name, value in encoder.state_dict().items()}, images.clone()
    embed(encoder, images[:20], torch.arange(20), AUGMENTATION, num_strong=1, seed=SEED)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(images, before)
