"""Refusals by the real command: one sentence, exit code 2, nothing changed, and neither torch nor Ray imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spice_ray.recipe import load_recipe
from spice_ray.run_folder import claim
from spice_ray.storage import publish

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
RUN = ["run", "digits", "--data", "digits", "--out", "{here}/new"]
LANES = ["pretrain.lanes=64", "joint.lanes=64", "joint.labelled_batch=64", "joint.unlabelled_ratio=1"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "spice_ray", *args]


def run_on(data: str, *overrides: str) -> list[str]:
    return ["run", "digits", "--data", data, "--out", "{here}/new", *overrides]


def run_into(out: str, *overrides: str) -> list[str]:
    return ["run", "digits", "--data", "digits", "--out", out, *overrides]


def embed(data: str, *more: str) -> list[str]:
    return ["run", "embeddings", "--data", data, "--out", "{here}/new", *more]


def predict(run: str, *more: str) -> list[str]:
    return ["predict", run, "--data", "digits", "--out", "{here}/new", *more]


def tune(sweep: str, *more: str) -> list[str]:
    return ["tune", sweep, "--data", "digits", "--out", "{here}/new", *more]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Sources, recipes, sweeps and run folders of every kind that is refused."""
    for name in ("empty", "texts", "photos", "foreign", "damaged", "labelled"):
        (tmp_path / name).mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"not decoded before Ray starts")
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "damaged" / "run.json").write_text('{"recipe": ')
    pq.write_table(pa.table({"image": pa.array([b"x"] * 5, pa.binary())}), tmp_path / "five.parquet")
    pq.write_table(pa.table({"text": ["x"], "number": [1]}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"image": pa.array([b"x"]), "label": [[1, 2]]}), tmp_path / "lists.parquet")
    (tmp_path / "half.parquet").write_bytes((tmp_path / "five.parquet").read_bytes()[:50])
    np.save(tmp_path / "vectors.npy", np.ones((99, 4), np.float32))
    publish(tmp_path / "embedded", "shards", "a", lambda folder: {"embed_dim": 4, "stored": "vectors", "splits": {}})
    for root, rows, size, split in (("few", 9, 16, "train"), ("large", 999, 32, "train"), ("test", 999, 16, "test")):
        shards(tmp_path / root, "a", rows, size, split)
    shards(tmp_path / "two", "a", 999, 16, "train")
    shards(tmp_path / "two", "b", 999, 16, "train")
    claim(tmp_path / "held", load_recipe("digits", ["heads.count=5"]), {"path": "digits", "digest": "x"})
    claim(tmp_path / "started", load_recipe("digits", []), digits_identity())
    write_settings(tmp_path)
    return tmp_path


def shards(root: Path, name: str, rows: int, size: int, split: str) -> None:
    record = {"num_images": rows, "image_size": size, "stored": "pixels", "splits": {split: rows}, "files": []}
    publish(root, "shards", name, lambda folder: record)


def digits_identity() -> dict[str, str]:
    from spice_ray.readers.digits import DigitsSource

    return {"path": "digits", "digest": f"digits-{DigitsSource().listing_digest()}"}


def write_settings(folder: Path) -> None:
    (folder / "malformed.yaml").write_text("heads: [1\n")
    (folder / "section.yaml").write_text("heads: 3\n")
    sweeps = {
        "typo": {"space": {"joint.confidnce": [0.9]}},
        "none": {"space": {"joint.confidence": []}},
        "shared": {"space": {"num_clusters": [9, 10]}},
        "large": {"space": {"joint.confidence": [0.5]}, "trial": {"scale.cpus_per_worker": 1000}},
        "range": {"space": {"joint.confidence": [0.5, 1.5]}},
        "random": {"space": {"joint.confidence": [0.5]}, "search": "random"},
        "recipe": {"space": {"joint.confidence": [0.5]}, "recipe": "digitz"},
        "good": {"space": {"joint.confidence": [0.5]}},
    }
    for name, values in sweeps.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"recipe": "digits", **values}))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


