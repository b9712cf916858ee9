"""The hostile corpus: every file with what must come of it, written into a folder from code."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.hostile import broken, sound
from tests.hostile.pictures import BLUE, COLOURS, GREEN, RED, SAND, WHITE, Colour, Quadrants, jpeg, png, quadrants

LOSSLESS, LOSSY = 0, 6
_ORDINARY = sound.ORDINARY
_OTHER: Quadrants = (BLUE, SAND, WHITE, GREEN)


@dataclass(frozen=True)
class Good:
    """An image must come, upright and in these colours; None where damage leaves no telling."""

    colours: tuple[Colour | None, ...] = COLOURS
    tolerance: int = LOSSLESS


@dataclass(frozen=True)
class Bad:
    """A reject must come whose reason matches this regular expression."""

    reason: str


@dataclass(frozen=True)
class Ignored:
    """Nothing must come: it is no image file by its name or its kind."""


@dataclass(frozen=True)
class Case:
    """One entry of the corpus; ``name`` is relative, with surrogates where it is not UTF-8."""

    group: str
    name: str
    expected: Good | Bad | Ignored
    place: Callable[[Path], None]
    vanishes: bool = False
    """Gone after the folder was listed and before the file is read."""

    @property
    def source(self) -> str:
        """The name as the product prints it."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")

    def write(self, root: Path) -> None:
        """Make the entry in a folder."""
        path = root / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.place(path)

    def vanish(self, root: Path) -> None:
        """What another process does between listing and reading."""
        if self.vanishes:
            (root / self.name).unlink()


def write_corpus(root: Path) -> list[Case]:
    """Every case in one folder."""
    found = cases()
    for case in found:
        case.write(root)
    return found


def cases() -> list[Case]:
    """All cases, each with a name of its own."""
    return [*_sound(), *_broken(), *_names(), *_links(), *_kinds_of_entries()]


def _file(group: str, name: str, content: bytes, expected: Good | Bad | Ignored) -> Case:
    return Case(group, name, expected, partial(_write, content))


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _sound() -> list[Case]:
    exact = [_file(group, name, data, Good(colours)) for group, name, data, colours in sound.exact()]
    close = [_file(group, name, data, Good(colours, LOSSY)) for group, name, data, colours in sound.close()]
    return exact + close


def _broken() -> list[Case]:
    refused = [_file(group, name, data, Bad(reason)) for group, name, data, reason in broken.refused()]
    # A JPEG has no checksum: what is damaged in the middle is sound above, and below nobody can tell.
    top = Good((*COLOURS[:2], None, None), LOSSY)
    return [*refused, _file("damaged JPEG", "flipped-middle.jpg", broken.jpeg_damaged_below(), top)]


def _names() -> list[Case]:
    plain = [
        "\u00fcn\u00ef-\u65e5\u672c-\U0001f389.png",
        "e\u0301-decomposed.png",
        "new\nline.png",
        "tab\tname.png",
        " spaces .png",
        "-rf.png",
        "*?[a].png",
        "%20#&=.png",
        "quote'\".png",
        "back\\slash.png",
        "UPPER.PNG",
        "two.dots.jpg.png",
        "x" * 251 + ".png",
        "folder.png/inside.png",
        "\u043f\u0430\u043f\u043a\u0430/\u00fc \n/deep.png",
        os.fsdecode(b"caf\xe9.png"),
        os.fsdecode(b"\xff\xfe/\xe9.png"),
    ]
    other, twin = png(quadrants(_OTHER)), png(quadrants((WHITE, RED, RED, SAND)))
    return [
        *(_file("odd names", name, _ORDINARY, Good()) for name in plain),
        _file("duplicates", "twins/a/same-name.png", _ORDINARY, Good()),
        _file("duplicates", "twins/b/same-name.png", other, Good(_OTHER)),
        _file("duplicates", "twins/content-1.png", twin, Good((WHITE, RED, RED, SAND))),
        _file("duplicates", "twins/content-2.png", twin, Good((WHITE, RED, RED, SAND))),
        _file("wrong extension", "png-named.jpg", _ORDINARY, Good()),
        _file("wrong extension", "gif-named.png", sound.gif(), Good()),
        _file("wrong extension", "jpeg-named.gif", jpeg(), Good(tolerance=LOSSY)),
        _file("wrong extension", "webp-named.bmp", sound.webp(), Good()),
    ]


def _links() -> list[Case]:
    gone, loop = r"cannot be read: No such file", r"cannot be read: Too many levels"
    return [
        Case("link to a file", "links/to-file.png", Good(), _linked_beside),
        Case("broken links", "links/broken.png", Bad(gone), partial(_link, "nowhere.png")),
        Case("broken links", "links/circle.png", Bad(loop), partial(_link, "circle.png")),
        Case("loops of folders", "links/up", Ignored(), partial(_link, "..")),
        Case("loops of folders", "links/up.png", Ignored(), partial(_link, "..")),
        Case("files that go", "vanishing.png", Bad(gone), partial(_write, _ORDINARY), vanishes=True),
        Case("no permission", "locked.png", _locked(), _write_locked),
    ]


def _kinds_of_entries() -> list[Case]:
    return [
        Case("pipes and devices", "pipe.png", Ignored(), os.mkfifo),
        Case("pipes and devices", "device.png", Ignored(), partial(_link, "/dev/zero")),
        Case("empty folders", "empty folder", Ignored(), Path.mkdir),
        Case("empty folders", "empty.d.png", Ignored(), Path.mkdir),
        _file("hidden files", ".hidden.png", _ORDINARY, Ignored()),
        _file("hidden files", "._resource.png", b"\0\5\x16\7", Ignored()),
        _file("other files", "notes.txt", b"no image", Ignored()),
    ]


def _link(target: str, path: Path) -> None:
    path.symlink_to(target)


def _linked_beside(path: Path) -> None:
    # The target has no name of an image, so that it is not listed itself.
    target = path.with_name("target.data")
    target.write_bytes(_ORDINARY)
    path.symlink_to(target.name)


def _locked() -> Good | Bad:
    return Good() if os.geteuid() == 0 else Bad("cannot be read: Permission denied")


def _write_locked(path: Path) -> None:
    path.write_bytes(_ORDINARY)
    path.chmod(0)
