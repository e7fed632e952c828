"""Writes and prints the results of a command: `summary.json`, `per_class.csv` and a table."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from imprint_pl.cli.tables import Side, print_table
from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.evaluation.classes import Measured
from imprint_pl.evaluation.next_step import between, weakness
from imprint_pl.files import write_whole
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.method.recipes import AUTO
from imprint_pl.numerics.measures import METRICS, compared_by

DATA_PARAMETERS = (
    "classes",
    "d",
    "num_labels",
    "task_seed",
    "shots",
    "val_fraction",
    "batch_size",
)
BACKBONE_PARAMETERS = ("pretrained", "weights", "image_size", "precision")
# Most names of layers that the terminal lists.
LAYERS_SHOWN = 3
MEASURED = ("accuracy", "balanced_accuracy", "macro_f1", "calibration_error")
# Lightning's suffix for the name of a figure if there are several loaders.
OF_LOADER = "/dataloader_idx_"
# How many of the weakest classes the terminal shows.
WEAKEST = 3
# The figures that the callback `lightning.outsiders.Outsiders` logs.
OUTSIDERS = ("outsiders_auroc", "outsiders_fpr95", "accepted", "rejected")


class PerClass(NamedTuple):
    """The accuracy of each class as a table.

    Attributes:
        columns: `label`, `class`, and `accuracy`, or a column for each of several loaders.
        rows: a list for each class; an accuracy is `None` if the loader had no sample of the class.
    """

    columns: list[str]
    rows: list[list[Any]]


def summarise(trainer: Trainer, model: ImprintedClassifier, stage: str) -> dict[str, Any]:
    """Collects the figures and parameters of a finished command.

    Args:
        trainer: the Trainer that ran the command.
        model: the classifier that it ran.
        stage: "val" after `fit` and `validate`, "test" after `test`.

    Returns:
        Fractions and seconds by name; `None` if the command did not produce the figure. With
        several loaders each has its own figures: `accuracy/dataloader_idx_0`, ….
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    data, backbone, head = datamodule_of(trainer), model.backbone.source(), model.head
    recipe, settings = model.parts.parameters["recipe"], dict(model.parts.parameters)
    if recipe == AUTO:
        settings = dict(head.settings)
        settings["chosen_recipe"] = settings["recipe"]
    elif "chosen_lam" in head.settings:
        settings["chosen_lam"] = head.settings["chosen_lam"]
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
        "temperature_of_probabilities": head.temperature,
        "calibrated": head.settings.get("calibrated", True),
        "tried": head.tried if trainer.state.fn == "fit" else [],
        "seed": model.seed,
        "weibull": model.weibull,
        "num_classes": head.num_classes,
        "num_proxies": len(head.proxies),
        "backbone": backbone["name"],
        **({"runtime": runtime} if (runtime := model.backbone.runtime.running) != "torch" else {}),
        **{name: backbone[name] for name in BACKBONE_PARAMETERS},
        "layers": model.backbone.layers_in_short,
        "layer_widths": head.layer_widths,
        "views": model.backbone.views,
        "embedding_dim": head.embedding_dim,
        "weights_sha256": backbone["sha256"],
        **{name: getattr(data, name) for name in DATA_PARAMETERS if hasattr(data, name)},
    }


def _of_loaders(metrics: dict[str, float], stage: str) -> dict[str, float]:
    """Returns the figures of each of several loaders, without those of single classes."""
    own = {name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}
    kinds = (*MEASURED, *OUTSIDERS)
    return {
        name: value
        for name, value in own.items()
        if OF_LOADER in name and name.split(OF_LOADER)[0] in kinds
    }


def write_summary(
    folder: Path, summary: dict[str, Any], model: ImprintedClassifier, with_classes: bool = True
) -> None:
    """Writes `summary.json` and perhaps `per_class.csv`.

    Args:
        folder: the folder for the files.
        summary: the result of `summarise`.
        model: the classifier.
        with_classes: whether to write `per_class.csv`, with each class's accuracy in a column for
            each loader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: _json_number(value) if isinstance(value, float) else value
        for name, value in summary.items()
    }
    write_whole(folder / "summary.json", f"{json.dumps(plain, indent=2)}\n".encode())
    table = per_class(model) if with_classes else None
    if table is not None:
        with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table.columns)
            for label, name, *values in table.rows:
                rounded = ["" if value is None else round(value, 6) for value in values]
                writer.writerow([label, name, *rounded])


def per_class(model: ImprintedClassifier) -> PerClass | None:
    """Returns each class's accuracy; `None` if nothing was measured."""
    accuracies = model.class_accuracy
    if accuracies is None:
        return None
    names = ["accuracy"]
    if accuracies.ndim == 2:
        names = [f"accuracy{OF_LOADER}{number}" for number in range(len(accuracies))]
    rows = []
    for label, values in enumerate(accuracies.view(len(names), -1).T.tolist()):
        measured = [None if math.isnan(value) else value for value in values]
        rows.append([label, model.head.name_of(label), *measured])
    return PerClass(["label", "class", *names], rows)


