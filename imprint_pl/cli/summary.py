"""What a command leaves behind: `summary.json`, `per_class.csv` and a table."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table

from imprint_pl.files import write_whole
from imprint_pl.method.recipes import AUTO

DATA_PARAMETERS = (
    *("classes", "d", "num_labels", "task_seed"),
    *("shots", "val_fraction", "batch_size"),
)

MEASURED = ("accuracy", "macro_f1", "calibration_error")
# Lightning's mark of a figure that belongs to one of several loaders.
OF_LOADER = "/dataloader_idx_"
# What the callback `unknowns.Outsiders` logs.
OUTSIDERS = ("outsiders_auroc", "accepted", "rejected")


def summarise(trainer: Trainer, model: LightningModule, stage: str) -> dict[str, Any]:
    """The figures and parameters of a finished `fit` ("val") or `validate`, `test` ("test").

    Fractions and seconds; `None` where the command did not produce the figure. Of several loaders
    each has its own, as `accuracy/dataloader_idx_0`, ….
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    data, backbone = trainer.datamodule, model.backbone.source()
    recipe, settings = model.parts.parameters["recipe"], dict(model.parts.parameters)
    if recipe == AUTO:
        settings = dict(model.head.settings)
        settings["chosen_recipe"] = settings["recipe"]
    elif "chosen_lam" in model.head.settings:
        settings["chosen_lam"] = model.head.settings["chosen_lam"]
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or trainer.ckpt_path
    return {
        "task": getattr(data, "task", type(data).__name__),
        "recipe": recipe,
        **{name: metrics.get(f"{stage}/{name}") for name in MEASURED},
        **_of_loaders(metrics, stage),
        **{name: metrics[f"{stage}/{name}"] for name in OUTSIDERS if f"{stage}/{name}" in metrics},
        "nc1": metrics.get("train/nc1"),
        "embed_seconds": metrics.get("train/embed_seconds"),
        "gen_seconds": metrics.get("train/gen_seconds"),
        "images_per_second": metrics.get("train/images_per_second"),
        "checkpoint": str(checkpoint) if checkpoint else None,
        **{name: value for name, value in settings.items() if name not in ("recipe", "chosen_by")},
        "temperature_of_probabilities": model.head.temperature,
        "calibrated": model.head.settings.get("calibrated", True),
        "tried": model.head.tried if trainer.state.fn == "fit" else [],
        "seed": model.seed,
        "weibull": model.weibull,
        "num_classes": model.head.num_classes,
        "num_proxies": len(model.head.proxies),
        "backbone": backbone["name"],
        **{name: backbone[name] for name in ("pretrained", "weights", "image_size", "precision")},
        "weights_sha256": backbone["sha256"],
        **{name: getattr(data, name) for name in DATA_PARAMETERS if hasattr(data, name)},
    }


def _of_loaders(metrics: dict[str, float], stage: str) -> dict[str, float]:
    """The figures of each of several loaders, but for those of single classes."""
    own = {name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}
    kinds = (*MEASURED, *OUTSIDERS)
    return {
        name: value
        for name, value in own.items()
        if OF_LOADER in name and name.split(OF_LOADER)[0] in kinds
    }


def write_summary(folder: Path, summary: dict[str, Any], model: LightningModule) -> None:
    """`summary.json`, and `per_class.csv` with each class's accuracy, a column a loader."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: _json_number(value) if isinstance(value, float) else value
        for name, value in summary.items()
    }
    write_whole(folder / "summary.json", f"{json.dumps(plain, indent=2)}\n".encode())
    if model.class_accuracy is not None:
        columns, rows = per_class(model)
        with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for label, name, *values in rows:
                shown = ["" if value is None else round(value, 6) for value in values]
                writer.writerow([label, name, *shown])


def per_class(model: LightningModule) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: label, class, and its accuracy on the loader, or on each of several; `None`
    where it had no sample of the class."""
    accuracies = model.class_accuracy
    names = ["accuracy"]
    if accuracies.ndim == 2:
        names = [f"accuracy{OF_LOADER}{number}" for number in range(len(accuracies))]
    rows = []
    for label, values in enumerate(accuracies.view(len(names), -1).T.tolist()):
        measured = [None if math.isnan(value) else value for value in values]
        rows.append([label, model.head.name_of(label), *measured])
    return ["label", "class", *names], rows


