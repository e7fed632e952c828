"""The wandb workspace that compares recipes, and a run for each result of a sweep.

It knows the names that fits and sweeps log, and nothing about training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

from imprint_pl.errors import needs

NAME = "imprinting recipes"

# Fits and sweeps log these figures under the same names, so that one workspace compares both.
FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "nc1",
    "vci",
    "gen_seconds",
    "inference_seconds",
    "embed_seconds",
    "images_per_second",
    "purity",
)

# Longest tag that wandb accepts.
LONGEST_TAG = 64


def workspace(entity: str, project: str, name: str = NAME) -> Workspace:
    """Returns the workspace. It is not saved: `.save()` needs a login and a network.

    Its sections show accuracy by recipe, backbone and task; the effect of a recipe's parameters (on
    accuracy, NC1 and time, all at once); and the pictures of single fits.

    Args:
        entity: the wandb user or team.
        project: the project of the runs.
        name: the title of the workspace.
    """
    with needs("sweep", "dashboard"):
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws

    def bars(title: str, metric: str, by: str, axis: str) -> wr.BarPlot:
        return wr.BarPlot(
            title=title,
            metrics=[wr.SummaryMetric(metric)],
            groupby=wr.Config(by),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            title_x=axis,
            orientation="h",
            max_bars_to_show=30,
        )

    def dots(title: str, x: Any, y: str, log_x: bool = False) -> wr.ScatterPlot:
        return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(y), log_x=log_x)

    columns = [
        ("c::recipe", "recipe"),
        ("c::gen", "GEN"),
        ("c::k", "k"),
        ("c::norm_pre", "NORM_pre"),
        ("c::agg", "AGG"),
        ("summary::nc1", "NC1"),
        ("summary::accuracy", "accuracy"),
    ]
    compare = ws.Section(
        name="Which recipe",
        is_open=True,
        panels=[
            bars("Accuracy by recipe", "accuracy", "recipe", "accuracy (fraction)"),
            bars("Macro F1 by recipe", "macro_f1", "recipe", "macro F1 (fraction)"),
            bars("Seconds of GEN by recipe", "gen_seconds", "recipe", "seconds"),
            bars("Accuracy by backbone", "accuracy", "backbone", "accuracy (fraction)"),
            bars("Accuracy by task", "accuracy", "task", "accuracy (fraction)"),
            wr.RunComparer(diff_only="split"),
        ],
    )
    why = ws.Section(
        name="Why",
        is_open=True,
        panels=[
            dots("Accuracy against k", wr.Config("k"), "accuracy", log_x=True),
            dots("Accuracy against shots", wr.Config("shots"), "accuracy", log_x=True),
            dots("Accuracy against NC1", wr.SummaryMetric("nc1"), "accuracy"),
            dots("Accuracy against GEN seconds", wr.SummaryMetric("gen_seconds"), "accuracy", True),
            wr.ParallelCoordinatesPlot(
                title="From parts to accuracy",
                columns=[
                    wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=shown)
                    for metric, shown in columns
                ],
            ),
            wr.ParameterImportancePlot(with_respect_to="accuracy"),
        ],
    )
    fits = ws.Section(
        name="Single fits",
        panels=[wr.MediaBrowser(title="Proxy gallery", media_keys=["gallery"], num_columns=1)],
    )
    return ws.Workspace(
        name=name,
        entity=entity,
        project=project,
        sections=[compare, why, fits],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            pinned_columns=[
                "run:displayName",
                "config:recipe.value",
                "config:backbone.value",
                "config:task.value",
                "summary:accuracy",
                "summary:nc1",
            ],
        ),
    )


def log_sweep(
    results: str | Path, project: str, entity: str | None = None, offline: bool = False
) -> int:
    """Logs a run for each row of a sweep's results.

    The runs of a sweep are one group, named after its folder, and tagged with backbone, data, task
    and recipe. Each row has its own run id, so that it replaces its run when it is logged again.

    Args:
        results: a results file or its folder, see `report.read.read_results`.
        project: the wandb project.
        entity: the wandb user or team; the login's own by default.
        offline: write the runs below `wandb/` instead of sending them.

    Returns:
        How many runs were logged.
    """
    import wandb
    from tqdm import tqdm

    from imprint_pl.experiments.report.read import find_results, read_results

    path = find_results(results).resolve()
    group = path.parent.name if path.stem == "results" else path.stem
    rows = read_results(path).drop(columns="group")
    settings = wandb.Settings(
        silent=True, disable_git=True, disable_code=True, x_disable_stats=True
    )
    for row in tqdm(rows.to_dict("records"), desc=f"wandb: {group}", unit=" runs"):
        # Empty cells are None or NaN, which is not equal to itself.
        given = {
            str(name): value for name, value in row.items() if value == value and value is not None
        }
        method = given.pop("method")
        figures = {name: given.pop(name) for name in FIGURES if name in given}
        run = wandb.init(
            project=project,
            entity=entity,
            group=group,
            job_type="sweep",
            name=f"{method} · {row['backbone']} · {row['data']} · {row['task']}",
            id=str(given.pop("id", "")) or None,
            tags=tags_of(given, "backbone", "data", "task", "recipe"),
            config=given,
            mode="offline" if offline else "online",
            settings=settings,
            # Without this, wandb would return a run that is still open instead of a new one.
            reinit="finish_previous",
        )
        run.summary.update(figures)
        run.finish()
    return len(rows)


def tags_of(values: Mapping[str, Any], *names: str) -> list[str]:
    """Returns the values of these names as tags, each once, cut to the length that wandb allows."""
    return list(dict.fromkeys(str(values[name])[:LONGEST_TAG] for name in names))
