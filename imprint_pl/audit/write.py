"""Writes the findings of an audit: four CSVs and the page."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from imprint_pl.audit.find import Audit
from imprint_pl.audit.page import audit_page
from imprint_pl.errors import ImprintError
from imprint_pl.files import write_whole


def write_audit(found: Audit, folder: str | Path, name: str, progress: bool = False) -> Path:
    """Writes `audit.html`, `labels.csv`, `duplicates.csv`, `images.csv` and `classes.csv`.

    `labels.csv` has every checked label, the most suspicious first.

    Args:
        found: the findings.
        folder: the folder for the files; made if it does not exist.
        name: the name of the data set, for the title.
        progress: show a bar on stderr while the pictures are read.

    Returns:
        The path of the page.

    Raises:
        ImprintError: the folder cannot be written to.
    """
    folder = Path(folder)
    samples = found.samples
    try:
        folder.mkdir(parents=True, exist_ok=True)
        labels = []
        if (scores := found.scores) is not None:
            for i in scores.ranking().tolist():
                likely = found.class_names[int(scores.likely[i])]
                numbers = f"{scores.given[i]:.6f}", f"{scores.probability[i]:.6f}"
                own = (samples.names[i], samples.split[i], found.label(i))
                labels.append((*own, numbers[0], likely, numbers[1]))
        columns = "file", "split", "class", "probability", "likely_class", "likely_probability"
        _write(folder / "labels.csv", columns, labels)
        _write(
            folder / "duplicates.csv",
            ("kind", "cosine", "file", "split", "class", "file_2", "split_2", "class_2"),
            (
                (
                    pair.kind,
                    f"{pair.cosine:.4f}",
                    *(samples.names[pair.a], samples.split[pair.a], found.label(pair.a)),
                    *(samples.names[pair.b], samples.split[pair.b], found.label(pair.b)),
                )
                for pair in found.pairs
            ),
        )
        broken = [(path, "", "", "broken", reason) for path, reason in found.unreadable.items()]
        issues = [
            (samples.names[s], samples.split[s], found.label(s), kind, reason)
            for s, kind, reason in found.issues
        ]
        _write(
            folder / "images.csv",
            ("file", "split", "class", "kind", "reason"),
            [*broken, *issues],
        )
        counts = class_counts(found)
        rows = [(class_name, *of_class.values()) for class_name, of_class in counts.items()]
        _write(folder / "classes.csv", ("class", *samples.images), rows)
        page = audit_page(found, name, counts, progress)
        return write_whole(folder / "audit.html", page.encode())
    except OSError as error:
        raise ImprintError(
            f"{folder} cannot be written to ({error.strerror}): give --output FOLDER"
        ) from error


def class_counts(found: Audit) -> dict[str, dict[str, int]]:
    """Returns how many images each class has in each split."""
    counts = {name: dict.fromkeys(found.samples.images, 0) for name in found.class_names}
    for i, split in enumerate(found.samples.split):
        counts[found.label(i)][split] += 1
    return counts


def _write(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    # Keep the bytes of a name that is not UTF-8, as in the CSV of `predict`.
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([columns, *rows])
