"""Images to embeddings: backbones with their own preprocessing, and the cache."""

from typing import Any

__all__ = ["embed"]


def __getattr__(name: str) -> Any:
    # Imported on demand, so that a backbone alone need not wait for Lightning.
    if name == "embed":
        from imprint_pl.embedding.cached import embed

        return embed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
