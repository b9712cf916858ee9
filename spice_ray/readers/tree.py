"""A folder in which the files of a benchmark are looked for by their names, local or on a server."""

import os
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from spice_ray.errors import DataError
from spice_ray.readers.files import Found, ask_each, find
from spice_ray.readers.folder import Entry, list_folder
from spice_ray.readers.places import Place


@dataclass(frozen=True)
class Tree:
    """A folder and what is below it; all names are relative to it, with slashes."""

    place: Place
    entries: tuple[Entry, ...] | None = field(default=None, repr=False)
    """All files below it, where they were listed already; else the file system is asked."""

    @cached_property
    def _listed(self) -> dict[str, dict[str, Entry]]:
        """The entries by folder and by name."""
        folders: dict[str, dict[str, Entry]] = defaultdict(dict)
        for entry in self.entries or ():
            folders[posixpath.dirname(entry.name)][entry.name] = entry
        return folders

    def file(self, name: str) -> Found | None:
        """The regular file of this name; None where there is none.

        Raises:
            DataError: A server cannot be asked, or refuses.
        """
        place = self.place / name
        if self.entries is not None:
            entry = self._listed.get(posixpath.dirname(name), {}).get(name)
            return None if entry is None else Found(place, False, entry.size, entry.mtime_ns)
        # A pipe that bears such a name is no file of a benchmark's.
        found = find(place) if place.server or os.path.isfile(place.path) else None
        return None if found is None or found.is_folder else found

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder of this name.

        Raises:
            DataError: A server cannot be asked, or refuses.
        """
        if self.entries is not None:
            return any(entry.name.startswith(f"{name}/") for entry in self.entries)
        found = find(self.place / name)
        return found is not None and found.is_folder

    def files(self, folders: Sequence[str]) -> list[list[Entry] | None]:
        """What is directly in each folder, in no order and without hidden files; None for one that is not there.

        Raises:
            DataError: A folder cannot be listed.
        """
        return ask_each(self._files, folders, on_server=bool(self.place.server) and self.entries is None)

    def _files(self, folder: str) -> list[Entry] | None:
        if self.entries is not None:
            return list(self._listed.get(folder, {}).values()) or None
        entries = list_folder(self.place / folder)
        return entries and [entry._replace(name=posixpath.join(folder, entry.name)) for entry in entries]

    def looks_like(self, names: Sequence[str]) -> bool:
        """Whether at least two of a benchmark's files are here: one might bear such a name by chance."""
        return sum(self.file(name) is not None for name in names) >= 2

    def require(self, names: Sequence[str], benchmark: str) -> list[Found]:
        """A benchmark's files.

        Raises:
            DataError: Some are not here; the sentence names them.
        """
        found = {name: self.file(name) for name in names}
        missing = [name for name, file in found.items() if file is None]
        if missing:
            raise DataError(
                f"{self.place} looks like {benchmark} but lacks {', '.join(missing)}; unpack its archive again"
            )
        return [file for file in found.values() if file is not None]
