"""Starts the server: loads the classifier, opens the port, and prints the address of the page."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn

from imprint_pl.errors import ImprintError
from imprint_pl.files import local_path
from imprint_pl.lightning.checkpoint import empty
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.serve.app import make_app
from imprint_pl.serve.changes import Changes
from imprint_pl.serve.limits import LOOPBACK, Guard, Limits
from imprint_pl.serve.service import Service

# Environment variable with the token, instead of a file.
TOKEN = "IMPRINT_PL_TOKEN"
# Shortest token, in characters, so that it cannot be guessed.
SHORTEST_TOKEN = 16
# Addresses that listen on all networks of this machine, but that clients cannot use.
ANY = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Options:
    """The options of `serve`.

    Attributes:
        checkpoint: a checkpoint of `fit`.
        host: the address of this machine to listen on.
        port: the port; 0 takes a free one.
        hosts: further names by which clients may address the server.
        allow_changes: whether clients with the token may change the classes.
        token_file: a file with the token. Without it the token is in the environment variable
            `IMPRINT_PL_TOKEN`, or a random one is printed.
        keep_images: folder for the images of added classes.
        device: the device of the backbone and the head; by default a GPU if there is one.
        runtime: as for `load_backbone`.
        limits: see `Limits`.
    """

    checkpoint: str
    host: str = "127.0.0.1"
    port: int = 8000
    hosts: Sequence[str] = ()
    allow_changes: bool = False
    token_file: str | None = None
    keep_images: str | None = None
    device: str | None = None
    runtime: str = "auto"
    limits: Limits = field(default_factory=Limits)


def serve(options: Options) -> None:
    """Serves a checkpoint until SIGTERM or Ctrl-C; requests that are being answered are finished.

    Raises:
        ImprintError: the checkpoint cannot be served, or the address cannot be used.
    """
    # Otherwise it would print a line for every incomplete form.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    hosts = _hosts(options)
    token, is_drawn = _token(options) if options.allow_changes else (None, False)
    listener = _listener(options.host, options.port)
    with listener:
        service = _service(options)
        try:
            app = Guard(make_app(service, token), hosts, options.limits)
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_level="warning",
                    access_log=False,
                    # Do not trust headers with a client's address.
                    proxy_headers=False,
                    server_header=False,
                    # This limit also counts connections without a request.
                    limit_concurrency=4 * options.limits.requests,
                    ws="none",
                )
            )
            version = service.changes.current
            change = f", {version.change}" if version.change else ""
            print(f"serving {options.checkpoint}: {version.head.num_classes} classes{change}")
            name = options.host if options.host not in ANY else next(iter(options.hosts))
            bracketed = f"[{name}]" if ":" in name else name
            secret = f"#token={token}" if is_drawn else ""
            print(f"page: http://{bracketed}:{listener.getsockname()[1]}/{secret}", flush=True)
            # uvicorn raises the signal again when it has finished. Ignore it then, so that the
            # command ends normally.
            before = {
                number: signal.signal(number, lambda *_: None)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
            try:
                server.run(sockets=[listener])
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        finally:
            service.close()
    print("stopped")


def _service(options: Options) -> Service:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ImprintError(f"device={device!r}: give cpu, cuda or cuda:1") from error
    path = local_path(options.checkpoint)
    model = ImprintedClassifier.load_from_checkpoint(
        path, map_location="cpu", runtime=options.runtime
    )
    if model.head.is_empty:
        raise ImprintError(f"cannot serve: {empty(path)}")
    changes = Changes(path, model.to(place).eval(), options.allow_changes)
    try:
        return Service(changes, options.limits, options.keep_images)
    except BaseException:
        changes.close()
        raise


def _hosts(options: Options) -> list[str]:
    """Returns the names by which clients may address the server."""
    if options.host in ANY and not options.hosts:
        raise ImprintError(
            f"host={options.host!r} listens on every network of this machine: name the host as "
            "clients address it, --allow_host NAME, so that no other site can pass for it"
        )
    own = [] if options.host in ANY else [options.host]
    return [*LOOPBACK, *own, *options.hosts]


def _token(options: Options) -> tuple[str, bool]:
    """Returns the token for changes, and whether it is random and has to be printed."""
    if options.token_file is not None:
        path = Path(local_path(options.token_file))
        try:
            given, place = path.read_text().strip(), str(path)
        except (OSError, UnicodeError) as error:
            raise ImprintError(f"token_file {path} cannot be read ({error})") from error
    elif TOKEN in os.environ:
        given, place = os.environ[TOKEN].strip(), f"the variable {TOKEN}"
    else:
        return secrets.token_urlsafe(24), True
    if len(given) < SHORTEST_TOKEN or not (given.isascii() and given.isprintable()):
        raise ImprintError(
            f"the token in {place}: give at least {SHORTEST_TOKEN} letters and digits that nobody "
            "can guess"
        )
    return given, False


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise ImprintError(
            f"cannot listen at {host}, port {port} ({error}): give another --port, or --host an "
            "address of this machine"
        ) from error
