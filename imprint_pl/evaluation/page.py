"""The page of an evaluation: one HTML file with the weakest class, the images that are perhaps
labelled wrong, and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from imprint_pl import __version__
from imprint_pl.drawing.page import Cell, Column, PageTable, cell, data_url, render
from imprint_pl.errors import shown
from imprint_pl.evaluation.classes import Figure, Measured
from imprint_pl.evaluation.next_step import (
    SURE,
    UNLIKELY,
    between,
    certainty,
    next_step,
    percent,
    suspicion,
    suspicious,
    weakness,
)
from imprint_pl.evaluation.pictures import SMALL, Thumbnails, as_url
from imprint_pl.evaluation.predictions import Predictions
from imprint_pl.numerics.measures import METRICS, compared_by

# Most images and rows on the page, to bound its size.
SUSPICIOUS_SHOWN, WORST_SHOWN = 12, 36
# Up to this many classes the confusion matrix can be read on a phone without scrolling.
FITS_PHONES = 12
ERRORS_LISTED, CLASSES_LISTED = 300, 1500


@dataclass(frozen=True)
class Run:
    """The facts about a run that the page shows beside the figures.

    Attributes:
        name: the name of the task.
        what: the split that was measured, such as "validation".
        facts: further words for the line under the title, such as the backbone.
        figures: further figures, such as NC1, as text.
        tried: the candidates of `auto`, as in `head.tried`.
        balance: settings that help small classes and that another fit may use, such as
            "class_weight: balanced"; empty if there are none.
    """

    name: str
    what: str
    facts: list[str] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    balance: str = ""


class PageImage(NamedTuple):
    """A wrong image for the template; `source` is empty if there is no picture."""

    source: str
    tiny: bool
    true: str
    given: str
    sure: str
    file: str


def evaluation_page(
    run: Run,
    measured: Measured,
    predictions: Predictions,
    *,
    confusion: Path | None = None,
    gallery: Path | None = None,
    thumbnails: Thumbnails | None = None,
    files: Sequence[str] = (),
) -> str:
    """Returns the page as HTML.

    Args:
        run: facts about the run.
        measured, predictions: those of a loader.
        confusion, gallery: PNGs, if there are any.
        thumbnails: thumbnails of the images; `None` without pictures.
        files: names of the files beside the page.
    """
    worst, labels = predictions.worst().tolist(), suspicious(predictions).tolist()
    others = [index for index in worst if index not in set(labels)]
    of_labels = labels[:SUSPICIOUS_SHOWN]
    # Without pictures these images would only repeat the table of errors.
    of_worst = others[:WORST_SHOWN] if thumbnails is not None else []
    step = next_step(measured, predictions, run.balance)
    tables = [
        _figures(run, measured),
        _classes(measured),
        *([_errors(predictions, worst)] if worst else []),
        *([_tried(run.tried)] if run.tried else []),
    ]
    return render(
        Path(__file__).with_name("evaluation.html.jinja"),
        name=shown(run.name),
        facts=[f"{measured.images:,} {run.what} images", *run.facts],
        next_step=step.text,
        sentences=_sentences(measured, predictions, labels, step.rule),
        confusion=None if confusion is None else data_url(confusion.read_bytes(), "image/png"),
        fits_phones=len(measured.classes) <= FITS_PHONES,
        gallery=None if gallery is None else data_url(gallery.read_bytes(), "image/png"),
        suspicious=[_image(predictions, index, thumbnails) for index in of_labels],
        suspicious_note=(
            f"Another class has a probability of at least {100 * SURE:.0f} %, the label at most "
            f"{100 * UNLIKELY:.0f} %. Either the label is wrong, or the image is unlike its class."
            + _left_out(len(labels) - len(of_labels))
        ),
        worst=[_image(predictions, index, thumbnails) for index in of_worst],
        worst_note=(
            f"{'The other' if labels else 'The'} wrong images, first those whose given "
            f"class leads the true one by most.{_left_out(len(others) - len(of_worst))}"
        ),
        tables=tables,
        version=__version__,
        files=_places(predictions, files),
    )


def _places(predictions: Predictions, files: Sequence[str]) -> str:
    images = "" if predictions.folder is None else f"The images lie below {predictions.folder}. "
    return f"{shown(images)}Beside this page: {', '.join(files)}." if files else shown(images)


def _left_out(count: int) -> str:
    return f" {count:,} more are left out here; predictions.csv has all." if count > 0 else ""


def _sentences(
    measured: Measured, predictions: Predictions, labels: list[int], rule: str
) -> list[str]:
    if not measured.images:
        return []
    accuracy, balanced = measured.accuracy, measured.balanced_accuracy
    sentences = [
        f"Accuracy {percent(accuracy)} ({measured.right:,} of {measured.images:,} images; "
        f"{between(accuracy)}), balanced over the classes {percent(balanced)}."
    ]
    weakest = measured.weakest()[0]
    if weakest.wrong:
        sentences.append(f"Weakest class: {weakness(weakest, measured)}.")
    if labels and rule != "label":
        sentences.append(
            f"Perhaps labelled wrong: {suspicion(predictions, labels[0], len(labels))}."
        )
    elif weakest.wrong and not labels and rule != "good":
        sentences.append("No image looks labelled wrong.")
    if predictions.accepted is not None:
        rejected = int((~predictions.accepted).sum())
        sentences.append(
            f'Below the threshold, which `predict` calls "none of these": {rejected:,} of '
            f"{measured.images:,} images. The figures here are those of the best class."
        )
    return sentences


def _figures(run: Run, measured: Measured) -> PageTable:
    rows = [
        [Cell(name), Cell(percent(figure)), Cell(_ends(figure))]
        for name, figure in (
            ("accuracy", measured.accuracy),
            ("balanced accuracy", measured.balanced_accuracy),
            ("macro F1", measured.macro_f1),
        )
    ]
    rows += [[Cell(name), Cell(value), Cell("")] for name, value in run.figures.items()]
    note = (
        "Balanced accuracy is the mean of the classes' recalls, so that rare classes count as much "
        "as others. The interval says how far off a figure may be because the images are few; "
        "balanced accuracy and macro F1 have none where no image is wrong."
    )
    columns = [Column("figure", False), Column("value", False), Column("95 % interval", False)]
    return PageTable("figures", "Figures", note, columns, rows, filtered=False)


def _classes(measured: Measured) -> PageTable:
    known = any(found.trained is not None for found in measured.classes)
    absent = [found for found in measured.classes if not found.images]
    rows = []
    for found in [*measured.weakest(), *absent][:CLASSES_LISTED]:
        mistaken = ""
        if found.mistaken_for is not None:
            other = shown(measured.classes[found.mistaken_for].name)
            mistaken = f"{other} ({found.mistaken:,})"
        training = [cell(found.trained, f"{found.trained or 0:,}")] if known else []
        rows.append(
            [
                Cell(shown(found.name)),
                _percentage(found.recall),
                Cell(_ends(found.recall)),
                cell(found.images, f"{found.images:,}"),
                cell(found.right, f"{found.right:,}"),
                *training,
                _percentage(found.precision),
                _percentage(found.f1),
                Cell(mistaken),
            ]
        )
    texts = ("class", "95 % interval", "most often taken for")
    names = ["class", "recall", "95 % interval", "images", "right"]
    names += [*(["training images"] if known else []), "precision", "F1", "most often taken for"]
    columns = [Column(name, name not in texts) for name in names]
    note = "The weakest first. Recall: the share of the class's images that were taken for it."
    if len(measured.classes) > CLASSES_LISTED:
        note += f" {CLASSES_LISTED:,} of {len(measured.classes):,} classes; the CSV has all."
    return PageTable("classes", "Classes", note, columns, rows, len(rows) > 12)


def _errors(predictions: Predictions, worst: list[int]) -> PageTable:
    names = predictions.class_names
    rows = []
    for index in worst[:ERRORS_LISTED]:
        given, own = float(predictions.probabilities[index]), float(predictions.of_true[index])
        rows.append(
            [
                Cell(shown(predictions.name_of(index))),
                Cell(shown(names[predictions.labels[index]])),
                Cell(shown(names[predictions.predicted[index]])),
                cell(given, "" if given != given else certainty(given)),
                cell(own, "" if own != own else f"{100 * own:.1f} %"),
            ]
        )
    sample = "image" if predictions.names is None else "file"
    columns = [Column(name, False) for name in (sample, "true class", "given class")]
    columns += [Column("probability", True), Column("of the true class", True)]
    note = "First those whose given class leads the true one by most." + _left_out(
        len(worst) - len(rows)
    )
    return PageTable("errors", "All errors", note, columns, rows)


def _tried(tried: list[dict[str, Any]]) -> PageTable:
    rows: list[list[Cell]] = []
    metric = compared_by(tried)
    for row in tried:
        measured = {"recipe", "difference", "standard_error", "chosen", *METRICS}
        keywords = [f"{name}={value}" for name, value in row.items() if name not in measured]
        figure, better = row[metric], row.get("difference")
        error = row.get("standard_error") or 0.0
        rows.append(
            [
                Cell(" ".join([str(row["recipe"]), *keywords])),
                cell(figure, "too few images" if figure is None else f"{100 * figure:.2f} %"),
                cell(
                    better,
                    f"{100 * better:+.2f} ± {100 * error:.2f}"
                    if rows and better is not None
                    else "",
                ),
                Cell("chosen" if row["chosen"] else ""),
            ]
        )
    shown_metric = metric.replace("_", " ")
    columns = [Column("candidate", False), Column(shown_metric, True)]
    columns += [Column("points more than the first", True), Column("", False)]
    note = (
        "On held-out training embeddings. Another candidate than the first is chosen where it is "
        "better by more than two standard errors, the number after ±."
    )
    return PageTable("tried", "What auto tried", note, columns, rows, filtered=False)


def _percentage(figure: Figure) -> Cell:
    return cell(figure.value, "" if figure.value is None else percent(figure))


def _ends(figure: Figure) -> str:
    if figure.interval is None:
        return ""
    return f"{100 * figure.interval.low:.1f} to {100 * figure.interval.high:.1f} %"


def _image(predictions: Predictions, index: int, thumbnails: Thumbnails | None) -> PageImage:
    pixels = None if thumbnails is None else thumbnails(index)
    names = predictions.class_names
    return PageImage(
        "" if pixels is None else as_url(pixels),
        pixels is not None and max(pixels.shape[:2]) <= SMALL,
        shown(names[predictions.labels[index]]),
        shown(names[predictions.predicted[index]]),
        certainty(float(predictions.probabilities[index])),
        shown(predictions.name_of(index)),
    )
