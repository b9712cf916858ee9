"""The prior of stage 2 as a user gives it: the shares that clusters have of the images, in a list or in a file.

Or the word ``estimate``: they are then settled by the embedding, before the heads are trained.
"""

import math
from typing import Any

ESTIMATE = "estimate"
_TOLERANCE = 0.01
_MOST_CHARACTERS = 10_000_000
_FORMS = f"a list of one share per cluster, such as [0.5, 0.3, 0.2], a file of one share per line, or {ESTIMATE}"


def read_shares(file: str) -> list[float]:
    """The numbers in a text file, one per line; empty lines are skipped.

    Raises:
        ValueError: It cannot be read, or a line is no number.
    """
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(_MOST_CHARACTERS + 1)
    except OSError as error:
        raise ValueError(f"heads.prior={file} cannot be read ({error.strerror}); give {_FORMS}") from None
    except ValueError:  # not UTF-8, or a NUL in the path
        raise ValueError(f"heads.prior={file} is not a text file; give {_FORMS}") from None
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"heads.prior={file} is too long for a file of one share per line; give {_FORMS}")
    return [_number(line, number, file) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def check_shares(shares: Any) -> tuple[float, ...]:
    """The shares, the largest first: which cluster has which is not known before they are trained.

    Raises:
        ValueError: They are no list of numbers above 0 whose sum is 1, give or take a hundredth for rounding.
    """
    if not isinstance(shares, (list, tuple)):
        raise ValueError(f"heads.prior={shares!r} cannot be used; give {_FORMS}")
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"heads.prior holds {share!r}, which is no share; give numbers above 0 whose sum is 1")
    total = math.fsum(shares)
    if abs(total - 1) > _TOLERANCE:
        raise ValueError(f"the shares of heads.prior sum to {total:.6g} and not to 1; divide each by their sum")
    return tuple(sorted(map(float, shares), reverse=True))


def _number(line: str, number: int, file: str) -> float:
    try:
        return float(line)
    except ValueError:
        shown = line.strip()[:40]
        raise ValueError(f"line {number} of heads.prior={file}, {shown!r}, is no number; write one share") from None
