"""What a recipe asks of the number of images."""

from spice_ray.config import ImageRecipe, Recipe
from spice_ray.errors import ConfigError
from spice_ray.settings import Pretrain, Reliable


def num_neighbors(reliable: Reliable, num_images: int, num_clusters: int) -> int | None:
    """Ns: the recipe's, or N / (6 K) clamped to [10, 100]; never more than there are other images.

    None where each cluster has its own.
    """
    if isinstance(reliable.neighbors, str):
        return None
    wanted = reliable.neighbors or min(100, max(10, round(num_images / (6 * num_clusters))))
    return min(wanted, num_images - 1)


def num_views(views: int, num_images: int, num_clusters: int) -> int:
    """How many of the nearest neighbours that are views of an embedding heads learn from: at most N / (4 K).

    In a small cluster the neighbours farther off belong to other clusters.
    """
    return min(views, max(1, num_images // (4 * num_clusters)))


def check_count(recipe: Recipe, num_images: int, num_train: int) -> None:
    """Refuse a recipe that does not fit the number of images.

    Args:
        recipe: The run's.
        num_images: Those that stage 1 sees.
        num_train: Those that stages 2 and 3 see.

    Raises:
        ConfigError: There is no image to train on, or K, a batch or the queue is larger than the data.
    """
    _check_num_clusters(recipe, num_train)
    if isinstance(recipe, ImageRecipe):
        _check_batches(recipe, num_images, num_train)


def _check_num_clusters(recipe: Recipe, num_train: int) -> None:
    if num_train == 0:
        advice = "name their folder or file otherwise" if recipe.protocol == "whole" else "use protocol=whole"
        raise ConfigError(
            f"protocol={recipe.protocol} needs images of a train split and there are none, only of test or unlabeled; "
            f"{advice}"
        )
    if (recipe.min_clusters or recipe.num_clusters) > num_train:
        raise ConfigError(
            f"num_clusters={recipe.asked_clusters} is more than the {num_train} images there are to cluster; "
            "lower num_clusters or add images"
        )


def _check_batches(recipe: ImageRecipe, num_images: int, num_train: int) -> None:
    if recipe.pretrain.weights is None and not recipe.is_supervised:
        _check_queue(recipe.pretrain, num_images)
    batch = recipe.joint.labelled_batch * recipe.joint.unlabelled_ratio
    if batch > num_train:
        raise ConfigError(
            f"joint.labelled_batch times joint.unlabelled_ratio={batch} is more than the {num_train} images there are; "
            "lower one of them, or add images"
        )


def _check_queue(pretrain: Pretrain, num_images: int) -> None:
    if pretrain.batch_size > num_images:
        raise ConfigError(
            f"pretrain.batch_size={pretrain.batch_size} is more than the {num_images} images there are; lower "
            "pretrain.batch_size and pretrain.queue_size, or add images"
        )
    if pretrain.loss == "moco" and (pretrain.queue_size or 0) > num_images // 4:
        largest = num_images // 4 // pretrain.keys_per_step * pretrain.keys_per_step
        advice = f"use {largest}" if largest else "lower pretrain.batch_size and pretrain.queue_size"
        raise ConfigError(
            f"pretrain.queue_size={pretrain.queue_size} is more than a quarter of the {num_images} images, "
            f"so keys would meet their own image among the negatives; {advice}"
        )
