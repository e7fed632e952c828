"""Runs an audit of a data set, and proposes files to leave out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from imprint_pl.audit.images import ImageFacts, image_facts, unusual
from imprint_pl.audit.labels import LabelScores, label_scores
from imprint_pl.audit.neighbours import far_from_everything, neighbours
from imprint_pl.data.arrays import ArrayDataset
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.embeddings import EmbeddingDataModule
from imprint_pl.data.splits import SplitDataset
from imprint_pl.errors import ImprintError

# Two images are near duplicates from this cosine on, computed after subtracting the mean. Copies
# that were compressed again, cropped by a twentieth or mirrored are mostly above it. One in a
# hundred of TrashNet's photographs has a neighbour above it that is no copy, since many objects are
# shown twice.
NEAR = 0.93
# An image is left out if heads that have not seen it give its label a lower probability. In a test
# in which a twentieth of the labels had been flipped, nine of ten such labels were wrong.
SURELY_WRONG = 0.02
# The order in which splits keep one of several copies: the test split comes first, so that its
# figures stay comparable.
KEPT_FIRST = ("test", "val", "train")


class Samples(NamedTuple):
    """The samples of all splits, one split after the other.

    Attributes:
        images: the data set of each split, by its name.
        split: the split of each sample.
        place: the index of each sample in its split.
        labels: `(N,)`.
        names: the file of each sample below `root`, or a name such as `train 17` without files.
        paths: the file of each sample; `None` without files.
        root: folder of the files; empty without files.
    """

    images: dict[str, SplitDataset]
    split: list[str]
    place: list[int]
    labels: Tensor
    names: list[str]
    paths: list[str] | None
    root: str


class Pair(NamedTuple):
    """Two samples that look the same; `a` comes first."""

    a: int
    b: int
    kind: str
    cosine: float


class Issue(NamedTuple):
    """An unusual sample; `kind` is "odd" (far from all others) or "unusual" (by its format)."""

    sample: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """The findings of an audit.

    Attributes:
        class_names: C names.
        samples: all samples that were checked.
        scores: the scores of their labels; `None` if no label can be checked.
        pairs: identical and near images: first those with two labels, then those in two splits.
        near_left_out: how many further pairs there are.
        issues: the unusual images.
        unreadable: files that cannot be read, with the reason.
        warnings: what could not be checked.
    """

    class_names: list[str]
    samples: Samples
    scores: LabelScores | None
    pairs: list[Pair]
    near_left_out: int = 0
    issues: list[Issue] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def label(self, sample: int) -> str:
        """Returns the name of a sample's class."""
        return self.class_names[int(self.samples.labels[sample])]

    def is_contradiction(self, pair: Pair) -> bool:
        """Whether two images that look the same have different labels."""
        return bool(self.samples.labels[pair.a] != self.samples.labels[pair.b])

    def is_across(self, pair: Pair) -> bool:
        """Whether two images that look the same lie in different splits."""
        return self.samples.split[pair.a] != self.samples.split[pair.b]

    def leave_out(self) -> list[tuple[str, str]]:
        """Returns the files that harm a fit or its figures, and why; for `ImageFolder(exclude=…)`.

        These are files that cannot be read, blank images, images whose labels are almost certainly
        wrong, all identical images with different labels, and all but one of other identical
        images. Near duplicates and odd images are left for a person to judge.

        Raises:
            ImprintError: the data set has no files.
        """
        samples, reasons = self.samples, dict[str, str]()
        if samples.paths is None:
            raise ImprintError(
                "--fix_list is for image files: this data set has none that could be left out"
            )
        for path in self.unreadable:
            reasons[_below(path, samples.root)] = "cannot be read"
        for issue in self.issues:
            if issue.reason.startswith("blank"):
                reasons.setdefault(samples.names[issue.sample], issue.reason)
        for group in self._identical():
            labels = {self.label(sample) for sample in group}
            if len(labels) > 1:
                for sample in group:
                    others = sorted(labels - {self.label(sample)})
                    reason = f"identical to an image of {', '.join(others)}"
                    reasons.setdefault(samples.names[sample], reason)
                continue
            kept = min(group, key=lambda s: (KEPT_FIRST.index(samples.split[s]), s))
            for sample in group:
                if sample != kept:
                    reason = f"identical to {samples.names[kept]}"
                    reasons.setdefault(samples.names[sample], reason)
        if self.scores is not None:
            for sample in self.scores.ranking().tolist():
                if self.scores.given[sample] >= SURELY_WRONG or not self.scores.doubted[sample]:
                    break
                likely = self.class_names[int(self.scores.likely[sample])]
                reasons.setdefault(
                    samples.names[sample], f"labelled {self.label(sample)}, looks like {likely}"
                )
        return list(reasons.items())

    def _identical(self) -> list[list[int]]:
        """Returns the groups of identical samples."""
        group_of: dict[int, int] = {}
        groups: dict[int, list[int]] = {}
        for pair in self.pairs:
            if pair.kind == "near":
                continue
            # All pairs of a group start with its first sample.
            first = group_of.setdefault(pair.a, pair.a)
            groups.setdefault(first, [pair.a]).append(pair.b)
        return list(groups.values())


