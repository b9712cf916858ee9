from typing import Any

import pytest

from spice_ray.config import ImageRecipe
from spice_ray.errors import ConfigError
from spice_ray.image_counts import check_count, num_neighbors, num_views
from spice_ray.recipe import check_recipe
from spice_ray.settings import Reliable
from tests.small_settings import changed, error_of, small_recipe


def test_a_minimal_recipe_takes_the_documented_defaults() -> None:
    recipe = check_recipe(small_recipe())
    assert (recipe.seed, recipe.protocol, recipe.heads.count, recipe.reliable.neighbors) == (0, "whole", 10, None)
    assert (recipe.heads.confident_fraction, recipe.heads.loss) == (0.5, "double_softmax")
    assert recipe.scale.workers == 1


@pytest.mark.parametrize(
    ("lanes", "accumulate", "counts"),
    [((4, 4), 1, [1, 2, 4]), ((4, 4), 2, [1, 2]), ((4, 4), 4, [1]), ((4, 1), 1, [1]), ((6, 12), 1, [1, 2, 3, 6])],
)
def test_auto_workers_are_as_many_as_share_the_lanes_of_both_stages(
    lanes: tuple[int, int], accumulate: int, counts: list[int]
) -> None:
    batches = {"pretrain__batch_size": 48, "pretrain__queue_size": 96, "joint__labelled_batch": 48}
    settings = {"pretrain__lanes": lanes[0], "joint__lanes": lanes[1], **batches}
    recipe = check_recipe(changed(**settings, scale__workers="auto", scale__accumulate=accumulate))
    assert isinstance(recipe, ImageRecipe)
    assert recipe.worker_counts == counts
    fixed = check_recipe(changed(**settings))
    assert isinstance(fixed, ImageRecipe)
    assert fixed.worker_counts == [1]


def test_embeddings_begin_with_k_means_and_images_may_not() -> None:
    given = {name: small_recipe()[name] for name in ("num_clusters", "heads", "reliable")}
    heads = check_recipe({**given, "heads": {**given["heads"], "start": "kmeans", "views": 0}}).heads
    assert (heads.start, heads.views) == ("kmeans", 0)
    assert "kmean'" in error_of({**given, "heads": {**given["heads"], "start": "kmean"}})
    assert error_of(changed(heads__start="kmeans")) == (
        "heads.start=kmeans is for embeddings that are given, and this recipe is one of images; use heads.start=random"
    )


