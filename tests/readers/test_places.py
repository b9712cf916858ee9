import errno
import os
import pickle

import pytest

from spice_ray.readers.places import Place, explain, is_url, place_of, printable


@pytest.mark.parametrize(
    ("text", "server", "path", "name", "shown"),
    [
        ("/a/b.png", "", "/a/b.png", "b.png", "/a/b.png"),
        ("/a/../b//c", "", "/b/c", "c", "/b/c"),
        ("file:///a/b%20c.png", "", "/a/b c.png", "b c.png", "/a/b c.png"),
        ("s3://bucket", "s3://bucket", "", "", "s3://bucket"),
        ("S3://bucket/", "s3://bucket", "", "", "s3://bucket"),
        ("s3://bucket/a b%20#.png", "s3://bucket", "a b%20#.png", "a b%20#.png", "s3://bucket/a b%20#.png"),
        ("s3://bucket/a-?.png", "s3://bucket", "a-?.png", "a-?.png", "s3://bucket/a-?.png"),
        ("s3://b/a?region=eu&scheme=http", "s3://b?region=eu&scheme=http", "a", "a", "s3://b/a"),
        ("s3://K:S@b/a?.png?region=eu", "s3://K:S@b?region=eu", "a?.png", "a?.png", "s3://b/a?.png"),
        ("https://h:1/a/b%20c.png?id=2", "https://h:1", "a/b%20c.png?id=2", "b c.png", "https://h:1/a/b%20c.png?id=2"),
        ("https://h/a.tar?sig=x/y", "https://h", "a.tar?sig=x/y", "a.tar", "https://h/a.tar?sig=x/y"),
        ("memory://a/b", "memory://a", "b", "b", "memory://a/b"),
    ],
)
def test_a_path_or_url_is_a_server_and_a_path_on_it(text: str, server: str, path: str, name: str, shown: str) -> None:
    place = place_of(text)
    assert (place.server, place.path, place.name, str(place)) == (server, path, name, shown)
    assert pickle.loads(pickle.dumps(place)) == place


def test_a_relative_path_begins_at_the_working_directory() -> None:
    assert place_of("a/b") == Place(os.path.join(os.getcwd(), "a", "b"))


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("/a", "b/c.png", "/a/b/c.png"),
        ("s3://b", "x.png", "s3://b/x.png"),
        ("s3://b/a/c?region=eu", "../x y.png", "s3://b/a/x y.png?region=eu"),
        ("https://h/a", "./b.png?id=1", "https://h/a/b.png?id=1"),
    ],
)
def test_a_name_below_a_folder_keeps_the_server_and_its_settings(folder: str, name: str, expected: str) -> None:
    assert place_of(folder) / name == place_of(expected)


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("/a/b.png", "/a"),
        ("s3://b/x.png?region=eu", "s3://b?region=eu"),
        ("https://h/a/l.txt?sig=x/y", "https://h/a"),
        ("https://h/l.txt", "https://h"),
    ],
)
def test_the_folder_of_a_file_has_no_part_of_its_query(file: str, folder: str) -> None:
    assert place_of(file).parent == place_of(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://b", True), ("a+b-1.2://", True), ("://x", False), ("1a://x", False), ("/a://b", False), ("a:b//c", False)],
)
def test_a_url_begins_with_a_scheme(text: str, expected: bool) -> None:
    assert is_url(text) is expected


def test_a_name_is_shown_as_valid_text() -> None:
    assert printable(os.fsdecode(b"caf\xe9/\xc3\xa9")) == "caf\\xe9/\u00e9"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(errno.ENOENT, "whatever a library says"), "No such file or directory"),
        (OSError("When x: AWS Error ACCESS_DENIED during HeadObject operation: No response body."), "access denied"),
        (OSError("AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response."), "HTTP status 500"),
        (
            OSError("AWS Error NETWORK_CONNECTION during X operation: curlCode: 7; Details: No route (Request ID: 4f)"),
            "network connection: No route",
        ),
        (OSError("s3://KEY:SECRET@bucket\nis odd"), "s3://bucket is odd"),
        (ValueError("x" * 500), "ValueError: " + "x" * 200),
        (KeyError(), "KeyError"),
        (OSError(), "OSError"),
    ],
)
def test_a_reason_is_one_line_without_secrets_or_what_differs_from_run_to_run(error: Exception, expected: str) -> None:
    assert explain(error) == expected
