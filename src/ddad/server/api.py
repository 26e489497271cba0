"""`/v1`: inspections, what is remembered of them, models and their budgets. And what the other routes share with it."""

import asyncio
import base64
from collections.abc import Awaitable, Collection
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, File, HTTPException, Path, Query, Request, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel

from ddad.server.history import Inspection
from ddad.server.hosting import Effect, Hosted
from ddad.server.station import Answer, Station, StationFull, TooLate, Upload

Result = TypeVar("Result")
MOST_FILES = 32
"""In one request."""
MOST_LISTED = 200
GONE = 499
"""Nobody is left to see this status; the log does."""


class Error(BaseModel):
    """Why there is no other answer."""

    error: str
    """One sentence: what was expected, what was found, what to do."""
    request_id: str


class ModelVersion(BaseModel):
    name: str
    version: str
    hash: str
    """SHA-256 that stands for the whole model folder."""


class RegionFound(BaseModel):
    """An anomalous region, in the photograph's own pixels."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom; right and bottom are exclusive."""
    area: int
    peak: float


class Inspected(BaseModel):
    """One inspected photograph."""

    id: str
    time: datetime
    request_id: str
    file: str
    model: str
    version: str
    anomaly_score: float
    p_value: float
    is_anomalous: bool
    threshold: float
    false_alarms: float
    """The budget that the threshold stands for."""
    height: int
    width: int
    regions: list[RegionFound]
    pictures: dict[str, str]
    """Addresses of the pictures that are kept."""


class FileResult(BaseModel):
    """What became of one file."""

    file: str
    inspection: Inspected | None = None
    pictures: dict[str, str] = {}
    """Those asked for, as PNG in base64."""
    error: str | None = None


class InspectAnswer(BaseModel):
    request_id: str
    model: ModelVersion
    results: list[FileResult]


class ModelFacts(ModelVersion):
    """A model in use: what it was trained on and what it promises."""

    category: str | None
    trained: str | None
    training_images: int
    calibration_images: int
    shape: tuple[int, int]
    false_alarms: float
    threshold: float
    promise: str
    drift: list[str]
    """Warnings of the last look; empty where recent photographs are like those of calibration."""
    has_previous: bool
    """Whether there is a version to go back to."""


@dataclass(frozen=True)
class BudgetEffect(Effect):
    """What a false-alarm budget means on the calibration images, and for recent inspections."""

    recent: dict[str, int]
    """How many there are, and how many would become anomalous (`more`) or good (`fewer`)."""


class Budget(BaseModel):
    false_alarms: Annotated[float, Query(gt=0, lt=1)]


class Swapped(BaseModel):
    changed: bool
    model: ModelFacts


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "A request that cannot be read.",
        401: "No token, or another one.",
        403: "From another page or host.",
        404: "No such thing.",
        408: "The request stopped arriving.",
        409: "Not possible as things are.",
        413: "Too large.",
        422: "Nothing in it that can be inspected.",
        429: "Too many at a time; Retry-After says when to come again.",
        503: "Too late, or the server is stopping.",
    }.items()
}

api = APIRouter(prefix="/v1", responses=ERRORS)
ModelName = Annotated[str | None, Query(description="A model that is served; by default the one named first.")]
PictureKind = Literal["heatmap", "overlay", "reconstruction"]


def station_of(request: Request) -> Station:
    return request.app.state.station


def hosted_model(station: Station, name: str | None) -> Hosted:
    if name is None:
        return station.default
    if name not in station.models:
        raise HTTPException(404, f"Expected a model among {', '.join(station.models)}, found {name[:80]!r}.")
    return station.models[name]


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for the work; stop it when the client goes away.

    Raises:
        HTTPException: the client is gone, the station is full, or the deadline passed.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(GONE, "The client went away.")
        return task.result()
    except StationFull as full:
        retry = {"Retry-After": f"{full.retry_after:.0f}"}
        raise HTTPException(429, "Expected room in the queue, found it full; try again later.", retry) from None
    except TooLate:
        seconds = station_of(request).settings.deadline
        sentence = f"Expected a result within {seconds:g} s, found none; try again later."
        raise HTTPException(503, sentence, {"Retry-After": "1"}) from None
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def inspected(
    request: Request, hosted: Hosted, files: list[UploadFile], pictures: Collection[str] = ()
) -> list[Answer]:
    """What becomes of uploaded files; raises HTTPException where there is no answer to the request as a whole."""
    most, station = request.app.state.max_files, station_of(request)
    if len(files) > most:
        raise HTTPException(413, f"Expected at most {most} files a request, found {len(files)}; send fewer.")

    async def work() -> list[Answer]:
        async with station.places(hosted, len(files)):
            uploads = [Upload(file.filename or "", await file.read()) for file in files]
            answers = await station.inspect(hosted, uploads, pictures)
        # Past the deadline's reach: what is remembered is answered.
        return await station.remember(answers, request.state.request_id)

    answers = await unless_gone(request, work())
    if not any(answer.inspection for answer in answers):
        raise HTTPException(422, " ".join(answer.error or "" for answer in answers))
    return answers


