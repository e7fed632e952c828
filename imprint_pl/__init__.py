"""Weight imprinting in PyTorch Lightning: a classifier on a frozen foundation model in one pass.

    from imprint_pl import ImprintedClassifier, imprint

`imprint` works on embeddings, `ImprintEstimator` is a scikit-learn classifier on them, and
`ImprintedClassifier` is a LightningModule on images. The README shows all three.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imprint_pl.errors import ImprintError
    from imprint_pl.estimator import ImprintEstimator
    from imprint_pl.lightning.attaching import attach, detach
    from imprint_pl.lightning.callback import ImprintCallback
    from imprint_pl.lightning.classifier import ImprintedClassifier
    from imprint_pl.lightning.evaluation import Evaluation
    from imprint_pl.lightning.extending import extend
    from imprint_pl.method.head import ImprintedHead
    from imprint_pl.method.imprinting import imprint

try:
    __version__ = version("imprint-pl")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

_HOMES = {
    "Evaluation": "lightning.evaluation",
    "ImprintCallback": "lightning.callback",
    "ImprintError": "errors",
    "ImprintEstimator": "estimator",
    "ImprintedClassifier": "lightning.classifier",
    "ImprintedHead": "method.head",
    "attach": "lightning.attaching",
    "detach": "lightning.attaching",
    "extend": "lightning.extending",
    "imprint": "method.imprinting",
}
__all__ = [
    "Evaluation",
    "ImprintCallback",
    "ImprintError",
    "ImprintEstimator",
    "ImprintedClassifier",
    "ImprintedHead",
    "attach",
    "detach",
    "extend",
    "imprint",
]


def __getattr__(name: str) -> Any:
    # Imported on demand: `--help` and the maths should not wait for Lightning.
    if name in _HOMES:
        return getattr(importlib.import_module(f"imprint_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
