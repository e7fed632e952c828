"""Writes the output of `predict`: the classes of each image with their probabilities, as CSV, JSON
or JSON lines.

A file name that is not UTF-8 keeps its bytes in a CSV (read it with `errors="surrogateescape"`) and
is written as `\\udc…` in JSON, so that the file can be opened by the name that is read back.
"""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from imprint_pl.cli.sorting import ClassFolders
from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.data.lightning_packages import run_folder
from imprint_pl.data.loaders import sampler_length
from imprint_pl.errors import ImprintError, shown
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.method.head import NONE, ImprintedHead
from imprint_pl.method.sets import checked_coverage
from imprint_pl.ranks import positions_in_dataset
from imprint_pl.training_set.store import RowStore

SUFFIXES = (".csv", ".json", ".jsonl")
# Up to `FEW` images the terminal shows each label. With more it shows the number of images of each
# class, for at most `MOST_SAID` classes.
FEW, MOST_SAID = 20, 30
# Replaces the label of an image that could not be read.
SKIPPED = -2


class PredictionWriter(Callback):
    """Writes a row for each image: file or index, label, class, score (the logit), probability.

    For a head that was fitted with `accept` the rows also have the familiarity. If an image does
    not reach the head's threshold, the label is −1, the class "none of these" and the probability
    empty (null in JSON); the score is still the best one. A single process writes each batch at
    once; with several, the first one writes all rows at the end.

    Args:
        path: the output, which ends in .csv, .json (one list) or .jsonl (one object per line);
            `None` stands for `predictions.csv` in the run's folder.
        top: how many classes to write for an image; those after the best are `class_2`,
            `probability_2`, ….
        sort_into: folder to copy the images into, a folder for each class; they must be files.
        coverage: write a prediction set for each image, the list of the classes that may be true
            (in a CSV as JSON), which holds the truth with this probability. A head that was fitted
            with `coverage` has sets in any case, and is needed for them.

    Attributes:
        count: how many images were predicted.
        classes: how many of them each class has.
        unread: a line for each file that was skipped, with the reason.
    """

    def __init__(
        self,
        path: str | None = None,
        top: int = 1,
        sort_into: str | None = None,
        coverage: float | None = None,
    ) -> None:
        self.sort_into = sort_into
        self.classes: Counter[str] = Counter()
        self._folders: ClassFolders | None = None
        # The terminal's lines for each image, if there are few.
        self._lines: list[str] = []
        self.path = None if path is None else Path(path)
        self.top = top
        self.coverage = None if coverage is None else checked_coverage(coverage)
        if top < 1:
            raise ImprintError(f"top={top}: give at least 1")
        if self.path is not None and self.path.suffix not in SUFFIXES:
            raise ImprintError(f"output {path}: the name ends in none of {', '.join(SUFFIXES)}")
        self.count = 0
        self.unread: list[str] = []
        self._file: PredictionFile | None = None
        self._listening = ExitStack()
        self._familiarity: Tensor | None = None
        self._bounds: Tensor | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        head, folder = _head_of(pl_module), run_folder(trainer)
        self._bounds = None
        if self.coverage is not None or head.coverage is not None:
            self._bounds = head.bounds(self.coverage)
        if self.path is None:
            self.path = folder / "predictions.csv"
        self.count, self.unread = 0, []
        self.classes, self._lines = Counter(), []
        self._reasons: dict[int, str] = {}
        self._store = RowStore(sampler_length(trainer.predict_dataloaders))
        data = datamodule_of(trainer)
        self._names = getattr(data, "sample_names", lambda split: None)("predict")
        self._sample = "index" if self._names is None else "file"
        self._seen = 0
        if trainer.is_global_zero:
            if self.sort_into is not None:
                names = [head.name_of(label) for label in range(head.num_classes)]
                self._folders = ClassFolders(self.sort_into, names)
            top = min(self.top, head.num_classes)
            more = [f"{name}_{i}" for i in range(2, top + 1) for name in ("class", "probability")]
            known = [] if head.familiar.is_empty else ["familiarity"]
            known += [] if self._bounds is None else ["set"]
            columns = [self._sample, "label", "class", "score", "probability", *known, *more]
            self._file = PredictionFile(self.path, columns)
        self._listening.callback(head.register_forward_hook(self._heard).remove)

    def _heard(self, head: ImprintedHead, inputs: Any, logits: Tensor) -> None:
        # Compute the familiarity here, since it is not in the logits that the module returns.
        scores = logits / head.log_scale.exp()
        none = head.familiar.is_empty
        self._familiarity = None if none else head.familiarity(inputs[0], scores)

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
        head = _head_of(pl_module)
        known = self._familiarity
        if head.threshold is not None:
            # Logits are scores divided by the temperature.
            scores = outputs / head.log_scale.exp()
            labels[head.decide(scores, known) == NONE] = NONE
        skipped = batch.get("skipped", {}) if isinstance(batch, dict) else {}
        for place, reason in skipped.items():
            labels[place] = SKIPPED
            self._reasons[int(positions_in_dataset(self._seen + int(place), 1))] = reason
        probabilities = outputs.softmax(1).gather(1, best.indices)
        # Class indices are below 2^24 and therefore exact in float32. The logit of a class without
        # proxies is −∞, which the store refuses.
        values = best.values.clamp(min=torch.finfo(torch.float32).min)
        more = [] if known is None else [known[:, None]]
        if self._bounds is not None:
            sets = (
                head.sets_of(outputs, self._bounds) & (labels != NONE).to(outputs.device)[:, None]
            )
            more.append(sets.to(probabilities))
        row = torch.cat([best.indices.float(), values, probabilities, *more], 1)
        # The values of a skipped file are not written, but must not be NaN in the store.
        row[list(skipped)] = 0
        self._seen += len(labels)
        if trainer.world_size == 1:
            self._write(row.cpu(), labels.cpu(), head)
        else:
            self._store.add(row, labels)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            gathered = self._store.gather()
            reasons: list[Any] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(reasons, self._reasons)
            if gathered is not None:
                for of_rank in reasons:
                    self._reasons |= of_rank
                self._write(*gathered, _head_of(pl_module))
        self._listening.close()
        if self._file is not None:
            self._file.finish()
            self._file = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._listening.close()
        if self._file is not None:
            self._file.discard()
            self._file = None

    def summary(self) -> str:
        """Returns a text about what was written, and which files were skipped and why."""
        lines = self._lines
        if self.count > FEW:
            lines = [f"  {n:>9,}  {shown(name)}" for name, n in self.classes.most_common(MOST_SAID)]
            if len(self.classes) > MOST_SAID:
                lines.append(f"             and {len(self.classes) - MOST_SAID} more classes")
        lines = [*lines, f"{self.count:,} predictions: {shown(self.path or '')}"]
        if self._folders is not None:
            lines.append(str(self._folders))
        if self.unread:
            lines = [f"skipped {len(self.unread)} that cannot be read:", *self.unread, *lines]
        return "\n".join(lines)

    def _write(self, rows: Tensor, labels: Tensor, head: ImprintedHead) -> None:
        """Writes a batch on rank 0.

        Args:
            rows: `(B, 3 * top)`: the classes of the best logits, the logits, the probabilities;
                then, if they are written, the familiarity and for each class whether it is in the
                prediction set.
            labels: `(B,)`, a class, `NONE` or `SKIPPED`.
            head: names the classes.
        """
        assert self._file is not None
        top = min(self.top, head.num_classes)
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            index = self.count + len(self.unread)
            sample = index if self._names is None else self._names[index]
            if label == SKIPPED:
                self.unread.append(f"  {self._reasons.get(index) or shown(str(sample))}")
                continue
            classes, scores, probabilities = row[:top], row[top : 2 * top], row[2 * top : 3 * top]
            if math.isnan(probabilities[0]):
                raise ImprintError(
                    f"{shown(str(sample))}: its embedding is not finite; look at that image, or at "
                    "the backbone's weights and precision"
                )
            record = {
                self._sample: sample,
                "label": label,
                "class": head.name_of(label),
                "score": float(f"{scores[0]:.6g}"),
                # The probability of "none of these" is unknown; it is not that of the nearest
                # class.
                "probability": None if label == NONE else round(probabilities[0], 6),
            }
            if not head.familiar.is_empty:
                record["familiarity"] = float(f"{row[3 * top]:.6g}")
            if self._bounds is not None:
                inside = row[-head.num_classes :]
                record["set"] = [head.name_of(c) for c, one in enumerate(inside) if one]
            for place in range(0 if label == NONE else 1, top) if self.top > 1 else []:
                # If no class is accepted, the nearest class comes second.
                at = place + 2 if label == NONE else place + 1
                record[f"class_{at}"] = head.name_of(int(classes[place]))
                record[f"probability_{at}"] = round(probabilities[place], 6)
            self._file.put(record)
            self.classes[record["class"]] += 1
            if len(self._lines) < FEW:
                sure = "" if label == NONE else f" ({100 * probabilities[0]:.0f} %)"
                self._lines.append(f"  {shown(str(sample))}: {shown(record['class'])}{sure}")
            if self._folders is not None:
                self._folders.put(str(sample), record["class"])
            self.count += 1
        self._file.flush()


