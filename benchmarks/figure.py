"""No benchmark: a small plot of lines and dots, written as SVG."""

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 55
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's palette

Points = Iterable[tuple[float, float]]
Range = tuple[float, float]


class Figure:
    """One panel with a legend beside it; each line or group of dots takes the next colour."""

    def __init__(self, title: str, x_label: str, y_label: str, x_range: Range, y_range: Range) -> None:
        self.x_range, self.y_range = x_range, y_range
        self._num_drawn = 0
        self._parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
        self._text(_LEFT, _TOP - 16, title, "start")
        self._text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_label, "middle")
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        self._text(18, middle, y_label, "middle", f' transform="rotate(-90 18 {middle})"')
        self._axes()

    def line(self, points: Points, name: str, *, dashed: bool = False) -> None:
        color, style = self._named(name), ' stroke-dasharray="6 4"' if dashed else ""
        path = " ".join("{:.2f},{:.2f}".format(*self._at(x, y)) for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{style}/>')

    def dots(self, points: Points, name: str, *, ringed: Points = ()) -> None:
        color = self._named(name)
        for radius, fill, group in ((4, color, points), (8, "none", ringed)):
            for x, y in group:
                left, top = self._at(x, y)
                self._parts.append(
                    f'<circle cx="{left:.2f}" cy="{top:.2f}" r="{radius}" fill="{fill}" stroke="{color}"/>'
                )

    def write(self, file: Path) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([head, *self._parts, "</svg>"]) + "\n")

    def _at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels from the left and from the top."""
        (left, right), (low, high) = self.x_range, self.y_range
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def _named(self, name: str) -> str:
        """The next colour, which the legend then calls ``name``."""
        color, top = _COLORS[self._num_drawn % len(_COLORS)], _TOP + 12 + 20 * self._num_drawn
        left = _WIDTH - _RIGHT + 14
        self._parts.append(f'<rect x="{left}" y="{top - 9}" width="10" height="10" fill="{color}"/>')
        self._text(left + 16, top, name, "start")
        self._num_drawn += 1
        return color

    def _axes(self) -> None:
        left, bottom = self._at(self.x_range[0], self.y_range[0])
        right, top = self._at(self.x_range[1], self.y_range[1])
        self._parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>')
        for x in ticks(*self.x_range):
            across, _ = self._at(x, self.y_range[0])
            self._parts.append(f'<path d="M{across:.2f} {bottom}v5" stroke="#444"/>')
            self._text(across, bottom + 18, f"{x:g}", "middle")
        for y in ticks(*self.y_range):
            _, down = self._at(self.x_range[0], y)
            self._parts.append(f'<path d="M{left} {down:.2f}h-5" stroke="#444"/>')
            self._text(left - 8, down + 4, f"{y:g}", "end")

    def _text(self, x: float, y: float, text: str, anchor: str, more: str = "") -> None:
        place = f'x="{x:.2f}" y="{y:.2f}" font-size="12" fill="#222" text-anchor="{anchor}"{more}'
        self._parts.append(f"<text {place}>{escape(text)}</text>")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most eleven."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(power * share for share in (0.1, 0.2, 0.5, 1) if (high - low) / (power * share) <= 10)
    return [round(step * n, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
