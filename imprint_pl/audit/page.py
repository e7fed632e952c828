"""The page of an audit: one HTML file with the suspicious labels, duplicates and odd images."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imprint_pl import __version__
from imprint_pl.audit.find import SURELY_WRONG, Audit, Pair
from imprint_pl.audit.labels import LabelScores
from imprint_pl.drawing.page import Cell, Column, PageTable, cell, data_url, render
from imprint_pl.errors import ImprintError, shown

# Most pictures of each kind on the page; the CSVs have all findings.
LABELS_SHOWN, PAIRS_SHOWN, ISSUES_SHOWN = 36, 30, 24
ROWS_SHOWN = 300
# Longest side of a picture in pixels, and the longest side up to which pixels are drawn as squares.
SIDE, PIXELATED = 176, 48


class Picture(NamedTuple):
    """An image for the template; `source` is empty if it cannot be read."""

    source: str
    small: bool
    file: str
    split: str
    label: str


class Doubt(NamedTuple):
    """An image whose label is doubted."""

    picture: Picture
    given: str
    likely: str
    probability: str


class Twins(NamedTuple):
    """Two images that look the same, and why this is a problem."""

    a: Picture
    b: Picture
    what: str


def audit_page(
    found: Audit, name: str, counts: Mapping[str, Mapping[str, int]], progress: bool = False
) -> str:
    """Returns the page as HTML.

    Args:
        found: the findings.
        name: the name of the data set.
        counts: the number of images of each class in each split.
        progress: show a bar on stderr while the pictures are read.
    """
    scores = found.scores
    doubted = [] if scores is None else [i for i in scores.ranking().tolist() if scores.doubted[i]]
    labels = doubted[:LABELS_SHOWN]
    pairs, issues = found.pairs[:PAIRS_SHOWN], found.issues[:ISSUES_SHOWN]
    shown_samples = {*labels, *(s for pair in pairs for s in pair[:2]), *(i.sample for i in issues)}
    pictures = {
        sample: _picture(found, sample)
        for sample in tqdm(
            sorted(shown_samples),
            "pictures",
            delay=2,
            leave=False,
            disable=None if progress else True,
        )
    }
    doubts = [] if scores is None else [_doubt(found, scores, i, pictures[i]) for i in labels]
    facts = [f"{len(found.samples.labels):,} images", f"{len(found.class_names):,} classes"]
    facts += [f"{len(dataset):,} {split}" for split, dataset in found.samples.images.items()]
    tables = [_classes(counts)]
    if doubted:
        tables.append(_labels(found, doubted))
    if found.pairs:
        tables.append(_pairs(found))
    if found.issues or found.unreadable:
        tables.append(_issues(found))
    return render(
        Path(__file__).with_name("audit.html.jinja"),
        name=shown(name),
        facts=facts,
        sentences=summary(found),
        doubts=doubts,
        doubts_note=_left_out(len(doubted) - len(labels), "labels.csv"),
        twins=[Twins(pictures[p.a], pictures[p.b], _what(found, p)) for p in pairs],
        twins_note=_left_out(len(found.pairs) - len(pairs), "duplicates.csv"),
        issues=[(pictures[issue.sample], issue.reason) for issue in issues],
        issues_note=_left_out(len(found.issues) - len(issues), "images.csv"),
        tables=tables,
        version=__version__,
        root=shown(found.samples.root),
    )


def summary(found: Audit) -> list[str]:
    """Returns a few sentences with the findings, the most important first, and the next step."""
    sentences, sure = list[str](), list[int]()
    scores = found.scores
    contradictions = [p for p in found.pairs if found.is_contradiction(p) and p.kind != "near"]
    across = [p for p in found.pairs if found.is_across(p) and p.kind != "near"]
    if contradictions:
        first = contradictions[0]
        names = found.samples.names
        sentences.append(
            f"{_count(len(contradictions), 'pair')} of identical images "
            f"{'has' if len(contradictions) == 1 else 'have'} different labels, such as "
            f"{shown(names[first.a])} ({_label(found, first.a)}) and "
            f"{shown(names[first.b])} ({_label(found, first.b)})."
        )
    if found.unreadable:
        one = len(found.unreadable) == 1
        verb = "file cannot" if one else "files cannot"
        sentences.append(f"{len(found.unreadable):,} {verb} be read.")
    if scores is not None:
        order = scores.ranking()
        sure = [i for i in order.tolist() if scores.doubted[i] and scores.given[i] < SURELY_WRONG]
        if sure:
            i = sure[0]
            likely = shown(found.class_names[int(scores.likely[i])])
            sentences.append(
                f"{_count(len(sure), 'label')} of {len(order):,} "
                f"{'is' if len(sure) == 1 else 'are'} very likely wrong, first "
                f"{shown(found.samples.names[i])}: labelled {_label(found, i)}, looks like "
                f"{likely}."
            )
        else:
            sentences.append(f"No label of {len(order):,} is very likely wrong.")
    if across:
        sentences.append(
            f"{_count(len(across), 'pair')} of identical images "
            f"{'lies' if len(across) == 1 else 'lie'} in two splits: what is learned from one is "
            "measured on the other."
        )
    near = [p for p in found.pairs if p.kind == "near"]
    if near:
        more = sum(map(found.is_across, near))
        sentences.append(
            f"{_count(len(near) + found.near_left_out, 'pair')} of images look"
            f"{'s' * (len(near) + found.near_left_out == 1)} nearly the same"
            f"{f', {more:,} of them in two splits' if more else ''}."
        )
    sentences += found.warnings
    if not (found.pairs or found.issues or found.unreadable or sure):
        sentences.append("Nothing else stands out: the data can be used as they are.")
    elif found.samples.paths is not None:
        sentences.append(
            "Next: look at the pictures of the page; audit with --fix_list fix.csv writes the "
            "files that are best left out, and --data.exclude fix.csv leaves them out of a fit."
        )
    else:
        sentences.append(
            "Next: look at the pictures of the page. The CSVs name all images by their split and "
            "number."
        )
    return sentences


def _label(found: Audit, sample: int) -> str:
    """Returns the name of a sample's class, for people."""
    return shown(found.label(sample))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(p: float) -> str:
    # Never show 0 or 100 %, since no label is certainly wrong or right.
    return f"{100 * p:.0f} %" if 0.01 <= p <= 0.99 else "< 1 %" if p < 0.01 else "> 99 %"


