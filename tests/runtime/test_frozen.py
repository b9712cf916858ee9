"""Weights that are given in the place of stage 1, from the file to the embedding and to stage 3."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spice_ray import workflow
from spice_ray.config import ImageRecipe
from spice_ray.core.encoders import LaneBatchNorm2d, build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.errors import ConfigError, StorageError
from spice_ray.readers.parts import PartFormat, read_part
from spice_ray.recipe import check_recipe
from spice_ray.run_folder import RunFolder, read_record
from spice_ray.runtime.frozen import check_given, given_fingerprint, pin_weights
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.inference import EmbedImages, InferenceJob
from spice_ray.runtime.progress import Done, SilentReporter
from spice_ray.runtime.weights import load_encoder, load_joint, read_given, save_weights
from spice_ray.runtime.workers import JointJob, initial_joint, publish_joint
from spice_ray.stages.train_joint import TrainedJoint
from spice_ray.storage import fingerprint, open_artifact, publish
from tests.library_models import classifier_input
from tests.made_shards import SIZE, make_shards
from tests.small_settings import changed

LIBRARY_MODEL = "torchvision/regnet_y_400mf"


def library_net(name: str) -> nn.Module:
    """A library's own model with a classifier of five classes, its batch norms not those of a new one."""
    library, _, model = name.partition("/")
    module = pytest.importorskip(library)
    torch.manual_seed(0)
    made = module.models.get_model(model, num_classes=5) if library == "torchvision" else None
    net: nn.Module = made or module.create_model(model, num_classes=5)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def weights_of(net: nn.Module, folder: Path) -> Path:
    save_weights(net, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of the smallest encoder."""
    return weights_of(build_encoder("convnet", 1), tmp_path)


def recipe(weights: Path, encoder: str = "convnet", **values: Any) -> ImageRecipe:
    settings = changed(
        image__size=SIZE, pretrain__encoder=encoder, pretrain__weights=str(weights), joint__unlabelled_ratio=1, **values
    )
    found = check_recipe(settings)
    assert isinstance(found, ImageRecipe)
    return found


class Watched(SilentReporter):
    """Knows which stages were done."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        self.titles.append(title)
        with super().stage(title, unit) as show:
            yield show


class AboutToMakeError(Exception):
    """A stage was about to be done."""


class Stopping(SilentReporter):
    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        raise AboutToMakeError(title)
        yield


def make_pipeline(weights: Path, folder: Path, encoder: str = "convnet") -> ImagePipeline:
    settings = recipe(weights, encoder)
    prepared = workflow.prepare(settings, str(make_shards(folder / "data", "0a").path), folder / "run")
    assert isinstance(prepared.recipe, ImageRecipe)
    shards = open_artifact(folder / "data", "shards", "0a")
    assert shards is not None
    return ImagePipeline(prepared.run, prepared.recipe, shards, None, Watched())


def test_an_encoder_of_other_colours_is_refused(weights: Path, tmp_path: Path) -> None:
    encoder = make_pipeline(weights, tmp_path).encoder.path
    assert pin_weights(recipe(encoder), tmp_path / "new").pretrain.weights_sha256 is not None
    other = recipe(encoder, image__mean=[0.1, 0.2, 0.3])
    with pytest.raises(
        ConfigError, match=r"was trained on images of image\.mean=\[0\.485, .*\] and here it is \[0\.1, "
    ):
        pin_weights(other, tmp_path / "new")


def test_settings_without_effect_beside_given_weights_do_not_keep_a_run_from_going_on(
    weights: Path, tmp_path: Path
) -> None:
    data = str(make_shards(tmp_path / "data", "0a").path)
    first = workflow.prepare(recipe(weights), data, tmp_path / "run").recipe
    second = workflow.prepare(recipe(weights, pretrain__epochs=9, pretrain__lr=7.0), data, tmp_path / "run").recipe
    assert isinstance(first, ImageRecipe)
    assert isinstance(second, ImageRecipe)
    assert (first.pretrain.epochs, second.pretrain.epochs) == (1, 9)
    with pytest.raises(StorageError, match="seed is 0 there and 3 here"):
        workflow.prepare(recipe(weights, seed=3), data, tmp_path / "run")


@pytest.mark.parametrize("name", [LIBRARY_MODEL, "timm/test_resnet"])
def test_given_weights_are_the_encoder_and_their_file_is_not_needed_any_more(name: str, tmp_path: Path) -> None:
    net = library_net(name)
    weights = weights_of(net, tmp_path)
    pipeline = make_pipeline(weights, tmp_path, name)
    artifact = pipeline.encoder
    assert artifact.manifest["frozen"] is True
    assert artifact.manifest["arch"] == name
    assert artifact.manifest["weights_sha256"] == pipeline.recipe.pretrain.weights_sha256
    weights.unlink()
    part = pipeline.all_shards.files[0]
    table = read_part(tmp_path / "data" / "shards-0a", part, PartFormat(SIZE, "pixels"))
    rows = EmbedImages(InferenceJob(artifact, pipeline.recipe, SIZE, 1, 0))(table)["values"].to_pylist()
    images = torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in table["image"].to_pylist()]).copy())
    settings = pipeline.recipe.image
    mean, std = (torch.tensor(x)[:, None, None] for x in (settings.mean, settings.std))
    expected = classifier_input(net, (images.view(-1, 3, SIZE, SIZE) / 255 - mean) / std)
    width = artifact.manifest["embed_dim"]
    found = torch.from_numpy(np.stack([np.frombuffer(row, np.float32) for row in rows]))[:, width : 2 * width]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert workflow.prepare(recipe(weights, name), str(tmp_path / "data"), tmp_path / "run").recipe == pipeline.recipe
    again = replace(pipeline, reporter=Stopping())
    assert again.encoder == artifact
    assert isinstance(pipeline.reporter, Watched)
    assert pipeline.reporter.titles == ["stage 1: given weights"]


