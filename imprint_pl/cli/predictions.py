"""What `predict` writes: the classes of each image with their probabilities, as CSV, JSON or JSON
lines. The rows go into a file beside the output, which takes its place when all are there.

A file name that is not UTF-8 keeps its bytes in a CSV (read it with `errors="surrogateescape"`) and
stands as `\\udc…` in JSON, so that what is read back opens the file.
"""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from imprint_pl.data.loaders import sampler_length
from imprint_pl.errors import ImprintError, shown
from imprint_pl.method.head import NONE
from imprint_pl.ranks import positions_in_dataset
from imprint_pl.training_set.store import RowStore

SUFFIXES = (".csv", ".json", ".jsonl")
# In the place of a label: the image could not be read.
SKIPPED = -2


class PredictionWriter(Callback):
    """Writes a row an image: file or index, label, class, score (the logit), probability.

    The label is −1, the class "none of these" and the probability empty (null in JSON) where the
    head has a threshold that no score reaches; the score is the best all the same. One process
    writes each batch at once; of several, the first writes all at the end. The output appears when
    it is whole: after a failure the file that was there is still there.

    Args:
        path: ends in .csv, .json (one list) or .jsonl (an object a line); `predictions.csv` in the
            run's folder where `None`.
        top: classes an image; those after the best as `class_2`, `probability_2`, …
    """

    def __init__(self, path: str | None = None, top: int = 1) -> None:
        self.path = None if path is None else Path(path)
        self.top = top
        if top < 1:
            raise ImprintError(f"top={top}: give at least 1")
        if self.path is not None and self.path.suffix not in SUFFIXES:
            raise ImprintError(f"output {path}: the name ends in none of {', '.join(SUFFIXES)}")
        self._file = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every rank asks: log_dir is a broadcast.
        folder = trainer.log_dir
        if self.path is None:
            self.path = Path(folder or trainer.default_root_dir) / "predictions.csv"
        self.count, self.unread = 0, []
        self._reasons: dict[int, str] = {}
        self._store = RowStore(sampler_length(trainer.predict_dataloaders))
        self._names = getattr(trainer.datamodule, "sample_names", lambda split: None)("predict")
        self._seen = 0
        if trainer.is_global_zero:
            self._open(min(self.top, pl_module.head.num_classes))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        top = min(self.top, outputs.shape[1])
        best = outputs.topk(top, dim=1)
        labels = best.indices[:, 0].clone()
        head = pl_module.head
        if head.threshold is not None:
            # Logits are scores over the temperature.
            labels[best.values[:, 0] < head.threshold / head.temperature] = NONE
        skipped = batch.get("skipped", {}) if isinstance(batch, dict) else {}
        for place, reason in skipped.items():
            labels[place] = SKIPPED
            self._reasons[int(positions_in_dataset(self._seen + int(place), 1))] = reason
        probabilities = outputs.softmax(1).gather(1, best.indices)
        # Classes are whole numbers below 2^24, exact in float32. A class without proxies has −∞.
        values = best.values.clamp(min=torch.finfo(torch.float32).min)
        row = torch.cat([best.indices.float(), values, probabilities], 1)
        # Of a skipped file nothing is written, and the store takes no NaN.
        row[list(skipped)] = 0
        self._seen += len(labels)
        if trainer.world_size == 1:
            self._write(row.cpu(), labels.cpu(), head)
        else:
            self._store.add(row, labels)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            gathered = self._store.gather()
            reasons = [{}] * trainer.world_size
            torch.distributed.all_gather_object(reasons, self._reasons)
            if gathered is not None:
                for of_rank in reasons:
                    self._reasons |= of_rank
                self._write(*gathered, pl_module.head)
        if self._file is not None:
            if self.path.suffix == ".json":
                self._file.write("\n]\n")
            self._file.close()
            # Where the output is a link, what it leads to.
            os.replace(self._file.name, os.path.realpath(self.path))
            self._file = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        if self._file is not None:
            # What is still to be written may be what failed.
            with suppress(OSError):
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _open(self, top: int) -> None:
        """Opens the file beside the output, and begins it."""
        if self.path.is_dir():
            raise ImprintError(f"output {shown(self.path)} is a folder: name a file in it")
        if self.path.exists() and not (self.path.is_file() and os.access(self.path, os.W_OK)):
            raise ImprintError(f"output {shown(self.path)} cannot be written: give another file")
        place = Path(os.path.realpath(self.path)).parent
        try:
            place.mkdir(parents=True, exist_ok=True)
            number, temporary = tempfile.mkstemp(".unfinished", "predictions-", place)
            os.close(number)
            # A temporary file is its owner's alone; the output is as open as any.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        except OSError as error:
            raise ImprintError(
                f"output {shown(self.path)} cannot be written ({error.strerror}): give a place "
                "where you may write"
            ) from error
        # In JSON a byte that is no text is \udc… by the format's own rules.
        errors = "surrogateescape" if self.path.suffix == ".csv" else "backslashreplace"
        self._file = open(temporary, "w", newline="", encoding="utf-8", errors=errors)  # noqa: SIM115
        if self.path.suffix == ".json":
            self._file.write("[")
        elif self.path.suffix == ".csv":
            first = "index" if self._names is None else "file"
            extra = [f"{n}_{i}" for i in range(2, top + 1) for n in ("class", "probability")]
            self._columns = [first, "label", "class", "score", "probability", *extra]
            csv.writer(self._file).writerow(self._columns)

    def summary(self) -> str:
        """What was written, and which files were skipped and why."""
        lines = [f"{self.count:,} predictions: {shown(self.path)}"]
        if self.unread:
            lines = [f"skipped {len(self.unread)} that cannot be read:", *self.unread, *lines]
        return "\n".join(lines)

    def _write(self, rows: Tensor, labels: Tensor, head: Any) -> None:
        top = rows.shape[1] // 3
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            index = self.count + len(self.unread)
            sample = index if self._names is None else self._names[index]
            if label == SKIPPED:
                self.unread.append(f"  {self._reasons.get(index) or shown(str(sample))}")
                continue
            classes, scores, probabilities = row[:top], row[top : 2 * top], row[2 * top :]
            if math.isnan(probabilities[0]):
                raise ImprintError(
                    f"{shown(str(sample))}: its embedding is not finite; look at that image, or at "
                    "the backbone's weights and precision"
                )
            record = {
                "index" if self._names is None else "file": sample,
                "label": label,
                "class": head.name_of(label),
                "score": float(f"{scores[0]:.6g}"),
                # Of none of the classes no probability is known, least of all that of the nearest.
                "probability": None if label == NONE else round(probabilities[0], 6),
            }
            for place in range(0 if label == NONE else 1, top) if self.top > 1 else []:
                # Where none is accepted, the nearest class comes second.
                at = place + 2 if label == NONE else place + 1
                record[f"class_{at}"] = head.name_of(int(classes[place]))
                record[f"probability_{at}"] = round(probabilities[place], 6)
            self._put(record)
            self.count += 1
        self._file.flush()

    def _put(self, record: dict[str, Any]) -> None:
        if self.path.suffix == ".csv":
            values = [record.get(column, "") for column in self._columns]
            csv.writer(self._file).writerow(values)
            return
        text = json.dumps(record, ensure_ascii=False)
        if self.path.suffix == ".json":
            text = f"{',' if self.count else ''}\n{text}"
        self._file.write(text if self.path.suffix == ".json" else f"{text}\n")