def print_summary(summary: dict[str, Any]) -> None:
    """Prints the candidates of `auto`, a line about the run, and a row of figures per loader."""
    if summary["tried"]:
        _print_tried(summary["tried"])
    loaders = [
        name.removeprefix("accuracy") for name in summary if name.startswith(f"accuracy{OF_LOADER}")
    ]
    rows = [_row(summary, suffix) for suffix in loaders or [""]]
    # Leave out columns that are empty in all rows.
    columns: dict[str, Side] = {
        name: "left" if name in ("task", "recipe") else "right"
        for name in rows[0]
        if any(row[name] is not None for row in rows)
    }
    print(f"\n{_what(summary)}\n{_layers(summary)}")
    if "runtime" in summary:
        print(f"the backbone ran in {summary['runtime']}")
    print_table(columns, ([row[name] for name in columns] for row in rows))
    if not summary.get("calibrated", True):
        print("the probabilities are not calibrated: no temperature was fitted")
    if "outsiders_auroc" in summary:
        print(_outsiders(summary))


def print_weakest(measured: Measured, loader: str = "") -> None:
    """Prints the three weakest classes.

    Args:
        measured: the figures of a loader.
        loader: the loader's number, if there are several.
    """
    weakest = [found for found in measured.weakest() if found.wrong][:WEAKEST]
    of = f" of loader {loader}" if loader else ""
    if not weakest:
        print(f"weakest classes{of}: none, no image is wrong ({between(measured.accuracy)})")
        return
    print(f"weakest classes{of}:")
    for found in weakest:
        print(f"  {weakness(found, measured)}")


def _row(summary: dict[str, Any], suffix: str) -> dict[str, str | None]:
    """Returns the table's row for the only loader (`suffix` is empty) or for one of several."""
    return {
        "task": summary["task"],
        "loader": suffix.removeprefix(OF_LOADER) or None,
        "recipe": summary.get("chosen_recipe") or summary["recipe"],
        "accuracy": _number(summary.get(f"accuracy{suffix}"), 100, 2, " %"),
        "balanced": _number(summary.get(f"balanced_accuracy{suffix}"), 100, 2, " %"),
        "macro F1": _number(summary.get(f"macro_f1{suffix}"), 100, 2, " %"),
        "ECE": _number(summary.get(f"calibration_error{suffix}"), 100, 2, " %"),
        "NC1": _number(summary["nc1"], 1, 3),
        "embed": _number(summary["embed_seconds"], 1, 1, " s"),
        "GEN": _number(summary["gen_seconds"], 1, 2, " s"),
    }


def _outsiders(summary: dict[str, Any]) -> str:
    text = f"outsiders: AUROC {summary['outsiders_auroc']:.3f}"
    if "outsiders_fpr95" in summary:
        passing = _number(summary["outsiders_fpr95"], 100, 1, " %")
        text += f", {passing} pass where 95 % of the others do"
    if "accepted" not in summary:
        return f"{text}; for a threshold fit with --model.accept 0.95"
    accepted, rejected = (_number(summary[name], 100, 1, " %") for name in OUTSIDERS[2:])
    return f"{text}, {rejected} rejected; {accepted} of {summary['task']} accepted"


def _print_tried(tried: list[dict[str, Any]]) -> None:
    """Prints the candidates that `auto` compared on held-out training samples, the best first."""
    measured = ("recipe", "difference", "standard_error", "chosen", *METRICS)
    metric, rows = compared_by(tried), []
    for i, row in enumerate(tried):
        keywords = [
            row[name] if name == "norm_pre" else f"{name}={row[name]}"
            for name in row
            if name not in measured
        ]
        difference = ""
        if row[metric] is None:
            difference = "too few samples"
        elif i:
            error = 100 * row["standard_error"]
            difference = f"{100 * row['difference']:+.2f} ± {error:.2f}"
        rows.append(
            [
                " ".join([row["recipe"], *keywords]),
                _number(row[metric], 100, 2, " %"),
                difference,
                "chosen" if row["chosen"] else "",
            ]
        )
    print()
    print_table(
        {
            "candidate": "left",
            metric.replace("_", " "): "right",
            "difference": "right",
            "": "right",
        },
        rows,
        "auto, on held-out training embeddings",
    )


def _what(summary: dict[str, Any]) -> str:
    k = f" k={summary['k']}" if "k" in summary else ""
    chosen = f"auto chose {summary['chosen_recipe']}, " if "chosen_recipe" in summary else ""
    return (
        f"{summary['backbone']}: {chosen}{summary['norm_pre']} / {summary['gen']}{k} / "
        f"{summary['norm_post']} / {summary['norm_inf']} / {summary['agg']}, "
        f"{summary['num_proxies']} proxies for {summary['num_classes']} classes"
    )


def _layers(summary: dict[str, Any]) -> str:
    layers, widths = summary["layers"], summary["layer_widths"]
    if widths is None:
        text = f"last ({summary['embedding_dim']:,} numbers)"
    else:
        shown = "all" if layers == "all" else "some"
        if isinstance(layers, list) and len(layers) <= LAYERS_SHOWN:
            shown = ", ".join([*layers, "last"])
        text = f"{shown} ({len(widths)} vectors, {summary['embedding_dim']:,} numbers)"
    views = "" if summary["views"] == "none" else f"; views: {summary['views']}"
    return f"layers: {text}{views}"


def _json_number(value: float) -> float | None:
    # JSON has no NaN. Numbers below 1 keep six significant digits, so that a small λ does not
    # become 0.
    if not math.isfinite(value):
        return None
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")


def _number(value: float | None, factor: float, digits: int, unit: str = "") -> str | None:
    return None if value is None or math.isnan(value) else f"{value * factor:.{digits}f}{unit}"
