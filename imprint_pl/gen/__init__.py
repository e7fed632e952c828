"""GEN: makes the proxies of the classes from their embeddings. One small file a family.

A generator is a class with a `name` whose constructor takes its own parameters. With
`from_moments = True` it is called with `Moments`, otherwise with embeddings and labels; `Proxies`
come out. To add one, write it in a file here and name it in the tuple below.
"""

from imprint_pl.gen.all import All
from imprint_pl.gen.base import PerClass, Proxies
from imprint_pl.gen.cov_max import CovMax
from imprint_pl.gen.fps import FarthestPoints
from imprint_pl.gen.kls import KLeastSquares
from imprint_pl.gen.kmeans import KMeans
from imprint_pl.gen.kmedoids import KMedoids
from imprint_pl.gen.kridge import KRidge
from imprint_pl.gen.lda import LDA
from imprint_pl.gen.ls import LeastSquares
from imprint_pl.gen.mean import Mean
from imprint_pl.gen.random import Random
from imprint_pl.gen.ridge import Ridge

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
