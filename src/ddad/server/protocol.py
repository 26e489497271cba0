"""The Open Inference Protocol v2, with Triton's binary tensors, so that its clients work unchanged.

A request gives photographs as `image` (UINT8, [N, H, W, 3], all of one size) or as `file` (BYTES, [N], encoded image
files). Nothing of it is remembered in the history.
"""

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddad import __version__
from ddad.server.api import ERRORS, hosted_model, station_of, unless_gone
from ddad.server.hosting import Hosted, Version
from ddad.server.station import Answer

BINARY_LENGTH = "inference-header-content-length"
MOST_IMAGES = 64
DTYPES = {"UINT8": np.uint8, "FP32": np.float32, "BOOL": np.bool_}

protocol = APIRouter(prefix="/v2", responses={status: ERRORS[status] for status in (400, 401, 403, 404, 413, 429, 503)})


class Tensor(BaseModel):
    """A tensor of a request."""

    model_config = ConfigDict(extra="ignore")

    name: str
    shape: list[int] = Field(max_length=8)
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
    hosted = _model(request, name, version)
    asked, binary = _parse(await request.body(), request.headers.get(BINARY_LENGTH))
    photographs = _photographs(asked, binary)
    wanted = [one.name for one in asked.outputs or ()] or list(BY_DEFAULT)
    if unknown := [one for one in wanted if one not in OUTPUTS]:
        raise HTTPException(400, f"Expected outputs among {', '.join(OUTPUTS)}, found {unknown[0][:80]!r}.")
    station = station_of(request)

    async def work() -> list[Answer]:
        async with station.places(hosted, len(photographs)):
            return await station.predict(hosted, photographs)

    answers = await unless_gone(request, work())
    if errors := [answer.error for answer in answers if answer.error]:
        raise HTTPException(400, errors[0])
    assert answers[0].inspected
    used = answers[0].inspected.version
    return _response(asked, wanted, answers, {"model_name": name, "model_version": used.number})


def _parse(body: bytes, header_length: str | None) -> tuple[InferenceRequest, bytes]:
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(body):
            raise HTTPException(
                400, f"Expected {BINARY_LENGTH} of at most {len(body)} bytes, found {header_length[:40]!r}."
            )
        length = int(header_length)
    try:
        return InferenceRequest.model_validate_json(body[:length]), body[length:]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise HTTPException(400, f"Expected an inference request, found in {place}: {first['msg']}.") from None


def _photographs(asked: InferenceRequest, binary: bytes) -> list[bytes | np.ndarray]:
    if len(asked.inputs) != 1 or asked.inputs[0].name not in ("image", "file"):
        found = ", ".join(repr(one.name[:40]) for one in asked.inputs[:8]) or "none"
        raise HTTPException(400, f"Expected one input, 'image' or 'file', found {found}.")
    tensor = asked.inputs[0]
    if any(side < 1 for side in tensor.shape):
        raise HTTPException(400, f"Expected a shape of positive numbers, found {tensor.shape}.")
    size = tensor.parameters.get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or size != len(binary):
            raise HTTPException(400, f"Expected {len(binary)} bytes of binary data, found binary_data_size {size!r}.")
    elif tensor.data is None:
        raise HTTPException(400, "Expected data in the input, or binary data behind the request, found neither.")
    images: list[bytes | np.ndarray]
    if tensor.name == "file":
        images = [*_files(tensor, binary if size is not None else None)]
    else:
        images = [*_arrays(tensor, binary if size is not None else None)]
    if not 1 <= len(images) <= MOST_IMAGES:
        raise HTTPException(400, f"Expected 1 to {MOST_IMAGES} photographs a request, found {len(images)}.")
    return images


def _files(tensor: Tensor, binary: bytes | None) -> list[bytes]:
    if tensor.datatype != "BYTES":
        raise HTTPException(400, f"Expected datatype BYTES for 'file', found {tensor.datatype[:40]!r}.")
    if binary is None:
        raise HTTPException(400, "Expected 'file' as binary data, found JSON, which holds text only; use 'image'.")
    files = []
    while binary:
        length = struct.unpack_from("<I", binary)[0] if len(binary) >= 4 else len(binary)
        if len(binary) < 4 + length:
            raise HTTPException(400, "Expected each file behind its length, found fewer bytes than that.")
        files.append(binary[4 : 4 + length])
        binary = binary[4 + length :]
    if len(files) != math.prod(tensor.shape):
        raise HTTPException(400, f"Expected {math.prod(tensor.shape)} files, as the shape says, found {len(files)}.")
    return files


def _arrays(tensor: Tensor, binary: bytes | None) -> list[np.ndarray]:
    if tensor.datatype != "UINT8":
        raise HTTPException(400, f"Expected datatype UINT8 for 'image', found {tensor.datatype[:40]!r}.")
    if len(tensor.shape) != 4 or tensor.shape[3] != 3:
        raise HTTPException(400, f"Expected shape [N, height, width, 3] for 'image', found {tensor.shape}.")
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


def _response(asked: InferenceRequest, wanted: list[str], answers: list[Answer], head: dict[str, Any]) -> Response:
    all_binary = bool(asked.parameters.get("binary_data_output"))
    as_binary = {one.name for one in asked.outputs or () if one.parameters.get("binary_data", all_binary)} or (
        {*wanted} if all_binary else set()
    )
    outputs, tail = [], []
    for name in wanted:
        values: np.ndarray = np.asarray([OUTPUTS[name].read(one) for one in answers], DTYPES[OUTPUTS[name].datatype])
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name].datatype, "shape": list(values.shape)}
        if name in as_binary:
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
