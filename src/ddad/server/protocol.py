"""The Open Inference Protocol v2, with Triton's binary tensors, so that its clients work unchanged.

A request gives photographs as `image` (UINT8, [N, H, W, 3], all of one size) or as `file` (BYTES, [N], encoded image
files). Nothing of it is remembered in the history.
"""

import json
import math
import re
import struct
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddad import __version__
from ddad.server.api import ERRORS, hosted_model, station_of, unless_gone
from ddad.server.hosting import Hosted, Version
from ddad.server.station import Answer, Upload

BINARY_LENGTH = "inference-header-content-length"
MOST_IMAGES = 64
MOST_JSON = 16 << 20
"""Bytes; pixels as JSON take ten times their room, and time to match."""
DTYPES = {"UINT8": np.uint8, "FP32": np.float32, "BOOL": np.bool_}

protocol = APIRouter(prefix="/v2", responses={status: ERRORS[status] for status in (400, 401, 403, 404, 413, 429, 503)})


class Tensor(BaseModel):
    """A tensor of a request."""

    model_config = ConfigDict(extra="ignore")

    name: str
    shape: list[Annotated[int, Field(ge=-(2**31), lt=2**31)]] = Field(max_length=8)
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class WantedOutput(BaseModel):
    name: str
    parameters: dict[str, Any] = {}


class InferenceRequest(BaseModel):
    """A request to infer; with binary tensors it is followed by their bytes."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[Tensor]
    outputs: list[WantedOutput] | None = None


class _Output:
    def __init__(self, datatype: str, shape: Callable[[Version], list[int]], read: Callable[[Answer], Any]) -> None:
        self.datatype, self.shape, self.read = datatype, shape, read


def _prediction(name: str) -> Callable[[Answer], Any]:
    def read(answer: Answer) -> Any:
        assert answer.inspected
        return getattr(answer.inspected.prediction, name)

    return read


OUTPUTS = {
    "anomaly_score": _Output("FP32", lambda version: [], _prediction("anomaly_score")),
    "p_value": _Output("FP32", lambda version: [], _prediction("p_value")),
    "is_anomalous": _Output("BOOL", lambda version: [], _prediction("is_anomalous")),
    "threshold": _Output("FP32", lambda version: [], _prediction("threshold")),
    "anomaly_map": _Output("FP32", lambda version: [*version.detector.shape], _prediction("anomaly_map")),
    "reconstruction": _Output("UINT8", lambda version: [*version.detector.shape, 3], _prediction("reconstruction")),
}
BY_DEFAULT = ("anomaly_score", "p_value", "is_anomalous", "threshold")


@protocol.get("")
async def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of this server."""
    return {"name": "ddad", "version": __version__, "extensions": ["binary_tensor_data"]}


@protocol.get("/health/live")
async def live() -> dict[str, bool]:
    """Whether the process answers."""
    return {"live": True}


@protocol.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether models are loaded and photographs are taken."""
    is_ready = request.app.state.ready
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


def _model(request: Request, name: str, version: str | None = None) -> Hosted:
    hosted = hosted_model(station_of(request), name)
    if version is not None and version != hosted.current.number:
        raise HTTPException(404, f"Expected version {hosted.current.number} of {name}, found {version[:80]!r}.")
    return hosted


@protocol.get("/models/{name}")
@protocol.get("/models/{name}/versions/{version}")
async def model_metadata(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Inputs and outputs of a model. Give one of the inputs."""
    current = _model(request, name, version).current
    return {
        "name": name,
        "versions": [current.number],
        "platform": "ddad",
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
            {"name": "file", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": name, "datatype": output.datatype, "shape": [-1, *output.shape(current)]}
            for name, output in OUTPUTS.items()
        ],
    }


@protocol.get("/models/{name}/ready")
@protocol.get("/models/{name}/versions/{version}/ready")
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Whether a model takes photographs."""
    _model(request, name, version)
    return {"name": name, "ready": True}


_BODY = {
    "requestBody": {"content": {"application/json": {"schema": InferenceRequest.model_json_schema()}}, "required": True}
}


@protocol.post("/models/{name}/infer", openapi_extra=_BODY)
@protocol.post("/models/{name}/versions/{version}/infer", openapi_extra=_BODY)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Inspect photographs; by default the answer has scores, p-values, verdicts and thresholds."""
    hosted, station = _model(request, name, version), station_of(request)
    body, header_length = await request.body(), request.headers.get(BINARY_LENGTH)
    most = min(MOST_IMAGES, station.settings.most_waiting)

    def read() -> tuple[InferenceRequest, list[str], list[bytes | np.ndarray]]:
        asked, binary = _parse(body, header_length)
        return asked, _wanted(asked), _photographs(asked, binary, most, station.settings.decoding.max_pixels)

    asked, wanted, photographs = await station.in_thread(read)

    async def work() -> list[Answer]:
        async with station.places(hosted, len(photographs)):
            return await station.inspect(hosted, [Upload(f"input {i}", one) for i, one in enumerate(photographs)])

    answers = await unless_gone(request, work())
    if errors := [answer.error for answer in answers if answer.error]:
        raise HTTPException(400, errors[0])
    return await station.in_thread(lambda: _response(asked, wanted, answers, name))