def test_settings_cannot_be_changed_after_checking() -> None:
    recipe = check_recipe(small_recipe())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_clusters", 1),
        ("num_clusters", "many"),
        ("seed", -1),
        ("seed", 2**32),
        ("protocol", "both"),
        ("image__size", 7),
        ("image__std", [1, 1, 0]),
        ("image__mean", [0.5, 0.5]),
        ("pretrain__temperature", 0),
        ("pretrain__temperature", float("nan")),
        ("pretrain__lr", float("inf")),
        ("pretrain__momentum", 1),
        ("pretrain__encoder", "resnet1"),
        ("heads__confident_fraction", 0),
        ("heads__confident_fraction", 1.01),
        ("reliable__min_consistency", 1),
        ("reliable__min_consistency", -0.1),
        ("reliable__min_confidence", 1),
        ("reliable__neighbors", 0),
        ("joint__confidence", 1),
        ("joint__ema", 1),
        ("scale__workers", 0),
        ("scale__checkpoint_seconds", 0),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(setting: str, value: Any) -> None:
    message = error_of(changed(**{setting: value}))
    assert setting.replace("__", ".") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_clusters", 2),
        ("seed", 2**32 - 1),
        ("image__size", 8),
        ("pretrain__momentum", 0),
        ("heads__confident_fraction", 1),
        ("heads__round_size", 3),
        ("reliable__min_consistency", 0),
        ("reliable__neighbors", 1),
        ("scale__workers", 4),
    ],
)
def test_the_last_value_of_a_range_is_accepted(setting: str, value: Any) -> None:
    section, _, name = setting.rpartition("__")
    dumped = check_recipe(changed(**{setting: value})).model_dump()
    assert (dumped[section][name] if section else dumped[name]) == value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pretrain__batch_size": 30}, "pretrain.lanes=4 does not divide pretrain.batch_size=30; use "
                                       "pretrain.batch_size=28 or 32"),
        ({"pretrain__queue_size": 70}, "pretrain.batch_size=32 does not divide pretrain.queue_size=70; use "
                                       "pretrain.queue_size=64 or 96"),
        ({"pretrain__queue_size": 10}, "use pretrain.queue_size=32"),
        ({"joint__labelled_batch": 6}, "use joint.labelled_batch=4 or 8"),
        ({"scale__workers": 3}, "scale.workers=3 does not divide pretrain.lanes=4"),
        ({"scale__workers": 64}, "use scale.workers=4 or a divisor of it"),
        ({"scale__workers": "all"}, "scale.workers=all cannot be used; give a whole number of at least 1, or auto"),
        ({"scale__workers": True}, "workers=true is a truth value"),
        ({"scale__workers": "auto", "scale__accumulate": 3}, "use scale.accumulate=4 or a divisor of it"),
        ({"joint__lanes": 1, "scale__workers": 2}, "scale.workers=2 does not divide joint.lanes=1"),
        ({"pretrain__batch_size": 4, "pretrain__queue_size": 4}, "leaves fewer than 2 rows"),
        ({"heads__round_size": 2}, "heads.round_size=2 is smaller than num_clusters=3"),
        ({"heads__round_size": 30, "num_clusters": "auto"}, "heads.round_size=30 is smaller than num_clusters=2-50; "),
        ({"min_clusters": 3}, "min_clusters=3 is not below num_clusters=3; write both as one range, such as"),
        ({"joint__encoder": "wrn28_2"}, "joint.encoder=wrn28_2 needs joint.init=scratch"),
        ({"pretrain__encoder": "timm/vit_tiny"}, "pretrain.encoder=timm/vit_tiny needs pretrain.weights, a local file"),
        ({"pretrain__encoder": "timm/vit_tiny", "pretrain__weights": "a.pth", "joint__init": "scratch"},
         "joint.init=scratch needs joint.encoder, such as resnet18, where pretrain.encoder=timm/vit_tiny"),
        ({"pretrain__encoder": "resnet18_smal"}, "unknown pretrain.encoder='resnet18_smal'; did you mean "
                                                 "'resnet18_small'? (and torchvision/NAME or timm/NAME"),
        ({"pretrain__encoder": "timm/hf-hub:timm/resnet18", "pretrain__weights": "a.pth"}, "unknown pretrain.encoder="),
        ({"pretrain__encoder": "keras/resnet50", "pretrain__weights": "a.pth"}, "unknown pretrain.encoder="),
        ({"pretrain__weights_sha256": "0" * 64}, "pretrain.weights_sha256 is of no use without pretrain.weights"),
        ({"pretrain__weights_sha256": "0" * 63, "pretrain__weights": "a.pth"}, "pretrain.weights_sha256='000"),
        ({"pretrain__weights": ""}, "pretrain.weights='' cannot be used"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_each_other_are_refused_with_both_numbers(
    values: dict[str, Any], expected: str
) -> None:
    assert expected in error_of(changed(**values))


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("auto", 2, 50), ("8-12", 8, 12), ("2-3", 2, 3), ("7", None, 7), (7, None, 7)]
)
def test_the_number_of_clusters_is_given_or_a_range_or_left_open(asked: Any, least: int | None, most: int) -> None:
    recipe = check_recipe(changed(num_clusters=asked))
    assert (recipe.min_clusters, recipe.num_clusters) == (least, most)
    assert recipe.asked_clusters == (f"{least}-{most}" if least else str(most))
    assert check_recipe(recipe.model_dump(mode="json")) == recipe


_NO_NUMBERS = ["many", "1-5", "8-8", "12-8", "2-", "-5", "8-12-16", "1e1", [8, 12], "9" * 30 + "-5"]


@pytest.mark.parametrize("asked", _NO_NUMBERS)
def test_what_is_no_number_of_clusters_is_refused_with_what_is_one(asked: Any) -> None:
    assert error_of(changed(num_clusters=asked)) == (
        f"num_clusters={asked} cannot be used; give a whole number of at least 2, a range such as 8-12, or auto"
    )


def test_a_range_fits_data_of_at_least_as_many_images_as_its_least() -> None:
    recipe = check_recipe(changed(num_clusters="60-99"))
    check_count(recipe, num_images=256, num_train=60)
    with pytest.raises(ConfigError, match="num_clusters=60-99 is more than the 59 images"):
        check_count(recipe, num_images=256, num_train=59)


def test_another_encoder_for_stage_3_is_accepted_from_scratch() -> None:
    recipe = check_recipe(changed(joint__encoder="wrn28_2", joint__init="scratch"))
    assert recipe.joint.encoder == "wrn28_2"


@pytest.mark.parametrize("name", ["convnet", "torchvision/vit_b_16", "timm/vit_small_patch14_dinov2.lvd142m"])
def test_where_weights_are_given_nothing_of_stage_1_is_held_against_the_images(name: str) -> None:
    unused = {"pretrain__lanes": 3, "pretrain__batch_size": 1000, "pretrain__queue_size": 1500}
    recipe = check_recipe(changed(pretrain__encoder=name, pretrain__weights="a.pth", scale__workers=4, **unused))
    check_count(recipe, num_images=56, num_train=56)
    with pytest.raises(ConfigError, match="=56 is more than the 55"):
        check_count(recipe, num_images=55, num_train=55)