REFUSED = {
    # The images.
    "missing path": (run_on("{here}/nowhere"), "{here}/nowhere does not exist; give a folder of images"),
    "empty folder": (run_on("{here}/empty"), "the folder {here}/empty is empty; give"),
    "no image": (run_on("{here}/texts"), "{here}/texts holds no image, only 1 other files; give"),
    "other file": (run_on("{here}/typo.yaml"), "is neither a folder nor a file of a kind that is read; give"),
    "half a Parquet file": (run_on("{here}/half.parquet"), "half.parquet is not a readable Parquet file"),
    "Parquet without images": (run_on("{here}/words.parquet"), "has no column of encoded images, only text, number; "),
    "labels of lists": (run_on("{here}/lists.parquet"), "has a column label of type list<element: int64>, needed are"),
    "URL of no server": (
        run_on("s3://key:secret@bucket/photos?endpoint_override=127.0.0.1:9&scheme=http"),
        "s3://bucket/photos cannot be reached",
    ),
    "URL of no kind": (run_on("ftp9://bucket/photos"), "Protocol not known: ftp9"),
    "two sets of shards": (run_on("{here}/two"), "{here}/two does not hold exactly one finished set"),
    "shards of another size": (run_on("{here}/large"), "hold images of 32 pixels and the recipe asks for"),
    "shards without a train split": (run_on("{here}/test", "protocol=split"), "protocol=split needs images of a train"),
    "long path": (run_on("x" * 300), "does not exist; give a folder"),
    "embeddings for images": (run_on("{here}/vectors.npy"), "vectors.npy holds embeddings and the recipe is one of"),
    "shards of embeddings": (run_on("{here}/embedded"), "holds embeddings and the recipe is one of images; use"),
    "images for embeddings": (embed("digits", "num_clusters=3"), "digits holds images and the recipe has no sections"),
    "shards for embeddings": (embed("{here}/few", "num_clusters=3"), "holds images and the recipe has no"),
    "K not named": (embed("{here}/vectors.npy"), "num_clusters is missing; add it to the recipe, or as num_clusters="),
    "K above the embeddings": (embed("{here}/vectors.npy", "num_clusters=100"), "num_clusters=100 is more than the 99"),
    "setting of images": (
        embed("{here}/vectors.npy", "pretrain.lr=0.1"),
        "pretrain.lr is a setting of runs on images, and the recipe is one of embeddings",
    ),
    # K and the sizes of batches and the queue.
    "K above the digits": ([*RUN, "num_clusters=1798"], "num_clusters=1798 is more than the 1797 images"),
    "K above the photos": (run_on("{here}/photos"), "num_clusters=10 is more than the 5 images"),
    "K above the rows": (run_on("{here}/five.parquet"), "num_clusters=10 is more than the 5 images"),
    "K above the shards": (run_on("{here}/few"), "num_clusters=10 is more than the 9 images"),
    "K below 2": ([*RUN, "num_clusters=1"], "num_clusters=1 cannot be used: input should be greater"),
    "K of no kind": ([*RUN, "num_clusters=[8, 12]"], "num_clusters=[8, 12] cannot be used; give a whole number of at"),
    "range above the digits": ([*RUN, "num_clusters=1798-1800"], "num_clusters=1798-1800 is more than the 1797 images"),
    "batch above the images": (run_on("{here}/photos", "num_clusters=5"), "batch_size=128 is more than the 5"),
    "queue of no whole batches": ([*RUN, "pretrain.queue_size=400"], "use pretrain.queue_size=384 or 512"),
    "large queue": ([*RUN, "pretrain.queue_size=512"], "more than a quarter of the 1797 images, so keys would meet"),
    # The recipe and its settings.
    "unknown recipe": (["run", "digitz", *RUN[2:]], "unknown recipe 'digitz'; did you mean 'digits'?"),
    "missing recipe": (["run", "nowhere.yaml", *RUN[2:]], "recipe file nowhere.yaml does not exist; give a YAML file"),
    "malformed recipe": (["run", "{here}/malformed.yaml", *RUN[2:]], "malformed.yaml is not valid YAML (while parsing"),
    "no section": (["run", "{here}/section.yaml", *RUN[2:], "heads.count=2"], "heads=3 cannot be used: heads is a"),
    "unknown key": ([*RUN, "pretrain.temprature=1"], "'pretrain.temprature'; did you mean 'pretrain.temperature'?"),
    "demo into its own folder": (["demo", "heads.count"], "override 'heads.count' is not of the form key=value"),
    "no equals sign": ([*RUN, "heads.count"], "override 'heads.count' is not of the form key=value"),
    "no YAML": ([*RUN, "seed=2024-13-45"], "the value of override 'seed=2024-13-45' is not valid YAML"),
    "confidence": ([*RUN, "joint.confidence=1.5"], "joint.confidence=1.5 cannot be used: input should be less than 1"),
    "consistency of 1": ([*RUN, "reliable.min_consistency=1"], "reliable.min_consistency=1 cannot be used"),
    "consistency below 0": ([*RUN, "reliable.min_consistency=-0.1"], "reliable.min_consistency=-0.1 cannot be used"),
    "workers": ([*RUN, "scale.workers=64"], "scale.workers=64 does not divide pretrain.lanes=4"),
    "CPUs": (
        [*RUN, *LANES, "scale.workers=64", "scale.cpus_per_worker=1000"],
        "scale.workers=64 with scale.cpus_per_worker=1000 need 64000 CPUs",
    ),
    # The output.
    "other settings": (run_into("{here}/started", "heads.count=6"), "(heads.count is 10 there and 6 here); choose"),
    "other images": (run_into("{here}/held", "heads.count=5"), "{here}/held holds a run of other images"),
    "foreign files": (run_into("{here}/foreign"), "{here}/foreign holds files that are not a run's; choose"),
    "out is a file": (run_into("{here}/five.parquet"), "{here}/five.parquet is a file; choose a folder"),
    "out below a file": (run_into("{here}/five.parquet/run"), "cannot be written (Not a directory); free some space"),
    "out on a web server": (run_into("https://host/run"), "https://host/run is on a web server, which takes no files"),
    "out with a key": (run_into("s3://key:secret@bucket/run"), "the URL of s3://bucket/run holds a key; leave it out"),
    "out without a server": (
        run_into("s3://bucket/run?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"),
        "s3://bucket/run cannot be reached (",
    ),
    "damaged record": (run_into("{here}/damaged"), "{here}/damaged/run.json cannot be read as JSON; restore it"),
    # Sweeps.
    "sweep missing": (tune("{here}/nowhere.yaml"), "sweep file {here}/nowhere.yaml does not exist; give"),
    "sweep malformed": (tune("{here}/malformed.yaml"), "malformed.yaml is not valid YAML"),
    "sweep typo": (tune("{here}/typo.yaml"), "'joint.confidnce'; did you mean 'joint.confidence'?"),
    "sweep of nothing": (tune("{here}/none.yaml"), "none.yaml: space.joint.confidence=[] cannot be used"),
    "sweep of K": (tune("{here}/shared.yaml"), "num_clusters is the same in all trials"),
    "sweep out of range": (tune("{here}/range.yaml"), "joint.confidence=1.5 cannot be used"),
    "sweep at random": (tune("{here}/random.yaml"), "search: random needs samples"),
    "sweep recipe": (tune("{here}/recipe.yaml"), "unknown recipe 'digitz'"),
    "sweep override": (tune("{here}/good.yaml", "seed=-1"), "seed=-1 cannot be used"),
    "sweep of embeddings": (
        ["tune", "{here}/good.yaml", "--data", "{here}/vectors.npy", "--out", "{here}/new"],
        "a sweep varies the stages of runs on images, and this is a run on embeddings; run each threshold",
    ),
    "recipe of embeddings in a sweep": (
        [*tune("{here}/good.yaml"), "--recipe", "embeddings", "num_clusters=3"],
        "a sweep varies the stages of runs on images, and this is a run on embeddings; run each threshold",
    ),
    "sweep of nowhere": (tune("{here}/good.yaml", "scale.cpus_per_worker=1000"), "and this machine has"),
    "trials too large": (tune("{here}/large.yaml"), "scale.cpus_per_worker=1000 need 1000 CPUs and this machine has"),
    # Predictions.
    "predict by nothing": (predict("{here}/nowhere"), "run.json does not exist; is {here}/nowhere the folder of a run"),
    "predict too early": (predict("{here}/started"), "is not of a finished run; run the same command again"),
    "predict by other settings": (predict("{here}/nowhere", "heads.count=3"), "run.json does not exist"),
    # The other commands.
    "evaluate nothing": (["evaluate", "{here}/nowhere"], "run.json does not exist; is {here}/nowhere the folder"),
    "evaluate no run": (["evaluate", "{here}/photos"], "run.json does not exist; is {here}/photos the folder of a run"),
    "evaluate too early": (["evaluate", "{here}/started"], "is not of a finished run; run the same command again"),
    "evaluate damage": (["evaluate", "{here}/damaged"], "cannot be read as JSON; restore it, or delete the folder"),
    "export nothing": (["export", "{here}/nowhere"], "run.json does not exist; is {here}/nowhere the folder"),
    "export too early": (["export", "{here}/started"], "is not of a finished run; run the same command again"),
    "ingest with a recipe's setting": (
        ["ingest", "digits", "{here}/new", "--size", "16", "joint.steps=3"],
        "joint.steps is no setting of shards; only settings of scale can be given here",
    ),
    "ingest with a wrong scale": (["ingest", "digits", "{here}/new", "--size", "16", "scale.worker=1"], "did you mean"),
    "ingest with too many workers": (
        ["ingest", "digits", "{here}/new", "--size", "16", "scale.workers=4096"],
        "scale.workers=4096",
    ),
    "ingest nothing": (["ingest", "{here}/nowhere", "{here}/new", "--size", "16"], "{here}/nowhere does not exist"),
    "ingest into a file": (["ingest", "digits", "{here}/five.parquet", "--size", "16"], "five.parquet is a file"),
    "ingest without a size": (["ingest", "{here}/photos", "{here}/new"], "give it as --size, in pixels"),
    "size of embeddings": (["ingest", "{here}/vectors.npy", "{here}/new", "--size", "16"], "--size=16 is for images"),
    "demo": (["demo", "--out", "{here}/foreign"], "holds files that are not a run's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_and_exit_code_2_before_torch_or_ray(here: Path, case: str) -> None:
    args, expected = REFUSED[case]
    before = contents(here)
    called = [sys.executable, "-X", "importtime", "-m", "spice_ray", *(arg.format(here=here) for arg in args)]
    done = subprocess.run(called, capture_output=True, text=True, env=ENVIRONMENT, cwd=here, timeout=60)
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    print(f"{case}: {said}")
    assert len(said) == 1
    assert said[0].startswith("spice-ray: ")
    assert expected.format(here=here) in said[0]
    assert (done.returncode, done.stdout) == (2, "")
    assert "spice_ray" in imported
    assert not {"torch", "ray"} & imported
    assert contents(here) == before


# Typer words these; what is ours is that they are reported, and as errors of the user.
@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["run", "digits", "--out", "new"], "--data"),
        (["run", "digits", "--data", "digits"], "--out"),
        (["rum"], "rum"),
        (["ingest", "digits", "new", "--size", "4"], "--size"),
        (["ingest", "digits", "new", "--size", "many"], "--size"),
        (["evaluate", "new", "--jsn"], "--jsn"),
    ],
)
def test_a_wrong_argument_is_explained_with_exit_code_2(tmp_path: Path, args: list[str], named: str) -> None:
    done = subprocess.run(command(*args), capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_verbose_adds_the_place_of_an_error_and_keeps_sentence_and_exit_code(tmp_path: Path) -> None:
    called = command("run", "digits", "--data", "nowhere", "--out", "new", "--verbose")
    done = subprocess.run(called, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].endswith("the word digits")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "from spice_ray.cli import main\n"
        "main()"
    )  # fmt: skip
    called = [sys.executable, "-c", program, "run", "digits", "--data", "digits", "--out", "new"]
    done = subprocess.run(called, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "new/run.json cannot be written (File too large); free some space" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert contents(tmp_path / "new") == {}


def test_an_interrupt_says_how_to_go_on_and_exits_with_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    process = subprocess.Popen(
        command("evaluate", str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A test run in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Opening succeeds when the command reads, and it reads for as long as the pipe is open.
    with (tmp_path / "run.json").open("w"):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "spice-ray: interrupted; the same command again goes on from here\n")
