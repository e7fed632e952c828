"""The command `serve`: serves a checkpoint over HTTP, with a page."""

from __future__ import annotations

from pathlib import Path

from imprint_pl.cli.arguments import PROGRAM, ArgumentParser
from imprint_pl.errors import ImprintError, needs


def run(argv: list[str]) -> None:
    """Parses and runs the command.

    Args:
        argv: its arguments, without its name.
    """
    given = _parser().parse_args(argv)
    if not Path(given.checkpoint).is_file():
        raise ImprintError(f"{given.checkpoint}: there is no such file")
    with needs("serve", "serve"):
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    from imprint_pl.serve.limits import Limits
    from imprint_pl.serve.run import Options, serve

    limits = Limits(
        given.max_megabytes,
        given.max_megapixels,
        given.max_images,
        given.max_seconds,
        given.max_requests,
    )
    serve(
        Options(
            checkpoint=given.checkpoint,
            host=given.host,
            port=given.port,
            hosts=given.allow_host,
            allow_changes=given.allow_changes,
            token_file=given.token_file,
            keep_images=given.keep_images,
            device=given.device,
            runtime=given.runtime,
            limits=limits,
        )
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{PROGRAM} serve",
        description="Serve a classifier over HTTP, with a page to drop photographs on.",
    )
    add = parser.add_argument
    add("checkpoint", help="What fit wrote.")
    add("--host", default="127.0.0.1", help="Address to listen at (this machine alone).")
    add("--port", type=int, default=8000, help="Port to listen at; 0 takes a free one.")
    add(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="A further name by which clients address the server, such as that of a proxy.",
    )
    add(
        "--allow_changes",
        action="store_true",
        help="Let whoever has the token add and remove classes; needs a fit with --model.keep.",
    )
    add(
        "--token_file",
        help="Has the token for changes; without it IMPRINT_PL_TOKEN has it, or one is printed.",
    )
    add("--keep_images", metavar="FOLDER", help="Keep the images of added classes there.")
    add("--device", help="Such as cpu or cuda:1; a GPU where there is one.")
    add("--runtime", default="auto", help="What runs the backbone: as --model.runtime of fit.")
    add("--max_megabytes", type=float, default=64, help="Of one request (64).")
    add("--max_megapixels", type=float, default=50, help="Of one image (50).")
    add("--max_images", type=int, default=32, help="In one request (32).")
    add("--max_seconds", type=float, default=30, help="Until a request is answered (30).")
    add("--max_requests", type=int, default=64, help="At the same time (64).")
    return parser
