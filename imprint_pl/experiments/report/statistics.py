"""Methods compared over groups: average accuracy, average rank, wins, Friedman, Wilcoxon–Holm.

Pure functions of a table of accuracies, groups by methods; the tests are those of scipy and
scikit-posthocs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from imprint_pl.errors import needs

ALPHA = 0.05


def accuracy_by_group(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the accuracies, groups × methods, of the methods that have every group.

    Seeds are averaged. A method that was not run on all groups is left out, since its average would
    be over other tasks than that of the others. If fewer than two methods remain, groups are left
    out instead.
    """
    table = rows.pivot_table(index="group", columns="method", values="accuracy", aggfunc="mean")
    complete = table.dropna(axis=1)
    return complete if complete.shape[1] >= 2 else table.dropna(axis=0)


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Compares methods on a table of accuracies, groups × methods.

    Returns:
        A row for each method, best first: `accuracy` (average, a fraction), `rank` (average, 1 is
        best), `wins`. Methods that tie share the ranks, and each of them has a win.
    """
    # Round, so that accuracies that differ in the last bit are equal.
    rounded = table.round(9)
    best = rounded.eq(rounded.max(axis=1), axis=0)
    return pd.DataFrame(
        {
            "accuracy": table.mean(),
            "rank": rounded.rank(axis=1, ascending=False).mean(),
            "wins": best.sum(),
        }
    ).sort_values(["rank", "accuracy"], ascending=[True, False])


@dataclass(frozen=True)
class Significance:
    """Friedman's p over all methods, and for each pair the Holm-corrected p of Wilcoxon's test.

    Attributes:
        groups: number of groups.
        friedman: p-value of "no method differs"; `None` for fewer than three methods.
        pairs: methods × methods, symmetric, 1 on the diagonal.
    """

    groups: int
    friedman: float | None
    pairs: pd.DataFrame

    @property
    def some_differ(self) -> bool:
        """Whether Friedman's test finds a difference; with two methods the pair decides."""
        return self.friedman is None or self.friedman < ALPHA


def significance(table: pd.DataFrame) -> Significance | None:
    """Tests a table of accuracies, groups × methods.

    Returns:
        The p-values; `None` for fewer than two methods, or fewer than six groups, with which
        Wilcoxon's signed-rank test cannot reach p < 0.05.

    Source: Demšar 2006; Benavoli et al. 2016 (Wilcoxon–Holm as the post-hoc test).
    """
    with needs("sweep", "report"):
        import scikit_posthocs
    from scipy.stats import friedmanchisquare
    from statsmodels.stats.multitest import multipletests

    table = table.round(9)
    methods = list(table.columns)
    if len(table) < 6 or len(methods) < 2:
        return None
    friedman = None
    if len(methods) > 2:
        friedman = float(friedmanchisquare(*(table[name] for name in methods)).pvalue)
        # If all methods have equal accuracies, the statistic is 0 / 0.
        friedman = 1.0 if np.isnan(friedman) else friedman
    # Use numbers instead of names, which come from strangers: the library sorts and compares them.
    numbered = table.set_axis(range(len(methods)), axis=1)
    long = numbered.melt(var_name="method", value_name="accuracy")
    long["method"] = long["method"].astype(int)
    with np.errstate(all="ignore"):
        raw = scikit_posthocs.posthoc_wilcoxon(long, val_col="accuracy", group_col="method")
    # For two equal columns there are no differences to rank, and p is NaN.
    raw = raw.loc[range(len(methods)), range(len(methods))].fillna(1.0).to_numpy()
    upper = np.triu_indices(len(methods), 1)
    pairs = np.ones_like(raw)
    # Correct the p-values here, since a pair without differences would break the library's own
    # correction.
    pairs[upper] = multipletests(raw[upper], method="holm")[1]
    pairs = np.minimum(pairs, pairs.T)
    return Significance(len(table), friedman, pd.DataFrame(pairs, index=methods, columns=methods))
