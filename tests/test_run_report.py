import base64
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spice_ray.contracts import ShardFile
from spice_ray.errors import StorageError
from spice_ray.readers.parts import format_of, images_of, read_part
from spice_ray.report import gallery
from spice_ray.report.gallery import choose_examples, read_pictures
from spice_ray.report.plots import Line, Mark, line_chart
from spice_ray.report.run import agreement_of, write_run_report
from spice_ray.storage import Artifact, open_artifact
from tests.made_runs import NUM_IMAGES, SIZE, change_record, make_run

SVG = "{http://www.w3.org/2000/svg}"


def spice_ray(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "spice_ray", *args], capture_output=True, text=True, timeout=120)


def rows_of(html: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


def shards_of(run: Path) -> Artifact:
    found = open_artifact(run.parent / "data", "shards", "a")
    assert found is not None
    return found


def pixels(run: Path) -> np.ndarray:
    shards, format_ = shards_of(run), format_of(shards_of(run).manifest)
    files = [ShardFile(part["name"], 0, part["rows"], 0, part["crc32"]) for part in shards.manifest["files"]]
    return np.concatenate([images_of(read_part(shards.path, file, format_), SIZE) for file in files])


def assignments(clusters: list[int], confidences: list[float]) -> pa.Table:
    ids = np.arange(len(clusters))
    return pa.table(
        {"sample_id": ids, "source": [f"{i}.png" for i in ids], "cluster": clusters, "confidence": confidences}
    )


def test_every_cluster_has_its_sizes_and_what_its_neighbours_say(tmp_path: Path) -> None:
    clusters = [0] * 30 + [1] * 10
    run = make_run(tmp_path, clusters=clusters, reliable=[i % 4 == 0 for i in range(NUM_IMAGES)], num_clusters=3)
    html = write_run_report(run).read_text()
    # Of the two that follow each image, 29 x 2 - 1 are of the first cluster too, and 9 x 2 - 1 of the second.
    assert rows_of(html)[1:4] == [
        ["0", "30", "75.0%", "8", "1.000", f"{57 / 60:.3f}"],
        ["1", "10", "25.0%", "2", "1.000", f"{17 / 20:.3f}"],
        ["2", "0", "0.0%", "0", "", ""],
    ]
    assert "Unsupervised loss of the result: 1.7500" in html
    assert "Reliable samples: 10 of 40 (25.0%)" in html
    assert "Heads: 2, of which 1 have merged" in html
    assert "3 images could not be read (rejects.parquet); 4 are copies of others." in html
    assert "&lt;photos&gt;" in html
    assert "<photos>" not in html


def test_neighbours_are_those_of_images_that_are_trained_on(tmp_path: Path) -> None:
    splits = ["train" if i < 20 else "test" for i in range(NUM_IMAGES)]
    clusters = [0] * 10 + [1] * 10 + [0, 1] * 10
    run = make_run(tmp_path, clusters=clusters, splits=splits, protocol="split")
    assert [row[5] for row in rows_of(write_run_report(run).read_text())[1:3]] == [f"{17 / 20:.3f}"] * 2


def test_agreement_is_the_share_of_neighbours_in_the_cluster() -> None:
    clusters, nearest = np.array([0, 0, 1, 1]), np.array([[1, 2], [0, 0], [0, 1], [2, 3]])
    assert agreement_of(clusters, nearest).tolist() == [0.5, 1.0, 0.0, 1.0]


def test_the_surest_and_the_most_doubtful_are_those_by_confidence_and_none_is_both(tmp_path: Path) -> None:
    shards = shards_of(make_run(tmp_path))
    confidences = np.linspace(0.5, 0.9, NUM_IMAGES).tolist()
    found = choose_examples(assignments([0] * 37 + [1, 1, 1], confidences), shards, 3)
    assert [example.sample_id for example in found[0].sure] == [36, 35, 34, 33, 32, 31, 30, 29]
    assert [example.sample_id for example in found[0].unsure] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found[0].sure[0].source == "36.png"
    assert found[0].sure[0].confidence == pytest.approx(confidences[36])
    assert [example.sample_id for example in found[1].sure] == [39, 38]
    assert [example.sample_id for example in found[1].unsure] == [37]
    assert found[2] == ([], [])


def test_equally_sure_images_come_in_the_shuffled_order_whatever_that_of_the_table(tmp_path: Path) -> None:
    shards, table = shards_of(make_run(tmp_path)), assignments([0] * NUM_IMAGES, [1.0] * NUM_IMAGES)
    turned = table.take(np.arange(NUM_IMAGES)[::-1])
    assert choose_examples(turned, shards, 1) == choose_examples(table, shards, 1)
    assert [example.sample_id for example in choose_examples(table, shards, 1)[0].sure] == list(range(8))


@pytest.mark.parametrize(("most", "looked_at"), [(1, 27), (39, 27), (40, 40)])
def test_examples_are_of_the_first_files_that_are_not_too_much_to_read(
    most: int, looked_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "_SAMPLE_ROWS", most)
    (found,) = choose_examples(
        assignments([0] * NUM_IMAGES, np.linspace(0, 1, NUM_IMAGES).tolist()), shards_of(make_run(tmp_path)), 1
    )
    assert found.sure[0].sample_id == looked_at - 1


def test_many_clusters_have_few_examples_each(tmp_path: Path) -> None:
    table = assignments([i % 4 for i in range(NUM_IMAGES)], [1.0] * NUM_IMAGES)
    found = choose_examples(table, shards_of(make_run(tmp_path)), 400)
    assert [(len(one.sure), len(one.unsure)) for one in found[:5]] == [(2, 2)] * 4 + [(0, 0)]


def test_a_picture_is_the_image(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = read_pictures(shards_of(run), np.array([39, 2, 26, 27]))
    for id_, url in found.items():
        kind, _, data = url.partition(",")
        assert kind == "data:image/png;base64"
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(picture, pixels(run)[id_].transpose(1, 2, 0))
    assert sorted(found) == [2, 26, 27, 39]


def test_files_that_are_decoded_when_they_are_read_have_pictures_of_a_bounded_size(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (300, 200), (0, 128, 255)).save(data, "png")
    table = pa.table({"sample_id": [0, 1], "image": pa.array([b"not read", data.getvalue()])})
    folder = tmp_path / "shards-x"
    folder.mkdir()
    pq.write_table(table, folder / "part")
    crc32 = zlib.crc32((folder / "part").read_bytes())
    files = [{"name": "part", "rows": 2, "crc32": crc32}]
    shards = Artifact(folder, "shards", "x", {"image_size": 200, "stored": "encoded", "files": files})
    (url,) = read_pictures(shards, np.array([1])).values()
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.size == (96, 96)
    assert np.abs(np.asarray(picture).astype(int) - [0, 128, 255]).max() < 8


def test_a_damaged_file_costs_its_pictures_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (shards_of(run).path / "part-00000.parquet").write_bytes(b"no")
    assert sorted(read_pictures(shards_of(run), np.array([1, 30]))) == [30]
    html = write_run_report(run).read_text()
    assert html.count("<img") == 13  # the images of the second file


def test_a_source_whose_name_is_no_text_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change_record(run, source={"path": "ph\udcff<b>"})
    assert "<p>ph?&lt;b&gt;; no label" in write_run_report(run).read_text()


def test_neighbours_in_the_features_of_stage_3_are_not_held_against_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    change_record(run, recipe={**record["recipe"], "joint": {"rounds": 2}})
    assert [row[5] for row in rows_of(write_run_report(run).read_text())[1:3]] == ["", ""]


def test_the_share_of_reliable_samples_is_of_those_that_they_were_chosen_from(tmp_path: Path) -> None:
    run = make_run(tmp_path, reliable=[i < 10 for i in range(NUM_IMAGES)])
    manifest = run / "artifacts" / "reliable-f" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "num_train": 20}))
    assert "Reliable samples: 10 of 20 (50.0%)" in write_run_report(run).read_text()