def _parse(body: bytes, header_length: str | None) -> tuple[InferenceRequest, bytes]:
    length = len(body)
    if header_length is not None:
        if not re.fullmatch("[0-9]{1,15}", header_length) or int(header_length) > len(body):
            raise HTTPException(
                400, f"Expected {BINARY_LENGTH} of at most {len(body)} bytes, found {header_length[:40]!r}."
            )
        length = int(header_length)
    if length > MOST_JSON:
        raise HTTPException(413, f"Expected at most {MOST_JSON:,} bytes of JSON, found {length:,}; send binary data.")
    try:
        return InferenceRequest.model_validate_json(body[:length]), body[length:]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise HTTPException(400, f"Expected an inference request, found in {place[:80]}: {first['msg']}.") from None


def _wanted(asked: InferenceRequest) -> list[str]:
    wanted = [one.name for one in asked.outputs or ()] or list(BY_DEFAULT)
    if unknown := [one for one in wanted if one not in OUTPUTS]:
        raise HTTPException(400, f"Expected outputs among {', '.join(OUTPUTS)}, found {unknown[0][:80]!r}.")
    if len({*wanted}) < len(wanted):
        raise HTTPException(400, "Expected each output once, found one twice; leave it out.")
    return wanted


def _photographs(asked: InferenceRequest, binary: bytes, most: int, max_pixels: int) -> list[bytes | np.ndarray]:
    if len(asked.inputs) != 1 or asked.inputs[0].name not in ("image", "file"):
        found = ", ".join(repr(one.name[:40]) for one in asked.inputs[:8]) or "none"
        raise HTTPException(400, f"Expected one input, 'image' or 'file', found {found}.")
    tensor = asked.inputs[0]
    if not tensor.shape or any(side < 1 for side in tensor.shape):
        raise HTTPException(400, f"Expected a shape of positive numbers, found {tensor.shape}.")
    if tensor.shape[0] > most:
        raise HTTPException(400, f"Expected 1 to {most} photographs a request, found {tensor.shape[0]}.")
    size = tensor.parameters.get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or size != len(binary):
            raise HTTPException(400, f"Expected {len(binary)} bytes of binary data, found binary_data_size {size!r}.")
    elif tensor.data is None:
        raise HTTPException(400, "Expected data in the input, or binary data behind the request, found neither.")
    given = None if size is None else binary
    return [*(_files(tensor, given) if tensor.name == "file" else _arrays(tensor, given, max_pixels))]


def _files(tensor: Tensor, binary: bytes | None) -> list[bytes]:
    if tensor.datatype != "BYTES":
        raise HTTPException(400, f"Expected datatype BYTES for 'file', found {tensor.datatype[:40]!r}.")
    if binary is None:
        raise HTTPException(400, "Expected 'file' as binary data, found JSON, which holds text only; use 'image'.")
    if len(tensor.shape) != 1:
        raise HTTPException(400, f"Expected shape [N] for 'file', found {tensor.shape}.")
    files, at = [], 0
    for _ in range(tensor.shape[0]):
        length = struct.unpack_from("<I", binary, at)[0] if at + 4 <= len(binary) else len(binary)
        files.append(binary[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(binary):
        raise HTTPException(400, f"Expected {tensor.shape[0]} files, each behind its length, found other bytes.")
    return files


def _arrays(tensor: Tensor, binary: bytes | None, max_pixels: int) -> list[np.ndarray]:
    if tensor.datatype != "UINT8":
        raise HTTPException(400, f"Expected datatype UINT8 for 'image', found {tensor.datatype[:40]!r}.")
    if len(tensor.shape) != 4 or tensor.shape[3] != 3:
        raise HTTPException(400, f"Expected shape [N, height, width, 3] for 'image', found {tensor.shape}.")
    if math.prod(tensor.shape[1:3]) > max_pixels:
        raise HTTPException(400, f"Expected at most {max_pixels:,} pixels a photograph, found {tensor.shape}.")
    try:
        values: np.ndarray
        if binary is not None:
            values = np.frombuffer(binary, np.uint8)
        else:
            values = np.asarray(tensor.data)
            if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
                raise ValueError
            values = values.astype(np.uint8)
        return list(values.reshape(tensor.shape))
    except ValueError:
        raise HTTPException(
            400, f"Expected {math.prod(tensor.shape)} whole numbers from 0 to 255, as the shape says, found others."
        ) from None


def _response(asked: InferenceRequest, wanted: list[str], answers: list[Answer], name: str) -> Response:
    assert answers[0].inspected
    head: dict[str, Any] = {"model_name": name, "model_version": answers[0].inspected.version.number}
    all_binary = bool(asked.parameters.get("binary_data_output"))
    as_binary = {one.name for one in asked.outputs or () if one.parameters.get("binary_data", all_binary)} or (
        {*wanted} if all_binary else set()
    )
    outputs, tail = [], []
    for kind in wanted:
        known = OUTPUTS[kind]
        values: np.ndarray = np.asarray([known.read(one) for one in answers], DTYPES[known.datatype])
        output: dict[str, Any] = {"name": kind, "datatype": known.datatype, "shape": list(values.shape)}
        if kind in as_binary:
            tail.append(values.tobytes())
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    if asked.id is not None:
        head["id"] = asked.id
    text = json.dumps({**head, "outputs": outputs}).encode()
    if not tail:
        return Response(text, media_type="application/json")
    return Response(
        b"".join((text, *tail)), media_type="application/octet-stream", headers={BINARY_LENGTH: str(len(text))}
    )
