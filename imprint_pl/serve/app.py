"""The HTTP routes, and their description in `/openapi.json`."""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from imprint_pl import __version__
from imprint_pl.drawing.page import render
from imprint_pl.errors import ImprintError
from imprint_pl.serve.limits import Refused
from imprint_pl.serve.service import Service
from imprint_pl.serve.uploads import IMAGES, NAME, read_form
from imprint_pl.serve.version import Prediction, ServedClass, Version

PAGE = Path(__file__).parent / "page.html.jinja"
# How many training images, and classes, an answer names.
NEIGHBOURS, TOP = 5, 5


@dataclass(frozen=True)
class Predictions:
    """The predictions of a request's images, in their order, all by one version."""

    version: str
    predictions: list[Prediction]


@dataclass(frozen=True)
class Classes:
    """The classes that are served.

    Attributes:
        version: differs after each change; `If-Match` takes it.
        number: how many changes lead to it from the checkpoint of the fit.
        change: the last one; empty where there is none.
        can_undo: whether that can be undone.
        calibrated: whether the probabilities were fitted on these very training images.
        classes: in the order of their labels.
    """

    version: str
    number: int
    change: str
    can_undo: bool
    calibrated: bool
    classes: list[ServedClass]


@dataclass(frozen=True)
class Health:
    """The answer of a running server."""

    status: str
    version: str
    classes: int


@dataclass(frozen=True)
class Fault:
    """Why a request was refused."""

    detail: str


def _form(required: list[str], description: str) -> dict[str, Any]:
    """Describes the form of a request. Routes read the form themselves, to apply the limits."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    properties = {IMAGES: files, NAME: {"type": "string", "description": description}}
    schema = {
        "type": "object",
        "required": required,
        "properties": {name: properties[name] for name in required},
    }
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _faults(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Fault} for code in codes}


READS = _faults(408, 413, 415, 422, 503, 504)
CHANGES = _faults(401, 403, 412)
Expected = Annotated[
    str | None, Header(alias="If-Match", description="Version that must be served, in quotes.")
]
Token = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def make_app(service: Service, token: str | None) -> FastAPI:
    """Returns the application.

    Args:
        service: the service that answers requests.
        token: the token that allows changes of the classes; `None` if changes are not allowed.
    """
    app = FastAPI(
        title="imprint_pl",
        version=__version__,
        description="An imprinted image classifier. Errors are JSON with one text, `detail`.",
        # These pages would load scripts from other sites.
        docs_url=None,
        redoc_url=None,
    )
    page = _page(service, token is not None)

    def may_change(given: Token) -> None:
        if token is None:
            raise Refused(403, "the classes cannot be changed here: serve with --allow_changes")
        sent = "" if given is None else given.credentials
        if not hmac.compare_digest(sent.encode(), token.encode()):
            raise Refused(
                401,
                "changes need the token that `serve` has printed: Authorization: Bearer TOKEN",
                {"www-authenticate": "Bearer"},
            )

    def classes_of(version: Version) -> Classes:
        changes = service.changes
        return Classes(
            version=version.id,
            number=version.number,
            change=version.change,
            can_undo=token is not None and version is changes.current and changes.can_undo,
            calibrated=bool(version.head.settings.get("calibrated", True)),
            classes=version.classes,
        )

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        headers = dict(error.headers)
        if error.status in (408, 413):
            # Close the connection, since the rest of the body is not read.
            headers["connection"] = "close"
        return JSONResponse({"detail": str(error)}, error.status, headers)

    @app.exception_handler(ImprintError)
    async def mistake(request: Request, error: ImprintError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health", summary="Whether the server answers")
    async def health() -> Health:
        version = service.changes.current
        return Health("ok", version.id, version.head.num_classes)

    @app.post(
        "/predict",
        summary="Classes of images",
        responses=READS,
        openapi_extra=_form([IMAGES], ""),
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="Classes to name.")] = TOP,
        neighbours: Annotated[
            int, Query(ge=0, le=50, description="Training images to name, where they are kept.")
        ] = NEIGHBOURS,
    ) -> Predictions:
        form = await read_form(request, service.limits)
        found = await service.predict(form, top, neighbours)
        return Predictions(found.version.id, found.predictions)

    @app.get("/classes", summary="The classes")
    async def classes() -> Classes:
        return classes_of(service.changes.current)

    @app.post(
        "/classes",
        summary="Add a class",
        status_code=201,
        dependencies=[Depends(may_change)],
        responses=READS | CHANGES | _faults(409, 507),
        openapi_extra=_form([IMAGES, NAME], "The new class."),
    )
    async def add_class(request: Request, if_match: Expected = None) -> Classes:
        form = await read_form(request, service.limits)
        return classes_of(await service.add_class(form, _version_in(if_match)))

    @app.patch(
        "/classes",
        summary="Add images to a class",
        dependencies=[Depends(may_change)],
        responses=READS | CHANGES | _faults(404, 507),
        openapi_extra=_form([IMAGES, NAME], "The class."),
    )
    async def add_examples(request: Request, if_match: Expected = None) -> Classes:
        form = await read_form(request, service.limits)
        return classes_of(await service.add_examples(form, _version_in(if_match)))

    @app.delete(
        "/classes",
        summary="Remove a class",
        dependencies=[Depends(may_change)],
        responses=CHANGES | _faults(404, 409, 507),
    )
    async def remove_class(name: str, if_match: Expected = None) -> Classes:
        return classes_of(await service.remove_class(name, _version_in(if_match)))

    @app.post(
        "/undo",
        summary="Undo the last change",
        dependencies=[Depends(may_change)],
        responses=CHANGES | _faults(409),
    )
    async def undo(if_match: Expected = None) -> Classes:
        return classes_of(await service.undo(_version_in(if_match)))

    @app.get("/pictures/{key}", response_class=Response, responses=_faults(404))
    async def picture(key: str) -> Response:
        headers = {"cache-control": "private, max-age=3600"}
        return Response(await service.picture(key), media_type="image/jpeg", headers=headers)

    return app


def _version_in(if_match: str | None) -> str | None:
    """Returns the version that an If-Match header names; `None` if any version is accepted."""
    return None if if_match in (None, "*") else str(if_match).strip().strip('"')


def _page(service: Service, changes: bool) -> str:
    facts = {"changes": changes} | asdict(service.limits)
    return render(PAGE, name=service.changes.checkpoint.name, facts=json.dumps(facts))
