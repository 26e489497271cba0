"""The page for people: photographs in, verdicts in words, what a budget would change, and a report to take away."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import resources
from io import BytesIO
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import numpy as np
from fastapi import APIRouter, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ddad import __version__
from ddad.images import encode_jpeg
from ddad.server.api import (
    InspectionId,
    ModelName,
    facts,
    hosted_model,
    inspected,
    station_of,
)
from ddad.server.guard import COOKIE, GuardSettings, same
from ddad.server.history import Inspection
from ddad.server.hosting import Hosted, Version
from ddad.server.station import PICTURES, Station

GALLERY = 24
"""Inspections shown at first, and by each "Show more"."""
BINS = 40
WIDELY = 4
"""Where the largest score is more than so many times the smallest, the axis is logarithmic."""
MOST_REPORTED = 200
REPORT_SIDE = 320
"""Pixels of the longer side of pictures in a report."""
KINDS = {
    "reconstruction": "the part as the model expects it without a defect",
    "heatmap": "where the photograph differs from what the model expects",
    "overlay": "the photograph with what differs in colour",
}
_NO_INSPECTION = "Expected the id of an inspection that is kept, found none of this id."
_MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_STATIC = {
    name: resources.files("ddad.server").joinpath("static", name).read_bytes()
    for name in ("style.css", "page.js", "htmx.min.js", "icon.svg")
}
_HASHES = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in _STATIC.items()}
Verdict = Literal["all", "anomalous", "good"]
_WANTED: dict[Verdict, bool | None] = {"all": None, "anomalous": True, "good": False}

page = APIRouter(include_in_schema=False)


@page.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request, model: ModelName = None, inspection: str = "") -> Response:
    """Everything: the inspection asked for, or else the latest one of this model."""
    station = station_of(request)
    hosted = hosted_model(station, model)

    def render() -> Response:
        latest = station.history.latest(1, model=hosted.name)
        found = station.history.get(inspection) if inspection else None
        shown = found or (latest[0] if latest else None)
        return _render(
            "index.html",
            models=list(station.models),
            max_files=request.app.state.max_files,
            view=_view(station, shown) if shown else None,
            errors=[_NO_INSPECTION] if inspection and not found else [],
            **_gallery(station, hosted, "all"),
            **_model(hosted),
        )

    return await station.in_thread(render)


@page.post("/page/inspect")
async def inspect(
    request: Request,
    file: Annotated[list[UploadFile], File()],
    model: ModelName = None,
    verdict: Annotated[Verdict, Form()] = "all",
) -> Response:
    """Inspect photographs: the view of the last one, the gallery, and a sentence a file that is no photograph."""
    station = station_of(request)
    hosted = hosted_model(station, model)
    answers = await inspected(request, hosted, file)
    errors = [answer.error for answer in answers if answer.error]
    found = [answer.inspection for answer in answers if answer.inspection]

    def render() -> Response:
        return _render(
            "inspected.html",
            headers={"hx-replace-url": _address(found[-1])},
            view=_view(station, found[-1]),
            errors=errors,
            **_gallery(station, hosted, verdict),
            **_model(hosted),
        )

    return await station.in_thread(render)


@page.get("/page/inspections/{inspection_id}")
async def inspection(request: Request, inspection_id: InspectionId) -> Response:
    """The view of one inspection."""
    station = station_of(request)

    def render() -> Response:
        found = station.history.get(inspection_id)
        if found is None:
            raise HTTPException(404, _NO_INSPECTION)
        return _render("view.html", headers={"hx-replace-url": _address(found)}, view=_view(station, found))

    return await station.in_thread(render)


@page.get("/page/gallery")
async def gallery(
    request: Request,
    model: ModelName = None,
    verdict: Verdict = "all",
    before: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None,
) -> Response:
    """Past inspections, or with `before` the older ones to add to them."""
    station = station_of(request)
    hosted = hosted_model(station, model)
    return await station.in_thread(
        lambda: _render("gallery.html", hosted=hosted, **_gallery(station, hosted, verdict, before))
    )


@page.get("/page/budget")
async def budget(request: Request, percent: str = "", model: ModelName = None) -> Response:
    """What another false-alarm budget would change. Changes nothing."""
    station = station_of(request)
    hosted, rate = hosted_model(station, model), _rate(percent)
    effect, recent = await station.in_thread(lambda: station.effect(hosted, rate))
    return _render("effect.html", hosted=hosted, effect=effect, recent=recent, percent=percent, facts=facts(hosted))


@page.post("/page/budget")
async def apply_budget(request: Request, percent: Annotated[str, Form()] = "", model: ModelName = None) -> Response:
    """Judge by another budget from now on."""
    station = station_of(request)
    hosted = hosted_model(station, model)
    await station.apply_budget(hosted, _rate(percent))
    return _render("model.html", headers={"hx-trigger": "budget"}, applied=True, **_model(hosted))


@page.get("/page/report")
async def report(request: Request, model: ModelName = None, since: datetime | None = None) -> Response:
    """One file about the inspections since a moment, by default the start of the server."""
    station = station_of(request)
    hosted = hosted_model(station, model)
    start = station.started if since is None else (since if since.tzinfo else since.replace(tzinfo=UTC)).astimezone(UTC)
    now = datetime.now(UTC)

    def render() -> Response:
        shown: list[Inspection] = []
        inspected = anomalous = 0
        for one in _since(station, hosted, start):
            inspected, anomalous = inspected + 1, anomalous + one.is_anomalous
            if len(shown) < MOST_REPORTED:
                shown.append(one)
        return _render(
            "session.html",
            headers={"content-disposition": f'attachment; filename="ddad-{hosted.name}-{now:%Y-%m-%d-%H%M}.html"'},
            start=start,
            now=now,
            inspected=inspected,
            anomalous=anomalous,
            cards=[(one, _verdict(one), list(_small_pictures(station, one))) for one in shown],
            **_model(hosted),
        )

    return await station.in_thread(render)


@page.get("/login")
async def login(request: Request) -> Response:
    """Ask for the token."""
    if _guard(request).token is None:
        return RedirectResponse("/", 303)
    return _login_form()


@page.post("/login")
async def enter(request: Request, token: Annotated[str, Form()] = "") -> Response:
    """Let a browser in that shows the token."""
    guard = _guard(request)
    if guard.token is not None and not same(token.strip(), guard.token):
        return _login_form("This is not the server's token; ask whoever runs the server for it.", 401)
    answer = RedirectResponse("/", 303)
    if guard.token is not None:
        answer.set_cookie(
            COOKIE, guard.session, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
    return answer


@page.get("/static/{name}")
async def static(name: str, v: str = "") -> Response:
    """A file of the page; under the hash of its content it never changes."""
    if name not in _STATIC:
        raise HTTPException(404, "Expected a file of the page, found no such file.")
    lasting = "public, max-age=31536000, immutable" if v == _HASHES[name] else "no-cache"
    media_type = _MEDIA_TYPES[name.rsplit(".", 1)[1]]
    return Response(_STATIC[name], media_type=media_type, headers={"cache-control": lasting})


# -- what the templates show -------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.2g}\xa0%" if rate < 0.1 else f"{100 * rate:.4g}\xa0%"


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


_ENVIRONMENT = Environment(
    loader=PackageLoader("ddad.server"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"number": _number, "percent": _percent, "moment": _moment}
_ENVIRONMENT.globals |= {"static": lambda name: f"/static/{name}?v={_HASHES[name]}", "release": __version__}


def _render(template: str, status: int = 200, headers: dict[str, str] | None = None, **context: Any) -> HTMLResponse:
    return HTMLResponse(_ENVIRONMENT.get_template(template).render(context), status, headers)


def _login_form(mistake: str = "", status: int = 200) -> Response:
    # With no referrer at all, browsers do not say either from which page a form comes.
    return _render("login.html", status, {"referrer-policy": "same-origin"}, mistake=mistake)


def _guard(request: Request) -> GuardSettings:
    return request.app.state.guard


def _address(one: Inspection) -> str:
    return "/?" + urlencode({"model": one.model, "inspection": one.id})


def _rate(percent: str) -> float:
    try:
        rate = float(percent.replace("%", "").replace(",", ".")) / 100
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1:
        raise HTTPException(
            422, f"Expected a rate above 0 and below 100 %, found {percent[:40]!r}; enter one such as 1 or 0.5."
        )
    return rate


def _model(hosted: Hosted) -> dict[str, Any]:
    return {"hosted": hosted, "facts": facts(hosted), "current": _percent_text(hosted)}


def _percent_text(hosted: Hosted) -> str:
    """The budget as one enters it."""
    assert hosted.current.calibration.false_alarms is not None
    return f"{100 * hosted.current.calibration.false_alarms:.6g}"


def _gallery(station: Station, hosted: Hosted, verdict: Verdict, before: str | None = None) -> dict[str, Any]:
    found = station.history.latest(GALLERY + 1, is_anomalous=_WANTED[verdict], model=hosted.name, before=before)
    return {
        "items": found[:GALLERY],
        "has_more": len(found) > GALLERY,
        "verdict": verdict,
        "before": before,
        "kept": station.history.count(model=hosted.name),
        "kept_anomalous": station.history.count(model=hosted.name, is_anomalous=True),
    }


def _verdict(one: Inspection) -> str:
    if not one.is_anomalous:
        return "No defect found"
    return f"Anomalous: {len(one.regions)} region{'' if len(one.regions) == 1 else 's'}"


def _view(station: Station, one: Inspection) -> dict[str, Any]:
    """One inspection, and what the version that judged it says of it, where it is still at hand."""
    version = _version(station, one)
    calibration = version.calibration if version else None
    return {
        "inspection": one,
        "address": _address(one),
        "verdict": _verdict(one),
        "how_sure": _how_sure(one, len(calibration.scores) if calibration else None),
        "kinds": {kind: text for kind, text in KINDS.items() if kind in one.pictures},
        "has_photo": "photo" in one.pictures,
        "boxes": _boxes(one),
        "distribution": _distribution(calibration.scores, one.threshold, one.anomaly_score) if calibration else None,
        "budget_changed": _budget_changed(one, calibration.threshold if calibration else None),
    }


def _version(station: Station, one: Inspection) -> Version | None:
    hosted = station.models.get(one.model)
    versions = (hosted.current, hosted.previous) if hosted else ()
    return next((version for version in versions if version and version.number == one.version), None)


def _how_sure(one: Inspection, images: int | None) -> str:
    p = f"p\xa0=\xa0{one.p_value:.2g}"
    if images is None:
        return f"Judged by version {one.version}, which is no longer in use: {p}."
    at_least = round(one.p_value * (images + 1)) - 1
    if at_least == 0:
        return f"None of {images} good calibration parts scored this high: {p}."
    return f"Of {images} good calibration parts, {at_least} scored at least this high: {p}."


def _budget_changed(one: Inspection, threshold: float | None) -> str:
    if threshold is None or threshold == one.threshold:
        return ""
    is_anomalous = one.anomaly_score > threshold
    return (
        f"Judged by the threshold of its time, {_number(one.threshold)}. By today's, {_number(threshold)}, the verdict "
        f"would be {'the same' if is_anomalous == one.is_anomalous else 'anomalous' if is_anomalous else 'good'}."
    )


def _boxes(one: Inspection) -> list[dict[str, Any]]:
    """Regions with their places in percent of the photograph, as SVG without a viewBox wants them."""
    boxes = []
    for number, region in enumerate(one.regions, start=1):
        left, top, right, bottom = region["box"]
        x, y = 100 * left / one.width, 100 * top / one.height
        boxes.append(
            {
                "number": number,
                "x": x,
                "y": y,
                "width": 100 * (right - left) / one.width,
                "height": 100 * (bottom - top) / one.height,
                "is_above": y > 8,  # the number stands above its box, where there is room
                "share": region["area"] / (one.width * one.height),
                **region,
            }
        )
    return boxes


def _distribution(scores: Sequence[float], threshold: float, score: float) -> dict[str, Any]:
    """The scores of good parts as bars, with all places in percent."""
    low, high = min(*scores, threshold, score), max(*scores, threshold, score)
    if low == high:
        low, high = low - 0.5, high + 0.5
    logarithmic = bool(low > 0 and high / low > WIDELY)

    def place(value: Any) -> Any:
        share = np.log(value / low) / np.log(high / low) if logarithmic else (value - low) / (high - low)
        return 2 + 96 * share

    counts, edges = np.histogram(place(np.array(scores)), BINS, (2, 98))
    return {
        "images": len(scores),
        "low": min(scores),
        "high": max(scores),
        "bars": [
            {"x": float(left), "count": int(count), "height": 100 * float(count / counts.max())}
            for left, count in zip(edges, counts, strict=False)
            if count
        ],
        "bar_width": 96 / BINS,
        "ticks": [
            (2 + 96 * t, low * (high / low) ** t if logarithmic else low + t * (high - low))
            for t in np.linspace(0, 1, 5)
        ],
        "threshold": float(place(threshold)),
        "score": float(place(score)),
        "logarithmic": logarithmic,
    }


def _since(station: Station, hosted: Hosted, start: datetime) -> Iterator[Inspection]:
    """Inspections since a moment, the latest first."""
    before: str | None = None
    while found := station.history.latest(MOST_REPORTED, model=hosted.name, before=before):
        for one in found:
            if one.time < start:
                return
            yield one
        before = found[-1].id


def _small_pictures(station: Station, one: Inspection) -> Iterator[tuple[str, str]]:
    for kind in PICTURES:
        if content := station.history.picture(one.id, kind):
            with Image.open(BytesIO(content)) as picture:
                picture.thumbnail((REPORT_SIDE, REPORT_SIDE))
                small = encode_jpeg(np.asarray(picture.convert("RGB")))
            yield kind, f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
