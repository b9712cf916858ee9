"""Tar archives of images, plain or as WebDataset shards; read as a stream and never unpacked.

Members of one sample stand side by side and share a key: the name up to the first dot of its last part. The rest of the
name, the extension, says what a member is: an image, a label in text (``cls``), or fields with a ``label`` (``json``).
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

import pyarrow as pa

from spice_ray.errors import DataError
from spice_ray.readers.columns import known_label
from spice_ray.readers.files import (
    MAX_FILE_BYTES,
    Found,
    digest_files,
    is_hidden,
    open_stream,
    relative_names,
    sum_sizes,
)
from spice_ray.readers.folder import has_image_name
from spice_ray.readers.places import Place, explain, printable
from spice_ray.readers.records import TRAIN, Chunk, Record, Unreadable, split_of_container, split_of_folder

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
_COMPRESSIONS = {"gz": "gzip", "tgz": "gzip", "zst": "zstd", "tzst": "zstd"}
# Labels are small; a member that claims to be one and is not is left alone.
_MAX_LABEL_BYTES = 1 << 20
# Names with many dots, of photographs perhaps, can share one key: no more images than these wait for a label.
_MAX_IMAGES_PER_SAMPLE = 16


class _Member(tarfile.TarInfo):
    """A member; tarfile takes a damaged header, and an end without its marker, for the end: here they are errors."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, where a member or the end marker should be") from None


@dataclass
class _Sample:
    """The members with one key, read so far."""

    key: str
    images: list[tuple[str, bytes | Unreadable]] = field(default_factory=list)
    label: str | int | None = None

    def records(self, archive: str) -> Iterator[Record]:
        """The sample's image; where there are several, the others carry the reason why they are left out.

        An image whose extension has a dot (``a.mask.png``) is beside one that has none (``a.png``); where all have
        one they are photographs with dots in their names, and each counts.
        """
        plain = [name for name, _ in self.images if "." not in _key_and_extension(name)[1]]
        for name, data in self.images:
            if plain and name != plain[0]:
                data = Unreadable(f"it belongs to the image {printable(plain[0])}, of which one is taken")
            yield Record(f"{archive}/{printable(name)}", _split(archive, name), self.label, data)


@dataclass(frozen=True)
class TarChunk:
    """One archive."""

    place: Place
    name: str

    @property
    def num_rows(self) -> int | None:
        """None: an archive has no list of what it holds."""
        return None

    def read(self) -> Iterator[Record]:
        """The encoded bytes of each image, in the archive's order.

        When the archive is damaged or cut short, what was read before stays and one record names archive and reason.

        Raises:
            DataError: A member's name is absolute or leads out of the archive by ``..``.
        """
        samples = self._samples()
        while True:
            try:
                sample = next(samples, None)
            except DataError:
                raise
            except Exception as error:
                # Cut short, damaged, or its server failed in whatever way: the images so far are good, the others lost.
                reason = f"the archive cannot be read to its end, what follows is lost: {_reason(error)}"
                yield Record(self.name, split_of_container(self.name), None, Unreadable(reason))
                return
            if sample is None:
                return
            yield from sample.records(self.name)

    def _samples(self) -> Iterator[_Sample]:
        sample = _Sample("")
        try:
            with _open(self.place) as archive:
                while (member := archive.next()) is not None:
                    # It would otherwise remember all members of the archive.
                    archive.members.clear()  # type: ignore[attr-defined]
                    _check_name(member.name, self.place)
                    key, extension = _key_and_extension(member.name)
                    if key != sample.key or len(sample.images) == _MAX_IMAGES_PER_SAMPLE:
                        complete, sample = sample, _Sample(key)
                        yield complete
                    _take(sample, archive, member, extension)
        except DataError:
            raise
        except Exception:
            # The members before the damage are whole.
            yield sample
            raise
        yield sample


@dataclass(frozen=True)
class TarSource:
    """One archive or several.

    The archive's name gives the split as that of a Parquet file does, else the member's first-level folder.
    """

    files: tuple[Found, ...]
    labels_known: bool = True
    kind: str = "tar"

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the archives."""
        return digest_files(self.kind, self.files)

    def encoded_bytes(self) -> int | None:
        """The sizes of all archives together; None where a server does not say."""
        return sum_sizes([file.size for file in self.files])

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """One chunk for each archive, whatever ``rows_per_chunk``: an archive is read from its beginning."""
        names = relative_names(self.files)
        return [TarChunk(file.place, name) for file, name in zip(self.files, names, strict=True)]


def open_tar(files: Sequence[Found]) -> TarSource:
    """A source of archives; only the first member of the first one is looked at now.

    Raises:
        DataError: The first one is no archive, or cannot be read.
    """
    place = files[0].place
    try:
        with _open(place) as archive:
            first = archive.next()
    except Exception as error:
        # Storage libraries have errors of their own; all of them end here, with the reason.
        raise DataError(f"{place} is not a readable tar archive ({_reason(error)}); pack it again") from None
    if first is None:
        raise DataError(f"{place} is an empty archive; give one with at least one image")
    return TarSource(tuple(files))


@contextmanager
def _open(place: Place) -> Iterator[tarfile.TarFile]:
    with ExitStack() as stack:
        stream = stack.enter_context(open_stream(place))
        compression = _COMPRESSIONS.get(place.name.lower().rpartition(".")[2])
        if compression is not None:
            stream = stack.enter_context(pa.CompressedInputStream(stream, compression))
        yield stack.enter_context(tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member))


def _check_name(name: str, place: Place) -> None:
    if posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == "..":
        raise DataError(
            f"{place} holds the member {printable(name)}, whose path leads out of the archive; "
            "pack it again with paths that do not begin with / and do not climb by .."
        )


def _take(sample: _Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    """Read what a sample needs of a member; folders, pipes, devices and files of other kinds are passed over."""
    name = posixpath.normpath(member.name)
    if is_hidden(name):
        return
    if has_image_name(name):
        if member.issym() or member.islnk():
            sample.images.append((name, Unreadable("it is a link, which is not followed in an archive")))
        elif member.isfile():
            sample.images.append((name, _content(archive, member)))
    elif extension in ("cls", "json") and member.isfile() and member.size <= _MAX_LABEL_BYTES:
        label = _class_label if extension == "cls" else _json_label
        sample.label = label(_bytes(archive, member)) if sample.label is None else sample.label


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Unreadable:
    if member.size > MAX_FILE_BYTES:
        return Unreadable(f"the file has {member.size} bytes, more than the {MAX_FILE_BYTES} that are read")
    return _bytes(archive, member)


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member
    return file.read()


def _class_label(data: bytes) -> str | int | None:
    try:
        text = data.decode().strip()
        return known_label(int(text))
    except UnicodeDecodeError:
        # No text, no label; the image counts all the same.
        return None
    except ValueError:
        # A name instead of a number.
        return text or None


def _json_label(data: bytes) -> str | int | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        # No JSON, no label; the image counts all the same.
        return None
    return known_label(fields.get("label")) if isinstance(fields, dict) else None


def _key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule: all before the first dot of the last part of the name, and all after it."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _split(archive: str, name: str) -> str:
    split = split_of_container(archive)
    return split if split != TRAIN else split_of_folder(printable(name)) or TRAIN


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) if isinstance(error, tarfile.TarError) else explain(error)