def print_summary(summary: dict[str, Any]) -> None:
    """One row with the figures, under a line that says what was run; first, what `auto` tried."""
    if summary["tried"]:
        _print_tried(summary["tried"])
    loaders = [
        name.removeprefix("accuracy") for name in summary if name.startswith(f"accuracy{OF_LOADER}")
    ]
    table = Table(box=box.ROUNDED)
    rows = [_row(summary, suffix) for suffix in loaders or [""]]
    shown = {name for row in rows for name, value in row.items() if value is not None}
    for name in rows[0]:
        if name in shown:
            table.add_column(name, justify="left" if name in ("task", "recipe") else "right")
    for row in rows:
        table.add_row(*(row[name] for name in row if name in shown))
    console = Console(markup=False)  # a name may look like markup
    console.print(f"\n{_what(summary)}", highlight=False, soft_wrap=True)
    console.print(table)
    if not summary.get("calibrated", True):
        console.print("the probabilities are not calibrated: no temperature was fitted")
    if "outsiders_auroc" in summary:
        console.print(_outsiders(summary), highlight=False, soft_wrap=True)


def _row(summary: dict[str, Any], suffix: str) -> dict[str, str | None]:
    """The table's row of the only loader, or of that of a suffix."""
    return {
        "task": summary["task"],
        "loader": suffix.removeprefix(OF_LOADER) or None,
        "recipe": summary.get("chosen_recipe") or summary["recipe"],
        "accuracy": _number(summary.get(f"accuracy{suffix}"), 100, 2, " %"),
        "macro F1": _number(summary.get(f"macro_f1{suffix}"), 100, 2, " %"),
        "ECE": _number(summary.get(f"calibration_error{suffix}"), 100, 2, " %"),
        "NC1": _number(summary["nc1"], 1, 3),
        "embed": _number(summary["embed_seconds"], 1, 1, " s"),
        "GEN": _number(summary["gen_seconds"], 1, 2, " s"),
    }


def _outsiders(summary: dict[str, Any]) -> str:
    text = f"outsiders: AUROC {summary['outsiders_auroc']:.3f}"
    if "accepted" not in summary:
        return f"{text}; for a threshold fit with --model.accept 0.95"
    accepted, rejected = (_number(summary[name], 100, 1, " %") for name in OUTSIDERS[1:])
    return f"{text}, {rejected} rejected; {accepted} of {summary['task']} accepted"


def _print_tried(tried: list[dict[str, Any]]) -> None:
    """What `auto` compared, on held-out training samples."""
    table = Table(
        "candidate", box=box.ROUNDED, title="auto, on held-out training embeddings", title_style=""
    )
    for column in ("accuracy", "difference", ""):
        table.add_column(column, justify="right")
    measured = ("accuracy", "difference", "standard_error", "chosen")
    for i, row in enumerate(tried):
        keywords = [
            row[name] if name == "norm_pre" else f"{name}={row[name]}"
            for name in row
            if name not in (*measured, "recipe")
        ]
        difference = ""
        if row["accuracy"] is None:
            difference = "too few samples"
        elif i:
            error = 100 * row["standard_error"]
            difference = f"{100 * row['difference']:+.2f} ± {error:.2f}"
        table.add_row(
            " ".join([row["recipe"], *keywords]),
            _number(row["accuracy"], 100, 2, " %"),
            difference,
            "chosen" if row["chosen"] else "",
        )
    console = Console(markup=False)
    console.print()
    console.print(table)


def _what(summary: dict[str, Any]) -> str:
    k = f" k={summary['k']}" if "k" in summary else ""
    chosen = f"auto chose {summary['chosen_recipe']}, " if "chosen_recipe" in summary else ""
    return (
        f"{summary['backbone']}: {chosen}{summary['norm_pre']} / {summary['gen']}{k} / "
        f"{summary['norm_post']} / {summary['norm_inf']} / {summary['agg']}, "
        f"{summary['num_proxies']} proxies for {summary['num_classes']} classes"
    )


def _json_number(value: float) -> float | None:
    # NaN is not JSON. A small λ keeps its digits.
    if not math.isfinite(value):
        return None
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")


def _number(value: float | None, factor: float, digits: int, unit: str = "") -> str | None:
    return None if value is None or math.isnan(value) else f"{value * factor:.{digits}f}{unit}"
