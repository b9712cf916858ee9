"""A page of HTML that needs nothing else."""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from spice_ray import mirror
from spice_ray.storage import reporting_disk_errors

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
.noted th:last-child, .noted td:last-child { text-align: left }
svg { max-width: 100%; height: auto } figure { margin: 1rem 0 }
figcaption { color: #555 } .panels { display: flex; flex-wrap: wrap; gap: 1rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem } .pair p { margin: 0; color: #555 }
.pair img { min-width: 64px; max-width: 96px; margin: 0 2px; image-rendering: pixelated }
h3 { margin: 1rem 0 0 }
"""


def write_page(file: Path, title: str, body: str) -> None:
    """Write a page.

    Raises:
        StorageError: The disk refused.
    """
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>
{body}
</html>
"""
    with reporting_disk_errors(file):
        mirror.write_bytes(file, text.encode(errors="replace"))  # names of files need not be text


def table(header: list[str], rows: Iterable[list[Any]], *, noted: bool = True) -> str:
    """A table, of numbers but for the last column if that is ``noted``; what the cells hold is shown as it is."""

    def line(tag: str, cells: list[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return (
        f"<table{' class=noted' * noted}>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"
    )
