"""How many wrong labels `audit` finds: a twentieth of the labels is flipped at random, and the
first twentieth of its ranking is looked at, ten times.

    python benchmarks/audit.py --root ../shared/data/trashnet --cache_dir cache
"""

import argparse

import torch

from imprint_pl.audit import label_scores
from imprint_pl.data import Digits, ImageFolder
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone

FLIPPED = 0.05


def found(x, y, layer_widths, draw):
    """The share of the flipped labels among the first ones of the ranking."""
    generator = torch.Generator().manual_seed(draw)
    C, count = int(y.max()) + 1, round(FLIPPED * len(y))
    flipped = torch.randperm(len(y), generator=generator)[:count]
    labels = y.clone()
    labels[flipped] = (y[flipped] + torch.randint(1, C, (count,), generator=generator)) % C
    first = label_scores(x, labels, num_classes=C, layer_widths=layer_widths).ranking()[:count]
    return torch.isin(first, flipped).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="a folder of images; digits where not given")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--cache_dir", default="cache")
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args()
    data = Digits() if given.root is None else ImageFolder(given.root)
    backbone = load_backbone("efficientnet_lite0", image_size=given.image_size, layers="all")
    embedded = embed(backbone, data, given.cache_dir)
    x, y = embedded.arrays("train")
    widths = embedded.layer_widths
    for name, rows, of_rows in (("last layer", x[:, -widths[-1] :], None), ("all", x, widths)):
        shares = [found(rows, y, of_rows, draw) for draw in range(given.draws)]
        print(f"{data.name}, {name}: {100 * sum(shares) / len(shares):.1f} %", flush=True)


if __name__ == "__main__":
    main()
