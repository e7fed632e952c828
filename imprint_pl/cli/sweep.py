"""The command `sweep`: options and output."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from imprint_pl.cli.arguments import PROGRAM, ArgumentParser
from imprint_pl.cli.tables import Side, print_table
from imprint_pl.errors import ImprintError
from imprint_pl.experiments import CHUNK_BYTES
from imprint_pl.method.recipes import AUTO, KEYWORDS
from imprint_pl.parts.by_name import SLOTS

if TYPE_CHECKING:
    import pandas as pd

BEST = 5
AFTERWARDS = (
    "The same command goes on after a kill. Afterwards: `report results/<name>` for tables and a "
    "page, `dashboard results/<name> --project P` for a wandb run each, grouped and tagged."
)


def run(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: its arguments, without its name.
    """
    parser = ArgumentParser(
        prog=f"{PROGRAM} sweep",
        description="Run a grid of recipes on many backbones, data sets and tasks.",
        epilog=AFTERWARDS,
    )
    parser.add_argument("--config", required=True, help="the sweep's YAML, configs/sweeps/….yaml")
    parser.add_argument("--results_dir", default="results", help="results go to DIR/<name>/")
    parser.add_argument("--cache_dir", default="cache", help="the embedding cache")
    parser.add_argument("--n_jobs", type=int, default=1, help="processes; 1 uses threads instead")
    parser.add_argument("--dask", help='address of a Dask scheduler, or "local": two workers here')
    parser.add_argument(
        "--chunk_mb",
        type=int,
        default=CHUNK_BYTES >> 20,
        help="memory besides the embeddings, a process (%(default)s)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="count configurations and estimate the time"
    )
    options = parser.parse_args(argv)
    if options.n_jobs == 0 or options.chunk_mb < 1:
        raise ImprintError("--n_jobs is not 0 (-1: all cores), --chunk_mb at least 1")
    # Import here, so that `--help` works without the packages of the extra `sweep`.
    from imprint_pl.experiments.sweep import describe, read_sweep, sweep

    plan = read_sweep(options.config)
    # Otherwise embedding would log a line for each batch of work.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    size = describe(plan, options.n_jobs)
    print(
        f"{plan.name}: {size.combinations:,} combinations, {size.configurations:,} configurations "
        f"after pruning; about {_duration(size.seconds)} besides embedding"
    )
    if options.dry_run:
        return
    start = time.perf_counter()
    try:
        table = sweep(
            plan,
            options.results_dir,
            options.cache_dir,
            n_jobs=options.n_jobs,
            dask=options.dask,
            chunk_bytes=options.chunk_mb << 20,
        )
    except KeyboardInterrupt:
        folder = f"{options.results_dir}/{plan.name}"
        print(f"stopped: {folder} keeps what is done, the same command goes on", file=sys.stderr)
        sys.exit(130)  # the status that a shell gives to a program ended by Ctrl-C
    seconds = time.perf_counter() - start
    _print_best(table)
    print(
        f"{len(table):,} configurations, {seconds:.1f} s: "
        f"{options.results_dir}/{plan.name}/results.csv and .parquet"
    )


def _print_best(table: pd.DataFrame) -> None:
    """Prints the best methods, by accuracy averaged over tasks, backbones and seeds."""
    from imprint_pl.experiments.results import COLUMNS, USUAL

    # Methods differ in keywords, also those of users' own parts, which have further columns. Rare
    # keywords are shown only if rows differ in them.
    wide = [n for n in USUAL if n in table]
    table = table.assign(**{n: table[n].fillna(USUAL[n]) for n in wide})
    more = {str(n) for n in table if n in KEYWORDS or n not in COLUMNS} - set(wide)
    keywords = [*SLOTS, *sorted(more - {*SLOTS, "weibull"})]
    # `auto` may choose other parts on each task. Ignore them, so that its rows are averaged.
    table = table.assign(**{n: table[n].mask(table["recipe"] == AUTO) for n in keywords})
    keywords = ["recipe", *keywords, *(n for n in ["weibull", *wide] if n in table)]
    usual = ["recipe", "norm_pre", "gen", "k", "norm_post", "norm_inf", "agg", "m", "distance"]
    names = [n for n in usual if n in keywords]
    names += [n for n in keywords if n not in usual and table[n].dropna().nunique() > 1]
    figures = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "macro_f1": "macro F1"}
    mean = table.groupby(keywords, dropna=False)[list(figures)].mean().reset_index()
    columns: dict[str, Side] = {
        name: "right" if name in ("k", "m", *figures.values()) else "left"
        for name in (*names, *figures.values())
    }
    rows = []
    for _, row in mean.sort_values("accuracy", ascending=False).head(BEST).iterrows():
        cells = [str(row[n]) if row.notna()[n] else "" for n in names]
        cells += [f"{100 * row[n]:.2f} %" if row.notna()[n] else "" for n in figures]
        rows.append(cells)
    print_table(columns, rows, "best on average", width=120)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
