"""The choice of λ for `ridge`: one factorisation gives the ridge regression for every λ, and the
rows that are left out of it say which λ foretells them best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.copies import REFERENCE, Copies, CopyFinder
from imprint_pl.numerics.draws import place_in_class, random_keys, sample
from imprint_pl.numerics.factorisations import Tridiagonal, double
from imprint_pl.numerics.measures import ACCURACY, measured_by
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import keys
from imprint_pl.numerics.passes import CHUNK

# Rows that are left out in turn to choose λ.
SCORED = 500
# Standard errors by which they must contradict generalised cross-validation.
ERRORS = 2
# Mean squared lengths of samples beside which a 1 is neither swamped nor everything.
SMALL, LARGE = 1e-3, 1e4


class LeftOut(NamedTuple):
    """Rows of the sums that are left out in turn to choose λ.

    Attributes:
        z: `(n, d)`, the rows as they were added up.
        y: `(n,)`, their labels in the sums.
        scored: how many of them, the first ones, are foretold; the others are their near-copies.
        copies: pairs of near-copies among the n rows.
        weights: `(n,)`, as the sums have them; `None` for ones.
    """

    z: Tensor
    y: Tensor
    scored: int
    copies: Copies
    weights: Tensor | None = None


class Losses(NamedTuple):
    """What left-out rows say of each λ.

    Attributes:
        squares: `(L, n)`, w ‖y − ŷ‖² of each row, infinite where λ is too small to be judged.
        figures: `(L,)`, the metric of the labels.
    """

    squares: Tensor
    figures: Tensor


class Spectrum:
    """Ridge regression for every λ at once, by one tridiagonalisation G = V T Vᵀ: a third of the
    time of an eigendecomposition, and (T + λI) is solved in no time.

    Args:
        moments: sums with a pooled Gram matrix, unweighted.
        intercept: whether a 1 is appended to the samples.
    """

    def __init__(self, moments: Moments, intercept: bool = True) -> None:
        gram, cross = normal_equations(moments, intercept)
        self.counts = moments.counts.cpu()
        self.samples = double(moments.counts).sum().item()
        self.trace = gram.trace().item()
        self.system = Tridiagonal(gram)
        self.values = self.system.eigenvalues().clamp_min(0)
        self.projected = self.system.turn(cross)
        self.constant = constant(moments) if intercept else None

    @property
    def grid(self) -> Tensor:
        """The λ to choose from, ascending: powers of √10 from 1e-8 to 10 times the trace of G."""
        top = round(2 * math.log10(self.trace)) + 2 if self.trace > 0 else 0
        return 10 ** (torch.arange(top - 18, top + 1, dtype=torch.float64) / 2)

    def weights(self, lam: float) -> Tensor:
        """W for one λ, `(d+1, C)`, or `(d, C)` without intercept, float64."""
        return self.system.turn_back(self.system.solve(lam, self.projected))

    def gcv(self, lam: float) -> float:
        """(1/N) Σ ‖y − Wᵀz‖² / (1 − t/N)², t = Σ_j l_j / (l_j + λ) the degrees of freedom, l_j the
        eigenvalues of G.

        The sum of squares needs no sample: with P = Vᵀ Q and S = (T + λI)⁻¹ P it is, over N,
        (1/N) Σ ‖y‖² − ⟨P, S⟩ − λ ⟨S, S⟩, and Σ ‖y‖² = N.
        """
        kept = self.values / (self.values + lam)
        solution = self.system.solve(lam, self.projected)
        explained = (solution * (self.projected + lam * solution)).sum().item()
        residual = 1 - explained
        # At most N eigenvalues are not 0. Written so, 1 − t/N keeps its digits as t nears N.
        rank = min(int(self.samples), len(kept))
        free = (self.samples - rank + (1 - kept[-rank:]).sum().item()) / self.samples
        # A residual that is nothing but rounding decides nothing.
        return residual / free**2 if residual > 1e-12 else math.inf

    def best_by_gcv(self) -> float:
        """The λ of the grid with the least `gcv`."""
        return min(self.grid.tolist(), key=self.gcv)

    def leave_out(self, left: LeftOut) -> Tensor | None:
        """Σ `squares` of `losses` over the rows, `(L,)`; `None` where no row can be foretold."""
        losses = self.losses(left)
        return None if losses is None else losses.squares.sum(1)

    def losses(self, left: LeftOut, metric: str = ACCURACY) -> Losses | None:
        """‖y − ŷ‖² of each scored row for each λ of the grid, `(L, n)`, and the metric of their
        labels, ŷ by the ridge regression of all samples but the row and its near-copies.

        With H_GG = Z_G (NG + NλI)⁻¹ Z_Gᵀ of the left-out rows G, the residuals y − ŷ of the
        regression without them are (I − H_GG)⁻¹ times those of the regression of all; of a row
        without near-copies, (y − ŷ) / (1 − h). A class that would have no sample left cannot be
        foretold: its row is not scored. Weights w multiply z, its 1 and y by √w.

        Returns:
            `None` where no row can be foretold.

        Source: Allen 1974 ("PRESS", one row); Cook & Weisberg 1982, "Residuals and Influence in
        Regression" (several).
        """
        z, y = double(left.z).cpu(), left.y.cpu()
        if self.constant is not None:
            z = torch.cat([z, z.new_full((len(z), 1), self.constant)], 1)
        roots = None if left.weights is None else double(left.weights).cpu().sqrt()[:, None]
        z = z if roots is None else z * roots
        turned, lams = self.system.turn(z.T), self.grid
        hats = self.system.squares(lams, turned) / self.samples
        groups = _groups(left, self.counts)
        figures = lams.new_zeros(len(lams))
        of_rows: list[Tensor] = []
        true = torch.cat([y[group[:, 0]] for group in groups]) if groups else y[:0]
        one_hot = torch.zeros(len(y), self.projected.shape[1], dtype=torch.float64)
        one_hot[torch.arange(len(y)), y] = 1
        one_hot = one_hot if roots is None else one_hot * roots
        for i, lam in enumerate(lams.tolist()):
            residuals = one_hot - turned.T @ self.system.solve(lam, self.projected)
            labels, of_lam = [], []
            for group in groups:
                if group.shape[1] == 1:
                    missed = residuals[group[:, 0]] / (1 - hats[i, group])
                else:
                    missed = self._missed(lam, turned, residuals, group)
                of_lam.append(missed.square().sum(1))
                if metric != ACCURACY:
                    labels.append((one_hot[group[:, 0]] - missed).argmax(1))
            if groups:
                of_rows.append(torch.cat(of_lam))
            if labels:
                figures[i] = measured_by(metric, torch.cat(labels), true)
        # Where rounding is all that is left of a residual, λ is too small to be judged.
        known = (1 - hats > 1e-9).all(1)
        if not groups:
            return None
        return Losses(torch.stack(of_rows).where(known[:, None], torch.inf), figures)

    def _missed(self, lam: float, turned: Tensor, residuals: Tensor, group: Tensor) -> Tensor:
        """Residuals `(n, C)` of the first rows of `group (n, g)`, each left out with the others of
        its line."""
        solved = self.system.solve(lam, turned[:, group.flatten()]) / self.samples
        hat = torch.einsum("pgi,pgj->gij", turned[:, group], solved.reshape(-1, *group.shape))
        within = torch.eye(group.shape[1], dtype=hat.dtype) - hat
        return torch.linalg.solve(within, residuals[group])[:, 0]

    def best_by_leaving_out(self, left: LeftOut, metric: str = ACCURACY) -> float | None:
        """The λ of the grid with the least `leave_out`; `None` where no row can be foretold.

        By a metric other than accuracy it is the λ with the best figure; of several, the one with
        the least sum of squares.

        Where the scored rows are but some, "gcv" knows more, as it sums up all of them. Its λ is
        taken unless the scored rows contradict it: their squares are larger with it by more than
        two standard errors, as they are where near-copies have fooled it.

        The sum of squares decides, not the number of errors: over four sets of embeddings, from 100
        to 1,400 samples, its λ was nearer to the best by test, as errors are few and whole.
        """
        losses = self.losses(left, metric)
        if losses is None:
            return None
        squares, figures = losses.squares.sum(1), losses.figures
        known = squares.isfinite()
        if metric == ACCURACY and left.weights is None and left.scored < self.samples:
            gcv = (self.grid - self.best_by_gcv()).abs().argmin()
            more = losses.squares[gcv] - losses.squares[squares.argmin()]
            if more.mean() <= ERRORS * more.std() / len(more) ** 0.5:
                return self.grid[gcv].item()
        if metric != ACCURACY and known.any():
            figures = figures.where(known, -torch.inf)
            squares = squares.where(figures == figures.max(), torch.inf)
        return self.grid[squares.argmin()].item()

    def best_by_holdout(
        self,
        x: Tensor,
        targets: Tensor,
        classes: Tensor,
        metric: str = ACCURACY,
        weights: Tensor | None = None,
    ) -> float:
        """The λ of the grid with the fewest errors on held-out `x (n, d)`, or the best figure.

        Of several, the one with the least sum of squares.

        `targets (n,)` are columns of W, `classes (P,)` the class of each column. Errors and squares
        have the `weights (n,)`; a metric other than accuracy has none.
        """
        squares = torch.zeros(len(self.grid), dtype=torch.float64)
        solutions = [self.weights(lam) for lam in self.grid.tolist()]
        of, true = classes.cpu(), classes.cpu()[targets.cpu()]
        weights = torch.ones(len(x), dtype=torch.float64) if weights is None else double(weights)
        labels: list[list[Tensor]] = [[] for _ in solutions]
        batches = (x.split(CHUNK), targets.split(CHUNK), weights.cpu().split(CHUNK))
        for rows, own, weight in zip(*batches, strict=True):
            rows, own = double(rows).cpu(), own.cpu()
            if self.constant is not None:
                rows = torch.cat([rows, rows.new_full((len(rows), 1), self.constant)], 1)
            for i, solution in enumerate(solutions):
                scores = rows @ solution
                labels[i].append(of[scores.argmax(1)])
                scores[torch.arange(len(own)), own] -= 1
                squares[i] += (weight[:, None] * scores.square()).sum().item()
        given = [torch.cat(of_lam) for of_lam in labels]
        if metric == ACCURACY:
            figures = [-weights.cpu()[found != true].sum().item() for found in given]
        else:
            figures = [measured_by(metric, found, true) for found in given]
        tied = torch.tensor([figure == max(figures) for figure in figures])
        return self.grid[squares.where(tied, torch.inf).argmin()].item()


def rows_left_out(
    x: Tensor,
    y: Tensor,
    z: Tensor | Callable[[Tensor], Tensor],
    seed: int,
    weights: Tensor | None = None,
) -> LeftOut:
    """Draws the rows to leave out, and finds their near-copies.

    The rows are the same whether all samples are there or a bounded sample, drawn while they went
    by: the first by `random_keys`.

    Args:
        x: `(n, d)`, embeddings, among which near-copies are looked for.
        y: `(n,)`, their labels in the sums.
        z: `(n, p)`, the rows as they were added up, or what gives those at some places.
        seed: fixes the draw.
        weights: `(n,)`, as the sums have them.
    """
    first = random_keys(keys(x), seed).argsort()[:REFERENCE].to(x.device)
    scored = first[:SCORED]
    copies = CopyFinder(x, y, first).find(scored)
    places = torch.cat([scored, copies.of(scored)])
    rows = z[places.to(z.device)] if isinstance(z, Tensor) else z(places)
    weights = None if weights is None else weights[places.to(weights.device)]
    return LeftOut(rows, y[places.to(y.device)], len(scored), copies.among(places), weights)


def _groups(left: LeftOut, counts: Tensor) -> list[Tensor]:
    """The rows that are left out together, `(n, g)` for each size g: a scored row comes first in
    its line, then its near-copies. Lines that leave no sample of the row's class are missing."""
    copies, y = left.copies, left.y.cpu()
    members: list[list[int]] = [[i] for i in range(left.scored)]
    for one, other in zip(copies.first.tolist(), copies.second.tolist(), strict=True):
        if one < left.scored:
            members[one].append(other)
    by_size: dict[int, list[list[int]]] = {}
    labels, sizes = y.tolist(), counts.tolist()
    weights = [1.0] * len(labels) if left.weights is None else left.weights.tolist()
    for line in members:
        of_class = sum(weights[i] for i in line if labels[i] == labels[line[0]])
        # Sums of weights are known to rounding.
        if of_class < (1 - 1e-9) * sizes[labels[line[0]]]:
            by_size.setdefault(len(line), []).append(line)
    return [torch.tensor(lines) for lines in by_size.values()]