@api.post("/inspect")
async def inspect(
    request: Request,
    file: Annotated[list[UploadFile], File(description="Photographs.", min_length=1)],
    model: ModelName = None,
    pictures: Annotated[list[PictureKind], Query(description="Also send these, as PNG in base64.")] = [],  # noqa: B006
) -> InspectAnswer:
    """Inspect one or more photographs. A file that is none gets a sentence, and the others are inspected."""
    answers = await inspected(request, hosted_model(station_of(request), model), file, {*pictures})
    version = next(answer.inspected.version for answer in answers if answer.inspected)
    return InspectAnswer(
        request_id=request.state.request_id,
        model=ModelVersion(name=version.name, version=version.number, hash=version.digest),
        results=[
            FileResult(
                file=answer.file,
                inspection=_inspected(answer.inspection) if answer.inspection else None,
                pictures={kind: base64.b64encode(content).decode() for kind, content in answer.asked.items()},
                error=answer.error,
            )
            for answer in answers
        ],
    )


def _inspected(inspection: Inspection) -> Inspected:
    known = {name: value for name, value in asdict(inspection).items() if name in Inspected.model_fields}
    addresses = {kind: f"/v1/inspections/{inspection.id}/{kind}" for kind in inspection.pictures}
    return Inspected(**{**known, "pictures": addresses})


# -- what is remembered ------------------------------------------------------------------------------------------------

InspectionId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]


@api.get("/inspections")
async def inspections(
    request: Request,
    count: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 50,
    is_anomalous: bool | None = None,
    model: ModelName = None,
    before: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$", description="Older than this one.")] = None,
) -> list[Inspected]:
    """Past inspections, the latest first."""
    station = station_of(request)
    found = await station.in_thread(
        lambda: station.history.latest(count, is_anomalous=is_anomalous, model=model, before=before)
    )
    return [_inspected(one) for one in found]


@api.get("/inspections/{inspection_id}")
async def inspection(request: Request, inspection_id: InspectionId) -> Inspected:
    """One past inspection."""
    station = station_of(request)
    found = await station.in_thread(lambda: station.history.get(inspection_id))
    if found is None:
        raise HTTPException(404, "Expected the id of an inspection that is kept, found none of this id.")
    return _inspected(found)


@api.get(
    "/inspections/{inspection_id}/{picture}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}, "image/jpeg": {}}, "description": "The picture."}},
)
async def picture(
    request: Request, inspection_id: InspectionId, picture: Literal["photo", "heatmap", "overlay", "reconstruction"]
) -> Response:
    """A picture of a past inspection."""
    station = station_of(request)
    content = await station.in_thread(lambda: station.history.picture(inspection_id, picture))
    if content is None:
        raise HTTPException(404, "Expected the id of an inspection that is kept, found no such picture.")
    kind = "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
    # What is once there under an id never changes.
    return Response(content, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})


# -- models ------------------------------------------------------------------------------------------------------------


@api.get("/models")
async def models(request: Request) -> list[ModelFacts]:
    """The models that are served."""
    return [facts(one) for one in station_of(request).models.values()]


@api.get("/models/{name}")
async def model(request: Request, name: str) -> ModelFacts:
    """What a model was trained on and what it promises."""
    return facts(hosted_model(station_of(request), name))


def facts(hosted: Hosted) -> ModelFacts:
    """What people should know of a model in use."""
    version = hosted.current
    record, calibration = version.detector.record, version.calibration
    assert calibration.false_alarms is not None
    assert calibration.threshold is not None
    return ModelFacts(
        name=hosted.name,
        version=version.number,
        hash=version.digest,
        category=record.get("category"),
        trained=record.get("trained"),
        training_images=len(record.get("data", {}).get("train", ())),
        calibration_images=len(calibration.scores),
        shape=version.detector.shape,
        false_alarms=calibration.false_alarms,
        threshold=calibration.threshold,
        promise=calibration.promise(),
        drift=[alarm.message for alarm in version.alarms.values()],
        has_previous=hosted.previous is not None,
    )


@api.get("/models/{name}/budget")
async def budget(
    request: Request, name: str, false_alarms: Annotated[float, Query(gt=0, lt=1, description="The rate, as 0.01.")]
) -> BudgetEffect:
    """What another false-alarm budget would mean. Changes nothing."""
    station = station_of(request)
    hosted = hosted_model(station, name)
    effect, recent = await station.in_thread(lambda: station.effect(hosted, false_alarms))
    return BudgetEffect(**asdict(effect), recent=recent)


@api.put("/models/{name}/budget")
async def apply_budget(request: Request, name: str, budget: Budget) -> ModelFacts:
    """Judge by another false-alarm budget from now on."""
    station = station_of(request)
    hosted = hosted_model(station, name)
    await station.apply_budget(hosted, budget.false_alarms)
    return facts(hosted)


@api.post("/models/{name}/reload")
async def reload(request: Request, name: str) -> Swapped:
    """Serve what the model's folder holds now, once it has proved to work; until then the version in use serves."""
    station = station_of(request)
    hosted = hosted_model(station, name)
    changed = await station.reload(hosted)
    return Swapped(changed=changed, model=facts(hosted))


@api.post("/models/{name}/rollback")
async def rollback(request: Request, name: str) -> Swapped:
    """Serve the version before this one again."""
    station = station_of(request)
    hosted = hosted_model(station, name)
    station.roll_back(hosted)
    return Swapped(changed=True, model=facts(hosted))
