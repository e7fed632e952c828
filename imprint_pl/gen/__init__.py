"""GEN: makes the proxies of the classes from their embeddings. One small file a family.

A generator is a class with a `name` whose constructor takes its own parameters. With
`from_moments = True` it is called with `Moments`, otherwise with embeddings and labels; `Proxies`
come out. To add one, write it in a file here and name it in the tuple below.
"""

from imprint_pl.gen.base import PerClass, Proxies
from imprint_pl.gen.kmeans import KMeans
from imprint_pl.gen.mean import Mean

GENERATORS = {part.name: part for part in (Mean, KMeans)}

__all__ = ["GENERATORS", "KMeans", "Mean", "PerClass", "Proxies"]
