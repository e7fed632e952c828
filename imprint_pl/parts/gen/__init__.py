"""GEN: makes the proxies of the classes from their embeddings. One small file a family.

A generator is a `Generator` whose constructor takes its own parameters and keeps them under their
names. With `from_moments = True` it is called with `Moments`, otherwise with embeddings and labels.
It returns `Proxies`, which also hold the parameters that it chose, such as λ; the generator itself
keeps no fitted state. To add one to this package, write it in a file here and name it in the tuple
below. A generator of your own needs no entry: give its import path, as in
`gen="my_parts.Trimmed"`.
"""

from imprint_pl.parts.gen.all import All
from imprint_pl.parts.gen.base import Generator, PerClass, Proxies
from imprint_pl.parts.gen.cov_max import CovMax
from imprint_pl.parts.gen.fps import FarthestPoints
from imprint_pl.parts.gen.kls import KLeastSquares
from imprint_pl.parts.gen.kmeans import KMeans
from imprint_pl.parts.gen.kmedoids import KMedoids
from imprint_pl.parts.gen.kridge import KRidge
from imprint_pl.parts.gen.lda import LDA
from imprint_pl.parts.gen.ls import LeastSquares
from imprint_pl.parts.gen.mean import Mean
from imprint_pl.parts.gen.random import Random
from imprint_pl.parts.gen.ridge import Ridge

GENERATORS = {
    part.name: part
    for part in (
        Mean,
        KMeans,
        KMedoids,
        Random,
        FarthestPoints,
        CovMax,
        All,
        LeastSquares,
        KLeastSquares,
        Ridge,
        KRidge,
        LDA,
    )
}

__all__ = [
    "GENERATORS",
    "LDA",
    "All",
    "CovMax",
    "FarthestPoints",
    "Generator",
    "KLeastSquares",
    "KMeans",
    "KMedoids",
    "KRidge",
    "LeastSquares",
    "Mean",
    "PerClass",
    "Proxies",
    "Random",
    "Ridge",
]