def test_stage_3_begins_with_given_weights_and_its_result_is_built_again(tmp_path: Path) -> None:
    net = library_net(LIBRARY_MODEL)
    pipeline = make_pipeline(weights_of(net, tmp_path), tmp_path, LIBRARY_MODEL)
    width, root = pipeline.encoder.manifest["embed_dim"], pipeline.run.artifacts
    head = ClusterHead(width, 3, 0)

    def write(folder: Path) -> dict[str, Any]:
        save_weights(head, folder / "head-000.safetensors")
        return {"embed_dim": width, "num_clusters": 3, "chosen": 0}

    heads = publish(root, "heads", "0b", write)
    settings = pipeline.recipe
    job = JointJob(
        settings.joint,
        settings.image,
        pipeline.train_shards,
        0,
        3,
        settings.pretrain.encoder,
        pipeline.encoder,
        heads,
        None,
        heads,
        root,
        "0c",
    )
    model = initial_joint(job)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, LaneBatchNorm2d) for norm in norms)
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(model.eval()(images), head(classifier_input(net, images)), rtol=1e-4, atol=1e-4)
    again = load_joint(publish_joint(job, TrainedJoint(model, 0), skipped=None)).eval()
    assert torch.equal(again(images), model(images))


def test_an_embedding_by_given_weights_is_named_by_its_images_too(weights: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline(weights, tmp_path)
    image = pipeline.recipe.image.model_dump(mode="json")
    settings = {"views": 4, "image": image, "seed": 0, "damaged": []}
    name = fingerprint("embedding", settings, [pipeline.encoder.fingerprint, "0a"])
    made = publish(pipeline.run.artifacts, "embedding", name, lambda folder: {})
    assert replace(pipeline, reporter=Stopping()).embedding == made
    others = replace(pipeline, shards_artifact=make_shards(tmp_path / "others", "0d"), reporter=Stopping())
    assert others.encoder == pipeline.encoder
    with pytest.raises(AboutToMakeError, match="frozen embedding"):
        _ = others.embedding


def test_an_encoder_is_named_by_what_its_weights_hold_and_by_nothing_of_stage_1(weights: Path, tmp_path: Path) -> None:
    def named(file: Path, **values: Any) -> str:
        return given_fingerprint(pin_weights(recipe(file, **values), tmp_path / "run"))

    copied = Path(shutil.copy(weights, tmp_path / "copy.bin"))
    name = named(weights)
    same = {"pretrain__epochs": 7, "pretrain__lr": 3, "pretrain__batch_size": 64, "seed": 5, "protocol": "split"}
    assert named(copied, **same) == name
    assert named(weights, image__mean=[0.5, 0.5, 0.5]) != name
    assert named(weights, encoder="torchvision/resnet18") != name
    save_file({"fc.weight": torch.zeros(1)}, copied)
    assert named(copied) != name


def test_a_run_goes_on_with_the_same_weights_wherever_they_lie(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = str(make_shards(tmp_path / "data", "0a").path), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    first = workflow.prepare(recipe(Path("weights.safetensors")), data, out)
    held = read_record(out)["recipe"]["pretrain"]
    assert (held["weights"], len(held["weights_sha256"])) == (str(weights), 64)
    moved = weights.rename(tmp_path / "moved.safetensors")
    second = workflow.prepare(recipe(moved), data, out)
    assert isinstance(first.recipe, ImageRecipe)
    assert isinstance(second.recipe, ImageRecipe)
    assert second.recipe.pretrain.weights_sha256 == first.recipe.pretrain.weights_sha256
    with pytest.raises(ConfigError, match=r"weights\.safetensors is not there any more; put it back"):
        workflow.prepare(recipe(weights), data, out)  # its copy was not made yet
    with pytest.raises(ConfigError, match=r"other\.pth does not exist; give a local file"):
        workflow.prepare(recipe(tmp_path / "other.pth"), data, out)
    state = read_given(moved)
    save_file({**state, "trunk.0.weight": (state["trunk.0.weight"] + 1).contiguous()}, moved)
    with pytest.raises(StorageError, match=r"pretrain\.weights_sha256 is \w+ there and \w+ here"):
        workflow.prepare(recipe(moved), data, out)
    with pytest.raises(ConfigError, match=r"has the SHA-256 \w+ and not pretrain\.weights_sha256=\w+; give the file"):
        workflow.prepare(second.recipe, data, tmp_path / "new")


def test_another_runs_encoder_is_taken_by_its_folder(tmp_path: Path) -> None:
    given = build_encoder("convnet", 1)

    def write(folder: Path) -> dict[str, Any]:
        save_weights(given, folder / "encoder.safetensors")
        image = check_recipe(changed(image__size=SIZE)).model_dump(mode="json")["image"]
        return {"arch": "convnet", "embed_dim": 128, "image": image}

    folder = publish(tmp_path / "before", "encoder", "0a", write).path
    shards = make_shards(tmp_path / "data", "0a")
    pinned = pin_weights(recipe(folder), tmp_path / "run")
    run = RunFolder(tmp_path / "run", tmp_path / "run" / "artifacts")
    found = load_encoder(ImagePipeline(run, pinned, shards, None, Watched()).encoder)
    assert all(torch.equal(value, given.state_dict()[key]) for key, value in found.state_dict().items())
    with pytest.raises(ConfigError, match=r"is an encoder convnet and pretrain\.encoder=wrn28_2; set .*=convnet"):
        pin_weights(recipe(folder, "wrn28_2"), tmp_path / "run")
    with pytest.raises(ConfigError, match="is a folder and not a finished encoder of a run"):
        pin_weights(recipe(shards.path), tmp_path / "run")


def test_stage_3_does_not_train_batch_norms_that_lanes_cannot_keep_apart(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    trained = pin_weights(recipe(file, "timm/test_efficientnet"), tmp_path / "run")
    for _ in range(2):  # the second time there is a finished copy
        with pytest.raises(
            ConfigError, match=r"joint\.init=stage2 would train .* set joint\.init=scratch and joint\.enc"
        ):
            check_given(trained, tmp_path / "artifacts")
        shards = make_shards(tmp_path / "data", "0a")
        pipeline = ImagePipeline(RunFolder(tmp_path, tmp_path / "artifacts"), trained, shards, None, Watched())
        assert pipeline.encoder.manifest["other_batch_norms"] > 0
    scratch = recipe(file, "timm/test_efficientnet", joint__init="scratch", joint__encoder="resnet18")
    check_given(pin_weights(scratch, tmp_path / "run"), tmp_path / "artifacts")