def held_out(y: Tensor, seed: int, share: float = 0.1) -> Tensor:
    """A stratified draw from labels `(N,)`: a mask `(N,)` with `share` of each class, at least one
    sample of it and never its last.

    Raises:
        ImprintError: no class has two samples.
    """
    counts = torch.bincount(y).cpu()
    quota = (share * counts).round().long().clamp_min(1).where(counts > 1, 0)
    if quota.sum() == 0:
        raise ImprintError(
            "lam='holdout': no class has two samples, so that none can be held out; give a number "
            "or 'gcv'"
        )
    labels = y.cpu()
    place = place_in_class(labels, sample(len(y), len(y), seed))
    return (place < quota[labels]).to(y.device)


def normal_equations(moments: Moments, intercept: bool) -> tuple[Tensor, Tensor]:
    """G and Q of `Ridge`, `(p, p)` and `(p, C)`, float64, new memory."""
    samples = double(moments.counts).sum()
    gram, cross = double(moments.pooled_gram) / samples, double(moments.sums).T / samples
    if not intercept:
        return gram, cross
    mean, share = cross.sum(1), double(moments.counts) / samples
    p, one = len(gram) + 1, constant(moments)
    whole = gram.new_full((p, p), one**2)
    whole[:-1, :-1], whole[:-1, -1], whole[-1, :-1] = gram, one * mean, one * mean
    return whole, torch.cat([cross, one * share[None]])


def constant(moments: Moments) -> float:
    """What is appended to each sample for the intercept: 1, or, where samples are so short or so
    long that one of the two would be lost beside the other, a number that keeps them in proportion:
    the labels of a head then do not depend on the scale of its embeddings."""
    length = double(moments.pooled_gram).trace().item() / double(moments.counts).sum().item()
    if not length > 0:
        return 1.0
    return math.sqrt(max(1.0, length / LARGE) * min(1.0, length / SMALL))