def test_what_sources_are_called_is_shown_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    table = pq.read_table(run / "assignments.parquet")
    hostile = ['"><script>alert(1)</script>'] * NUM_IMAGES
    pq.write_table(table.set_column(table.schema.get_field_index("source"), "source", [hostile]), run / "a")
    (run / "a").replace(run / "assignments.parquet")
    html = write_run_report(run).read_text()
    assert "<script" not in html
    assert hostile[0] in unescape(html)


def test_the_heads_are_lines_and_the_chosen_one_is_red(tmp_path: Path) -> None:
    html = write_run_report(make_run(tmp_path)).read_text()
    chart = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", html, re.DOTALL)[0])
    *others, chosen = chart.findall(f"{SVG}polyline")
    assert len(others) == 1
    assert chosen.attrib["stroke"] != others[0].attrib["stroke"]
    tops = [float(line.attrib["points"].split()[-1].split(",")[1]) for line in (others[0], chosen)]
    assert tops[1] > tops[0]  # the lesser loss is lower


def test_a_chart_has_its_points_and_marks_where_they_belong() -> None:
    chart = ElementTree.fromstring(line_chart("x", "y", [Line([(1, 0.0), (3, 4.0), (5, 2.0)])], [Mark(1.0, "one")]))
    (line,) = chart.findall(f"{SVG}polyline")
    (left, bottom), (middle, top), (right, half) = (
        tuple(map(float, point.split(","))) for point in line.attrib["points"].split()
    )
    assert middle - left == pytest.approx(right - middle)
    assert half == pytest.approx((bottom + top) / 2)
    mark = chart.findall(f"{SVG}path")[1].attrib["d"]
    assert float(mark.split()[1].split("h")[0]) == pytest.approx(bottom + (top - bottom) / 4, abs=0.1)
    assert line_chart("x", "y", [Line([])], []) == ""


