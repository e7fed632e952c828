"""Matplotlib's settings for all pictures, and the breaking of text into lines that fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Fonts for characters that DejaVu does not have, such as Chinese; the installed ones are used.
FALLBACKS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAGothic", "Droid Sans Fallback"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Hiragino Sans", "PingFang SC"),
    *("Arial Unicode MS", "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Thai"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Emoji", "Symbola"),
)
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "imprint_pl",
    # A dollar sign in a class name must not start a formula.
    "text.parse_math": False,
}
# Line height divided by font size.
LINE = 1.25


@contextmanager
def style() -> Iterator[None]:
    """Use these settings while figures are drawn and saved, then restore the user's."""
    import matplotlib
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in FALLBACKS if name in there)]
    with matplotlib.rc_context(STYLE | {"font.family": families}), warnings.catch_warnings():
        # A character that no font has is drawn as a box; no warning is needed.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def wrapped(
    text: str, width: float, size: float, most: int | None = None, weight: str = "normal"
) -> str:
    """Break a text into lines that fit a width, after spaces, `_`, `-` and `/` where possible.

    Call it inside `style`.

    Args:
        text: The text; line breaks in it count as spaces.
        width: Inches.
        size: Size of the font in points.
        most: Most lines; where there would be more, "…" ends the last one.
        weight: Weight of the font.
    """
    measure = _measure(size, weight)

    def fits(line: str) -> bool:
        return measure(line.rstrip()) <= width

    lines = [""]
    for piece in re.findall(r"[^\s_/-]*[_/-]+|[^\s_/-]+\s?|\s", " ".join(str(text).split())):
        if fits(lines[-1] + piece):
            lines[-1] += piece
        elif fits(piece):
            lines.append(piece)
        else:
            for letter in piece:
                if lines[-1] and not fits(lines[-1] + letter):
                    lines.append("")
                lines[-1] += letter
    lines = [line.strip() for line in lines]
    if most is not None and len(lines) > most:
        last = lines[most - 1]
        while last and not fits(last + "…"):
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return "\n".join(lines)


def _measure(size: float, weight: str = "normal") -> Callable[[str], float]:
    """Return a function from a line of text to its width in inches."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, 72), FontProperties(size=size, weight=weight)
    # Add 3 %: at another resolution letters are rounded to other pixels.
    return lambda line: (
        1.03 / 72 * renderer.get_text_width_height_descent(line, font, ismath=False)[0]
    )


def width(text: str, size: float) -> float:
    """Return the width in inches of a text's longest line; call it inside `style`."""
    return max(map(_measure(size), text.split("\n")))


def height(text: str, size: float) -> float:
    """Return the height in inches of lines of text, without the space around them."""
    return LINE * size / 72 * (text.count("\n") + 1)
