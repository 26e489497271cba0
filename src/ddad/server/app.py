"""The whole server as one application: `/v1` for inspections, `/v2` for inference clients, `/` for people."""

import contextlib
import re
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ddad import __version__
from ddad.errors import DataError, DDADError
from ddad.server.api import GONE, MOST_FILES, api
from ddad.server.guard import Guard, GuardSettings, error_response, failure
from ddad.server.page import page
from ddad.server.protocol import protocol
from ddad.server.station import Station


def create_app(station: Station, guard: GuardSettings = GuardSettings(), max_files: int = MOST_FILES) -> Guard:  # noqa: B008
    """The whole server as an ASGI application; it closes the station when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.ready = True
        yield
        app.state.ready = False
        await station.close()

    app = FastAPI(
        title="ddad",
        version=__version__,
        summary="Visual anomaly detection: what a part would look like without its defect, and the difference.",
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.station, app.state.guard, app.state.max_files, app.state.ready = station, guard, max_files, False

    @app.get("/metrics", response_class=Response, include_in_schema=False)
    async def metrics() -> Response:
        return Response(station.measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(api)
    app.include_router(protocol)
    app.include_router(page)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), request.state.request_id, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        sentence = f"{place or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}."
        return error_response(422, re.sub(r"\.\.$", ".", sentence), request.state.request_id)

    @app.exception_handler(DDADError)
    async def impossible(request: Request, error: DDADError) -> Response:
        status = 503 if isinstance(error, DataError) else 409  # the history's disk, or what is asked of a model
        return error_response(status, str(error), request.state.request_id)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return failure(request.state.request_id)

    return Guard(app, guard, station.measures)
