"""Writes the files of an evaluation into a folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from imprint_pl.evaluation.classes import Figure, Measured, measure
from imprint_pl.evaluation.next_step import Step, next_step
from imprint_pl.evaluation.page import Run, evaluation_page
from imprint_pl.evaluation.pictures import Thumbnails, draw_confusion, draw_errors
from imprint_pl.evaluation.predictions import Predictions
from imprint_pl.files import write_whole

# Most images for which pictures are drawn, and most classes of a confusion matrix in a file.
MOST_PICTURED, MOST_CONFUSED = 50_000, 2_000


class Written(NamedTuple):
    """The results of `write_evaluation`.

    Attributes:
        measured: the figures.
        next_step: the recommended next step.
        page: the HTML file.
        confusion, errors: the PNGs; `None` if they were not drawn.
    """

    measured: Measured
    next_step: Step
    page: Path
    confusion: Path | None
    errors: Path | None


def write_evaluation(
    folder: Path,
    run: Run,
    predictions: Predictions,
    trained: Tensor | None = None,
    thumbnails: Thumbnails | None = None,
    gallery: Path | None = None,
) -> Written:
    """Writes `predictions.csv`, `per_class.csv`, `confusion_matrix.csv` and `.png`, and
    `evaluation.html`; with thumbnails and errors also `errors.png`.

    Args:
        folder: the folder for the files; it is made.
        run: facts about the run.
        predictions: the predictions of a loader.
        trained: `(C,)`, the number of training images of each class, if that is known.
        thumbnails: thumbnails of the images; not used for more than 50,000 images.
        gallery: a PNG to show on the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = measure(predictions, trained)
    names = ["predictions.csv", "per_class.csv"]
    _write_table(folder / "predictions.csv", *prediction_table(predictions))
    _write_table(folder / "per_class.csv", *per_class_table(measured))
    confusion = errors = None
    if len(measured.classes) <= MOST_CONFUSED:
        class_names = predictions.class_names
        matrix = zip(class_names, measured.confusion.dense().tolist(), strict=True)
        table = ([name, *row] for name, row in matrix)
        _write_table(folder / "confusion_matrix.csv", ["true class", *class_names], table)
        confusion = draw_confusion(measured, folder / "confusion_matrix.png")
        names += ["confusion_matrix.csv", "confusion_matrix.png"]
    if len(predictions) > MOST_PICTURED:
        thumbnails = None
    (folder / "errors.png").unlink(missing_ok=True)
    if thumbnails is not None:
        errors = draw_errors(predictions, thumbnails, folder / "errors.png")
        names += ["errors.png"] if errors else []
    page = evaluation_page(
        run,
        measured,
        predictions,
        confusion=confusion,
        gallery=gallery,
        thumbnails=thumbnails,
        files=names,
    )
    path = write_whole(folder / "evaluation.html", page.encode())
    step = next_step(measured, predictions, run.balance)
    return Written(measured, step, path, confusion, errors)


def _write_table(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    # As in the CSV of `predict`, keep the bytes of a name that is not UTF-8.
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def prediction_table(predictions: Predictions) -> tuple[list[str], Iterable[list[Any]]]:
    """Returns header and rows: the columns of `predict`, and the true class."""
    names = predictions.class_names
    header = ["index" if predictions.names is None else "file", "label", "class", "score"]
    header += ["probability", "true_label", "true_class", "probability_of_true"]
    accepted = predictions.accepted
    header += [] if accepted is None else ["accepted"]
    columns = zip(
        range(len(predictions)) if predictions.names is None else predictions.names,
        predictions.predicted.tolist(),
        predictions.scores.tolist(),
        predictions.probabilities.tolist(),
        predictions.labels.tolist(),
        predictions.of_true.tolist(),
        [None] * len(predictions) if accepted is None else accepted.tolist(),
        strict=True,
    )

    def rows() -> Iterable[list[Any]]:
        for sample, label, score, probability, true, of_true, passes in columns:
            row = [sample, label, names[label], f"{score:.6g}", _rounded(probability)]
            row += [true, names[true], _rounded(of_true)]
            yield row if passes is None else [*row, str(passes).lower()]

    return header, rows()


def per_class_table(measured: Measured) -> tuple[list[str], list[list[Any]]]:
    """Returns header and rows: the figures of each class, with the ends of their intervals.

    `accuracy` is the recall, under the name that it has without an evaluation.
    """
    header = ["label", "class", "accuracy", "images", "right", "training_images"]
    shares = ("recall", "precision", "f1")
    header += [f"{name}{end}" for name in shares for end in ("", "_low", "_high")]
    rows = []
    for found in measured.classes:
        row = [found.label, found.name, _rounded(found.recall.value), found.images, found.right]
        row.append("" if found.trained is None else found.trained)
        for figure in (found.recall, found.precision, found.f1):
            row += _with_ends(figure)
        rows.append(row)
    return header, rows


def _with_ends(figure: Figure) -> list[Any]:
    low, high = figure.interval or (None, None)
    return [_rounded(value) for value in (figure.value, low, high)]


def _rounded(value: float | None) -> float | str:
    return "" if value is None or math.isnan(value) else round(value, 6)
