import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from spice_ray.report.plots import Axis
from spice_ray.report.sweep import write_sweep_report
from spice_ray.runtime.sweep_table import Reuse
from spice_ray.sweep import Sweep

SVG = "{http://www.w3.org/2000/svg}"
REUSE = [Reuse("encoder", 0, 3, 0.0, 90.0), Reuse("joint", 3, 0, 12.5, 0.0)]


def row(objective: float | None, note: str = "", **values: Any) -> dict[str, Any]:
    named = {key.replace("__", "."): value for key, value in values.items()}
    return {"values": named, "objective": objective, "reliable": 5, "seconds": 2.0, "note": note}


def report(folder: Path, sweep: Sweep, rows: list[dict[str, Any]]) -> tuple[str, list[ElementTree.Element]]:
    """The text, and its plots: first the parallel coordinates, then one for each setting."""
    write_sweep_report(folder / "report.html", sweep, rows, REUSE)
    text = (folder / "report.html").read_text()
    return text, [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def numbers(element: ElementTree.Element) -> list[tuple[float, float]]:
    points = (point.split(",") for point in element.attrib["points"].split())
    return [(float(left), float(top)) for left, top in points]


def test_every_trial_is_a_line_through_its_values_and_the_best_one_is_red(tmp_path: Path) -> None:
    space: dict[str, Any] = {"joint.confidence": [0.5, 0.9], "reliable.neighbors": [10, "adaptive"]}
    rows = [
        row(1.5, joint__confidence=0.9, reliable__neighbors=10),
        row(1.6, joint__confidence=0.5, reliable__neighbors="adaptive"),
        row(1.7, joint__confidence=0.9, reliable__neighbors="adaptive"),
        row(None, "the loss is not a number", joint__confidence=0.5, reliable__neighbors=10),
    ]
    text, (parallel, *panels) = report(tmp_path, Sweep(recipe="digits", space=space), rows)
    lines = parallel.findall(f"{SVG}polyline")
    assert len(lines) == 3
    best = lines[-1]  # drawn last, above the others
    assert [line.attrib["stroke"] for line in lines].count(best.attrib["stroke"]) == 1
    (left, confidence), (middle, _), (right, objective) = numbers(best)
    assert left < middle < right
    others = [numbers(line) for line in lines[:-1]]
    # Upwards is more: the greatest confidence is at the top, the least objective at the bottom.
    assert confidence <= min(points[0][1] for points in others)
    assert objective > max(points[-1][1] for points in others)

    assert [len(panel.findall(f"{SVG}circle")) for panel in panels] == [3, 3]
    (means,) = panels[0].findall(f"{SVG}polyline")
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in panels[0].findall(f"{SVG}circle")]
    at_most = [top for left, top in dots if left == max(left for left, _ in dots)]
    assert numbers(means)[-1][1] == pytest.approx(sum(at_most) / len(at_most), abs=0.1)
    assert "1 of them have none" in text
    assert "<td>the loss is not a number</td>" in text
    assert "<td>90.0</td>" in text


def test_an_axis_of_numbers_that_span_much_is_one_of_logarithms() -> None:
    axis = Axis.of("joint.lr", [1e-4, 1e-2, 1e-1])
    assert axis.place(1e-4) == 0
    assert axis.place(1e-1) == pytest.approx(1)
    assert axis.place(1e-2) == pytest.approx(2 / 3)
    even = Axis.of("joint.confidence", [0.5, 0.7, 0.9])
    assert even.place(0.7) == pytest.approx(0.5)
    assert [label for _, label in even.ticks] == ["0.5", "0.7", "0.9"]
    many = Axis.of("joint.ema", [number / 20 for number in range(20)])
    assert len(many.ticks) == 5
    assert not any(math.isnan(place) for place, _ in many.ticks)


def test_names_truth_values_and_what_all_trials_have_are_places_of_their_own() -> None:
    names = Axis.of("reliable.neighbors", [None, 10, "adaptive"])
    assert [names.place(value) for value in (None, 10, "adaptive")] == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    truth = Axis.of("pretrain.symmetric", [False, True, False])
    assert truth.place(False) < truth.place(True)
    assert Axis.of("joint.lr", [0.1, 0.1]).place(0.1) == 0.5


def test_trials_that_are_all_worth_the_same(tmp_path: Path) -> None:
    sweep = Sweep(recipe="digits", space={"joint.confidence": [0.5, 0.9]})
    # The mean of three of them is another number.
    rows = [row(0.1, joint__confidence=value) for value in (0.5, 0.5, 0.5, 0.9)]
    _, plots = report(tmp_path, sweep, rows)
    assert len(plots[0].findall(f"{SVG}polyline")) == 4
    (means,) = plots[1].findall(f"{SVG}polyline")
    assert len({top for _, top in numbers(means)}) == 1


def test_one_trial_and_a_note_that_looks_like_markup(tmp_path: Path) -> None:
    sweep = Sweep(recipe="a<b>.yaml", space={"joint.confidence": {"uniform": [0.5, 0.9]}}, search="random", samples=1)
    text, plots = report(tmp_path, sweep, [row(1.5, "<script>alert(1)</script>", joint__confidence=0.7)])
    assert "<script>" not in text
    assert "a&lt;b&gt;.yaml" in text
    assert len(plots[0].findall(f"{SVG}polyline")) == 1
    assert plots[1].findall(f"{SVG}polyline") == []  # a range has no values that repeat
