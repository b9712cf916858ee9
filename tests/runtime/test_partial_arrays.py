"""What was filled before an interruption is kept, and nothing half-written is taken for it."""

from pathlib import Path

import numpy as np
import pytest

from spice_ray.runtime.partial_arrays import PartialArrays

SHAPES: dict[str, tuple[int, ...]] = {"wide": (6, 3), "views": (2, 6, 3)}
DTYPES: dict[str, type[np.floating]] = {"wide": np.float32, "views": np.float16}


def interrupted(folder: Path) -> None:
    """The first of two files is in the arrays, and of the second a part that nobody noted."""
    partial = PartialArrays(folder, SHAPES, DTYPES, seconds=0)
    assert partial.done == set()
    assert not partial.arrays["wide"].any()
    partial.arrays["wide"][:3], partial.arrays["views"][:, :3] = 1, 2
    partial.note("first")
    partial.arrays["wide"][3] = 9


def test_what_was_noted_is_there_again_and_is_handed_over(tmp_path: Path) -> None:
    folder, target = tmp_path / "parts" / "embedding", tmp_path / "target"
    target.mkdir()
    interrupted(folder)
    partial = PartialArrays(folder, SHAPES, DTYPES, seconds=60)
    assert partial.done == {"first"}
    partial.arrays["wide"][3:], partial.arrays["views"][:, 3:] = 3, 4
    partial.note("second")
    partial.hand_over(target)
    # They are here too until they are published: that may be interrupted as well.
    assert PartialArrays(folder, SHAPES, DTYPES, seconds=60).done == {"first", "second"}
    assert np.load(target / "wide.npy").tolist() == [[1] * 3] * 3 + [[3] * 3] * 3
    assert np.load(target / "views.npy").dtype == np.float16
    assert np.load(target / "views.npy")[1].tolist() == [[2] * 3] * 3 + [[4] * 3] * 3


def test_nothing_is_recorded_before_its_time(tmp_path: Path) -> None:
    partial = PartialArrays(tmp_path / "parts", SHAPES, DTYPES, seconds=60)
    partial.note("first")
    assert PartialArrays(tmp_path / "parts", SHAPES, DTYPES, seconds=60).done == set()
    partial.save()


@pytest.mark.parametrize("what", ["record", "no record", "array", "short array", "empty array", "shape", "dtype"])
def test_what_cannot_be_trusted_is_begun_anew(what: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    shapes, dtypes, array = dict(SHAPES), dict(DTYPES), tmp_path / "wide.npy"
    match what:
        case "record":
            (tmp_path / "done.json").write_text('["fir')
        case "no record":
            (tmp_path / "done.json").unlink()
        case "array":
            array.unlink()
        case "short array":
            array.write_bytes(array.read_bytes()[:-5])
        case "empty array":
            array.write_bytes(b"")
        case "shape":
            shapes["wide"] = (7, 3)
        case "dtype":
            dtypes["wide"] = np.float16
    partial = PartialArrays(tmp_path, shapes, dtypes, seconds=60)
    assert partial.done == set()
    assert partial.arrays["wide"].shape == shapes["wide"]
    assert not any(values.any() for values in partial.arrays.values())
