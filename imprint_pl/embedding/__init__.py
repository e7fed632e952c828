"""Images to embeddings: backbones with their own preprocessing, and the cache."""

__all__ = ["embed"]


def __getattr__(name: str):
    # On demand: a backbone alone does not wait for Lightning.
    if name == "embed":
        from imprint_pl.embedding.cached import embed

        return embed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