class PredictionFile:
    """The output of `predict`, which appears only when it is complete.

    Records are written to a temporary file beside it. After a failure an older output is unchanged.

    Args:
        path: the output; its suffix decides on the format.
        columns: the columns of a CSV.

    Raises:
        ImprintError: the output cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self._is_first = True
        if path.is_dir():
            raise ImprintError(f"output {shown(path)} is a folder: name a file in it")
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise ImprintError(f"output {shown(path)} cannot be written: give another file")
        # If the output is a link, replace the file that it points to.
        self._target = Path(os.path.realpath(path))
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            number, self._temporary = tempfile.mkstemp(
                ".unfinished", "predictions-", self._target.parent
            )
            os.close(number)
            # Temporary files are readable for their owner only; give the output the usual
            # permissions.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(self._temporary, 0o666 & ~mask)
        except OSError as error:
            raise ImprintError(
                f"output {shown(path)} cannot be written ({error.strerror}): give a place "
                "where you may write"
            ) from error
        # In JSON, bytes that are not UTF-8 are written as \udc….
        errors = "surrogateescape" if path.suffix == ".csv" else "backslashreplace"
        self._file = open(self._temporary, "w", newline="", encoding="utf-8", errors=errors)  # noqa: SIM115
        if path.suffix == ".json":
            self._file.write("[")
        elif path.suffix == ".csv":
            csv.writer(self._file).writerow(columns)

    def put(self, record: dict[str, Any]) -> None:
        """Adds a record."""
        if self.path.suffix == ".csv":
            values = [record.get(column, "") for column in self.columns]
            csv.writer(self._file).writerow(
                json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in values
            )
            return
        text = json.dumps(record, ensure_ascii=False)
        if self.path.suffix == ".json":
            self._file.write(f"{'' if self._is_first else ','}\n{text}")
        else:
            self._file.write(f"{text}\n")
        self._is_first = False

    def flush(self) -> None:
        """Writes buffered records to the temporary file."""
        self._file.flush()

    def finish(self) -> None:
        """Moves the complete file to its final place."""
        if self.path.suffix == ".json":
            self._file.write("\n]\n")
        self._file.close()
        os.replace(self._temporary, self._target)

    def discard(self) -> None:
        """Removes the unfinished file."""
        # Closing writes the rest of the buffer, which may fail again.
        with suppress(OSError):
            self._file.close()
        Path(self._temporary).unlink(missing_ok=True)


def _head_of(module: LightningModule) -> ImprintedHead:
    """Returns the head of the module, which is always an `ImprintedClassifier` here."""
    return cast(ImprintedClassifier, module).head