@pytest.mark.parametrize(
    ("neighbors", "num_images", "num_clusters", "expected"),
    [
        (None, 1797, 10, 30),
        (None, 60_000, 10, 100),
        (None, 300, 10, 10),
        (None, 5, 2, 4),
        (7, 1797, 10, 7),
        (100, 50, 2, 49),
        (1, 50, 2, 1),
    ],
)
def test_the_number_of_neighbors_follows_the_data_within_10_and_100(
    neighbors: int | None, num_images: int, num_clusters: int, expected: int
) -> None:
    reliable = Reliable(neighbors=neighbors, min_consistency=0.9)
    assert num_neighbors(reliable, num_images, num_clusters) == expected


def test_a_recipe_fits_data_of_exactly_its_size_and_none_smaller() -> None:
    recipe = check_recipe(small_recipe())  # largest batch 8 * 7 = 56, queue 64 of at least 256 images
    check_count(recipe, num_images=256, num_train=56)
    with pytest.raises(ConfigError, match=r"queue_size=64 .* 255 images.* use 32"):
        check_count(recipe, num_images=255, num_train=56)
    with pytest.raises(ConfigError, match="=56 is more than the 55"):
        check_count(recipe, num_images=256, num_train=55)
    with pytest.raises(ConfigError, match="num_clusters=3 is more than the 2 images"):
        check_count(recipe, num_images=2, num_train=2)
    with pytest.raises(ConfigError, match="needs images of a train split"):
        check_count(recipe, num_images=0, num_train=0)


def test_the_queue_that_is_advised_is_one_that_a_symmetric_loss_accepts() -> None:
    recipe = check_recipe(changed(pretrain__symmetric=True, pretrain__queue_size=128))
    with pytest.raises(ConfigError, match=r"use 64$"):
        check_count(recipe, num_images=4 * 127, num_train=500)
    check_recipe(changed(pretrain__symmetric=True, pretrain__queue_size=64))


@pytest.mark.parametrize(("loss", "needed"), [("moco", "queue_size"), ("byol", "momentum"), ("simclr", "temperature")])
def test_each_contrastive_loss_says_what_it_needs(loss: str, needed: str) -> None:
    values = changed(pretrain__loss=loss)
    del values["pretrain"][needed]
    assert error_of(values) == f"pretrain.loss={loss} needs pretrain.{needed}, which is not given"


def test_losses_without_a_queue_need_none() -> None:
    values = changed(pretrain__loss="byol")
    del values["pretrain"]["queue_size"], values["pretrain"]["temperature"]
    recipe = check_recipe(values)
    check_count(recipe, 64, 64)


def test_parts_of_a_batch_are_whole_lanes() -> None:
    assert check_recipe(changed(scale__accumulate=4)).scale.accumulate == 4
    assert check_recipe(changed(scale__accumulate=2, scale__workers=2)).scale.accumulate == 2
    assert error_of(changed(scale__accumulate=4, scale__workers=2)) == (
        "scale.accumulate=4 does not divide the 2 lanes that each worker has of pretrain.lanes=4, and a part is whole "
        "lanes; use scale.accumulate=2 or a divisor of it"
    )


def test_workers_are_refused_before_the_parts_of_their_lanes() -> None:
    refused = error_of(changed(pretrain__lanes=8, scale__workers=8, scale__accumulate=2))
    assert refused.startswith("scale.workers=8 does not divide joint.lanes=4")
    assert refused.endswith("use scale.workers=4 or a divisor of it, or more lanes")


def test_a_prior_needs_one_number_of_clusters() -> None:
    assert error_of(changed(num_clusters="2-4", heads__prior=[0.5, 0.5])) == (
        "heads.prior has a share for each cluster and num_clusters=2-4 leaves their number open; give one number, or "
        "heads.prior=estimate"
    )
    assert check_recipe(changed(num_clusters="2-4", heads__prior="estimate")).heads.prior == "estimate"


def test_heads_learn_from_at_most_a_quarter_of_an_average_cluster() -> None:
    assert [num_views(10, n, 10) for n in (10, 40, 79, 80, 400, 4000)] == [1, 1, 1, 2, 10, 10]
    assert num_views(0, 4000, 10) == 0


def test_labels_that_nobody_would_learn_from_are_refused() -> None:
    refused = error_of(changed(reliable__labels="known.parquet", joint__steps=0))
    assert refused == "joint.steps=0 leaves stage 3 out, which learns from reliable.labels; give steps, or no labels"
    assert error_of(changed(joint__steps=-1)).startswith("joint.steps=-1")
