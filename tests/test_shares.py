"""heads.prior: a list, a file or a word becomes shares, or one sentence says why not."""

from pathlib import Path
from typing import Any

import pytest

from spice_ray.errors import ConfigError
from spice_ray.recipe import check_recipe, load_recipe
from spice_ray.run_folder import science
from tests.small_settings import changed, error_of


def test_without_a_prior_clusters_are_equally_large() -> None:
    assert check_recipe(changed()).heads.prior is None
    assert check_recipe(changed(heads__prior=None)).heads.prior is None


def test_the_word_estimate_is_kept_until_there_is_an_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("estimate").write_text("0.2\n0.5\n0.3\n")
    assert load_recipe("digits", ["heads.prior=estimate"]).heads.prior == "estimate"
    recipe = load_recipe("digits", ["num_clusters=3", "heads.prior=./estimate"])  # a file may have that name
    assert recipe.heads.prior == (0.5, 0.3, 0.2)


def test_a_list_on_the_command_line_is_kept_largest_first() -> None:
    recipe = load_recipe("digits", ["num_clusters=3", "heads.prior=[0.2,0.5,0.3]"])
    assert recipe.heads.prior == (0.5, 0.3, 0.2)
    assert recipe == load_recipe("digits", ["num_clusters=3", "heads.prior=[0.5,0.3,0.2]"])


def test_a_file_is_the_list_in_it(tmp_path: Path) -> None:
    file = tmp_path / "shares.txt"
    file.write_text("0.2\n\n 5e-1\n0.3")
    recipe = load_recipe("digits", ["num_clusters=3", f"heads.prior={file}"])
    assert science(recipe)["heads"]["prior"] == [0.5, 0.3, 0.2]
    file.unlink()
    assert check_recipe(recipe.model_dump(mode="json")) == recipe


def test_embeddings_may_have_a_prior() -> None:
    assert load_recipe("embeddings", ["num_clusters=2", "heads.prior=[0.9,0.1]"]).heads.prior == (0.9, 0.1)


@pytest.mark.parametrize("total", [0.9901, 1.0099])
def test_shares_may_be_rounded(total: float) -> None:
    assert check_recipe(changed(heads__prior=[0.5, 0.3, total - 0.8])).heads.prior is not None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0.5, 0.5], "heads.prior holds 2 shares and num_clusters=3; give one share per cluster"),
        ([0.25] * 4, "heads.prior holds 4 shares and num_clusters=3; give one share per cluster"),
        ([0.7, 0.4, -0.1], "heads.prior holds -0.1, which is no share; give numbers above 0 whose sum is 1"),
        ([0.6, 0.4, 0], "heads.prior holds 0, which is no share"),
        ([0.6, 0.4, float("nan")], "heads.prior holds nan, which is no share"),
        ([0.6, 0.4, float("inf")], "heads.prior holds inf, which is no share"),
        ([0.6, 0.4, 10**400], "which is no share"),
        ([0.6, 0.4, True], "heads.prior holds True, which is no share"),
        ([0.6, 0.4, "x"], "heads.prior holds 'x', which is no share"),
        ([0.6, 0.4, None], "heads.prior holds None, which is no share"),
        ([0.5, 0.3, 0.1], "the shares of heads.prior sum to 0.9 and not to 1; divide each by their sum"),
        ([0.5, 0.3, 0.25], "the shares of heads.prior sum to 1.05 and not to 1"),
        ([], "the shares of heads.prior sum to 0 and not to 1"),
        (0.5, "heads.prior=0.5 cannot be used; give a list of one share per cluster"),
        ({"a": 1}, "heads.prior={'a': 1} cannot be used; give a list"),
        (True, "heads.prior=True cannot be used; give a list"),
        ("estmate", "heads.prior=estmate cannot be read (No such file or directory); give a list"),
        ("Estimate", "file of one share per line, or estimate"),
        ("", "heads.prior= cannot be read (No such file or directory); give a list"),
        ("a\0b", "is not a text file"),
    ],
)
def test_a_prior_that_cannot_be_used_is_one_sentence(value: Any, expected: str) -> None:
    message = error_of(changed(heads__prior=value))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"0.5\n0.3\nrest\n", "line 3 of heads.prior={file}, 'rest', is no number; write one share"),
        (b"0.5,0.3,0.2\n", "line 1 of heads.prior={file}, '0.5,0.3,0.2', is no number"),
        (b"0.5\n0.3\nnan\n", "heads.prior holds nan, which is no share"),
        (b"0.5\n0.3\n", "the shares of heads.prior sum to 0.8 and not to 1"),
        (b"", "the shares of heads.prior sum to 0 and not to 1"),
        (b"\xff\xfe0.5", "heads.prior={file} is not a text file"),
        (b"0" * 10_000_001, "heads.prior={file} is too long"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "shares.txt"
    file.write_bytes(content)
    message = error_of(changed(heads__prior=str(file)))
    assert expected.format(file=file) in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_folder_is_no_file_of_shares(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        check_recipe(changed(heads__prior=str(tmp_path)))