def _left_out(number: int, file: str) -> str:
    return f"{number:,} more are in {file}." if number > 0 else ""


def _what(found: Audit, pair: Pair) -> str:
    kind = "identical" if pair.kind == "identical" else f"cosine {pair.cosine:.3f}"
    faults = ["different labels"] * found.is_contradiction(pair)
    faults += ["two splits"] * found.is_across(pair)
    return " · ".join([kind, *faults])


def _doubt(found: Audit, scores: LabelScores, sample: int, picture: Picture) -> Doubt:
    likely = shown(found.class_names[int(scores.likely[sample])])
    given, probability = float(scores.given[sample]), float(scores.probability[sample])
    return Doubt(picture, _percent(given), likely, _percent(probability))


def _picture(found: Audit, sample: int) -> Picture:
    samples = found.samples
    dataset = samples.images[samples.split[sample]]
    source, small = "", False
    try:
        image = dataset.__getitems__([samples.place[sample]])[0][0]
        small = max(image.shape[1:]) <= PIXELATED
        source = _png(image) if small else _jpeg(image)
    except (ImprintError, OSError):
        pass  # The file was removed during the audit: show its name without a picture.
    name = shown(samples.names[sample])
    return Picture(source, small, name, samples.split[sample], _label(found, sample))


def _pillow(image: Tensor) -> Image.Image:
    pixels = image.numpy()
    if len(pixels) < 3:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))


def _png(image: Tensor) -> str:
    content = io.BytesIO()
    _pillow(image).save(content, "PNG")
    return data_url(content.getvalue(), "image/png")


def _jpeg(image: Tensor) -> str:
    content, small = io.BytesIO(), _pillow(image)
    small.thumbnail((SIDE, SIDE))
    small.save(content, "JPEG", quality=80)
    return data_url(content.getvalue(), "image/jpeg")


def _table(
    name: str,
    title: str,
    columns: Iterable[tuple[str, bool]],
    rows: list[list[Cell]],
    file: str,
) -> PageTable:
    note = _left_out(len(rows) - ROWS_SHOWN, file)
    of_table = [Column(*column) for column in columns]
    return PageTable(name, title, note, of_table, rows[:ROWS_SHOWN])


def _classes(counts: Mapping[str, Mapping[str, int]]) -> PageTable:
    splits = list(next(iter(counts.values()), {}))
    rows = [
        [Cell(shown(name)), *(cell(n, f"{n:,}") for n in [*of.values(), sum(of.values())])]
        for name, of in counts.items()
    ]
    columns = [("class", False), *((split, True) for split in splits), ("all", True)]
    return _table("classes", "Images of each class", columns, rows, "classes.csv")


def _labels(found: Audit, doubted: list[int]) -> PageTable:
    scores, samples = found.scores, found.samples
    assert scores is not None  # without them no label is doubted
    rows = [
        [
            Cell(shown(samples.names[i])),
            Cell(samples.split[i]),
            Cell(_label(found, i)),
            cell(float(scores.given[i]), f"{100 * scores.given[i]:.1f}"),
            Cell(shown(found.class_names[int(scores.likely[i])])),
            cell(float(scores.probability[i]), f"{100 * scores.probability[i]:.1f}"),
        ]
        for i in doubted
    ]
    columns = [("file", False), ("split", False), ("label", False), ("its %", True)]
    columns += [("looks like", False), ("its % ", True)]
    return _table("labels", "Doubted labels", columns, rows, "labels.csv")


def _pairs(found: Audit) -> PageTable:
    samples = found.samples
    rows = [
        [
            Cell(shown(samples.names[pair.a])),
            Cell(f"{samples.split[pair.a]}, {_label(found, pair.a)}"),
            Cell(shown(samples.names[pair.b])),
            Cell(f"{samples.split[pair.b]}, {_label(found, pair.b)}"),
            cell(pair.cosine, "identical" if pair.kind == "identical" else f"{pair.cosine:.3f}"),
        ]
        for pair in found.pairs
    ]
    columns = [("file", False), ("split, label", False), ("second file", False)]
    columns += [("its split, label", False), ("cosine", True)]
    return _table("pairs", "Pairs that look the same", columns, rows, "duplicates.csv")


def _issues(found: Audit) -> PageTable:
    samples = found.samples
    rows = [[Cell(shown(path)), Cell(""), Cell(shown(r))] for path, r in found.unreadable.items()]
    rows += [
        [
            Cell(shown(samples.names[issue.sample])),
            Cell(f"{samples.split[issue.sample]}, {_label(found, issue.sample)}"),
            Cell(issue.reason),
        ]
        for issue in found.issues
    ]
    columns = [("file", False), ("split, label", False), ("what", False)]
    return _table("images", "Broken and unusual images", columns, rows, "images.csv")