def test_counts_and_stage_1_are_shown_where_they_are_known(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = write_run_report(run).read_text()
    assert "Number of clusters" not in before
    assert "Stage 1" not in before
    candidates = [{"num_clusters": k, "score": 1 / k} for k in (2, 3, 4)]
    (run / "cluster_count.json").write_text(json.dumps({"num_clusters": 2, "candidates": candidates}))
    (run / "progress" / "encoder").mkdir(parents=True)
    health = "epoch,loss,alignment,uniformity,effective_rank,collapsed\n1,5,1,-1,30,0\n2,4,1,-2,31,0.5\n"
    (run / "progress" / "encoder" / "health.csv").write_text(health)
    html = write_run_report(run).read_text()
    assert "2 were chosen" in html
    assert "uniformity -2, effective rank 31, collapsed 0.5" in html


def test_a_run_of_given_labels_alone_has_neither_heads_nor_neighbours(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    prints = {kind: found for kind, found in record["artifacts"].items() if kind not in ("heads", "neighbors")}
    change_record(run, artifacts=prints)
    html = write_run_report(run).read_text()
    assert "Heads" not in html
    assert [row[5] for row in rows_of(html)[1:3]] == ["", ""]


@pytest.mark.parametrize("missing", ["assignments.parquet", "artifacts/heads-d", "../data/shards-a"])
def test_what_is_missing_is_named_in_a_sentence(missing: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = spice_ray("report", str(run))
    assert done.returncode == 2
    assert done.stderr.startswith("spice-ray: ")
    assert Path(missing).name in done.stderr
    assert "run the same command again" in done.stderr
    with pytest.raises(StorageError):
        write_run_report(run)


def test_the_command_tells_where_the_page_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done = spice_ray("report", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "clusters.html")
    assert (run / "clusters.html").is_file()