def audit(
    images: ImageDataModule,
    embeddings: EmbeddingDataModule,
    recipe: str = "kernel",
    *,
    near: float = NEAR,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Audit:
    """Looks for wrong labels, duplicates and unusual images in all splits of a data set.

    Nothing is changed. All splits are checked together: each label is scored by heads that are made
    of other samples of all splits.

    Args:
        images: the data set.
        embeddings: its embeddings, as `embed(backbone, images, …)` returns them.
        recipe: the recipe of the heads that score labels.
        near: smallest cosine of near duplicates.
        seed: fixes the folds.
        device: the device on which embeddings are compared.
        progress: show bars on stderr.

    Returns:
        The findings.

    Raises:
        ImprintError: `near` is no cosine, or the two data sets differ.
    """
    if not 0 < near <= 1:
        raise ImprintError(f"near={near}: give a cosine above 0 and at most 1, such as {NEAR}")
    images.setup()
    embeddings.setup()
    samples = _samples(images)
    x = torch.cat([_rows(embeddings, split) for split in samples.images])
    if len(x) != len(samples.labels):
        raise ImprintError(
            f"{len(x)} embeddings of {len(samples.labels)} images: give what embed(…) returns for "
            "this data set"
        )
    facts: list[ImageFacts | None] = []
    for dataset in samples.images.values():
        facts += image_facts(images, dataset, progress)
    warnings, scores = [], None
    widths = getattr(embeddings, "layer_widths", None)
    if images.num_classes < 2:
        warnings.append("There is one class: no label can be checked.")
    else:
        try:
            scores = label_scores(
                x.to(device or "cpu"),
                samples.labels.to(device or "cpu"),
                recipe,
                num_classes=images.num_classes,
                layer_widths=widths if widths and len(widths) > 1 else None,
                seed=seed,
                progress=progress,
            )
        except ImprintError as error:
            warnings.append(f"Labels were not checked: {error}.")
    last = x[:, -widths[-1] :] if widths else x
    compared = neighbours(last.to(device or "cpu"), near, progress)
    pairs = _identical(facts)
    known = {(pair.a, pair.b) for pair in pairs}
    for (a, b), cosine in zip(compared.pairs.tolist(), compared.cosines.tolist(), strict=True):
        if (a, b) not in known:
            pairs.append(Pair(a, b, "near", cosine))
    split, labels = samples.split, samples.labels.tolist()
    # Copies of a group are compared with its first sample only.
    firsts = _first_of(facts)
    pairs = [
        pair
        for pair in pairs
        if pair.kind != "near" or (firsts[pair.a] == pair.a and firsts[pair.b] == pair.b)
    ]
    pairs.sort(
        key=lambda pair: (
            labels[pair.a] == labels[pair.b],
            split[pair.a] == split[pair.b],
            -pair.cosine,
            pair.a,
        )
    )
    issues = [Issue(sample, "unusual", reason) for sample, reason in unusual(facts).items()]
    issues += [
        Issue(sample, "odd", f"far from all others (cosine {compared.fifth[sample]:.2f})")
        for sample in far_from_everything(compared.fifth).tolist()
    ]
    return Audit(
        images.class_names,
        samples,
        scores,
        pairs,
        compared.total - len(compared.pairs),
        issues,
        dict(images.unreadable),
        warnings,
    )


def _samples(images: ImageDataModule) -> Samples:
    splits: dict[str, SplitDataset] = {}
    for name in ("train", "val", "test"):
        dataset = getattr(images, f"{name}_dataset")
        # The validation split may be the test split; do not add it twice.
        if name != "val" or dataset is not images.test_dataset:
            splits[name] = dataset
    split = [name for name, dataset in splits.items() for _ in range(len(dataset))]
    place = [i for dataset in splits.values() for i in range(len(dataset))]
    labels = torch.cat([dataset.labels for dataset in splits.values()])
    paths: list[str] | None = []
    for dataset in splits.values():
        own = getattr(dataset, "paths", None)
        paths = None if own is None or paths is None else [*paths, *own]
    if paths is None:
        names = [f"{name} {i}" for name, i in zip(split, place, strict=True)]
        return Samples(splits, split, place, labels, names, None, "")
    root = images.root
    return Samples(
        splits, split, place, labels, [_below(path, root) for path in paths], paths, root
    )


def _below(path: str, root: str) -> str:
    return os.path.relpath(path, root)


def _rows(embeddings: EmbeddingDataModule, split: str) -> Tensor:
    return cast(ArrayDataset, getattr(embeddings, f"{split}_dataset")).images


def _first_of(facts: Sequence[ImageFacts | None]) -> list[int]:
    """Returns, for each image, the first image with the same bytes."""
    first: dict[bytes, int] = {}
    return [i if fact is None else first.setdefault(fact.digest, i) for i, fact in enumerate(facts)]


def _identical(facts: Sequence[ImageFacts | None]) -> list[Pair]:
    """Returns pairs of the first image of each group of equal bytes with each of the others."""
    return [Pair(a, b, "identical", 1.0) for b, a in enumerate(_first_of(facts)) if a != b]
