"""What is wrong with the texts of a figure: cut at its edge, drawn over each other or an image."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

# Names that a folder, or a stranger's file, may have.
NAMES = {
    "short": "cat",
    "words": "a class name that somebody typed as a whole sentence with very many words in it",
    "one word": "W" * 80,
    "underscores": "_".join(["underscore"] * 8),
    "dollars": "price $5 and $6_{x} \\frac$",
    "html": "<script>alert('x')</script> & <b>" * 2,
    "scripts": "Ελληνικά Кириллица 日本語の名前 🐱 " * 3,
    "lines": "two\nlines\tand a tab",
}


def faults(figure):
    """Texts outside of the figure, and pairs of texts, or a text and an image, that overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox.padded(1)
    boxes, found = [], []
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text().strip() or text in hidden:
            continue
        axes = text.axes
        if axes is not None and not axes.axison and text not in (axes.title, *axes.texts):
            continue  # ticks of an image
        box = text.get_window_extent(canvas.get_renderer())
        if box.width and not all(whole.contains(*corner) for corner in (box.min, box.max)):
            found.append(("outside", text.get_text()))
        boxes.append((text.get_text(), box.padded(-1)))
    boxes += [("an image", axes.bbox) for axes in figure.axes if axes.images]
    for i, (one, box) in enumerate(boxes):
        found += [(one, other) for other, second in boxes[i + 1 :] if box.overlaps(second)]
    return found


def drawn(monkeypatch):
    """A list that every figure is added to when it is saved, as it then looks."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def saved(figure, *arguments, **keywords):
        figures.append((figure, faults(figure)))
        return save(figure, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures
