"""Triton's clients work unchanged; the server does what it says it does. pytest tests/test_server_protocol.py"""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tiny import SHAPE, photo, train_model, write_photos

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import schemathesis
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ddad import Detector
from serving import serving

PHOTOS = np.stack([photo(seed) for seed in range(100, 105)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("protocol")
    return train_model(write_photos(place / "good", range(40)), place / "tile")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving([model], tmp_path_factory.mktemp("history"), "--rate", "100000") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(model):
    return Detector.from_pretrained(model).predict(list(PHOTOS))


def as_input(photos, binary=True):
    tensor = triton.InferInput("image", list(photos.shape), "UINT8")
    tensor.set_data_from_numpy(photos, binary_data=binary)
    return [tensor]


def files(photos):
    encoded = []
    for one in photos:
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    tensor = triton.InferInput("file", [len(photos)], "BYTES")
    tensor.set_data_from_numpy(np.array(encoded, dtype=np.object_))
    return [tensor]


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tile")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "ddad"
    metadata = client.get_model_metadata("tile")
    version = metadata["versions"][0]
    assert client.is_model_ready("tile", version)
    assert not client.is_model_ready("tile", "1")
    assert client.get_model_metadata("tile", version) == metadata
    assert metadata["inputs"][0] == {"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}
    assert {"name": "anomaly_map", "datatype": "FP32", "shape": [-1, *SHAPE]} in metadata["outputs"]


@pytest.mark.parametrize("binary", [True, False])
def test_inference_is_the_detectors(client, expected, binary):
    answer = client.infer("tile", as_input(PHOTOS, binary), request_id="mine")
    assert answer.get_response()["id"] == "mine"
    for name in ("anomaly_score", "p_value", "threshold"):
        np.testing.assert_allclose(answer.as_numpy(name), [getattr(one, name) for one in expected], rtol=1e-4)
    assert answer.as_numpy("is_anomalous").tolist() == [one.is_anomalous for one in expected]
    assert answer.as_numpy("anomaly_map") is None


@pytest.mark.parametrize("binary", [True, False])
def test_maps_come_when_asked_for(client, expected, binary):
    wanted = [triton.InferRequestedOutput(name, binary) for name in ("anomaly_map", "reconstruction", "is_anomalous")]
    answer = client.infer("tile", as_input(PHOTOS), outputs=wanted)
    np.testing.assert_allclose(
        answer.as_numpy("anomaly_map"), [one.anomaly_map for one in expected], rtol=1e-3, atol=1e-4
    )
    difference = answer.as_numpy("reconstruction").astype(int) - [one.reconstruction for one in expected]
    assert np.abs(difference).max() <= 1
    assert answer.as_numpy("anomaly_score") is None


def test_encoded_files_of_any_size(client, expected):
    answer = client.infer("tile", files(PHOTOS))
    np.testing.assert_allclose(answer.as_numpy("anomaly_score"), [one.anomaly_score for one in expected], rtol=1e-4)
    large = np.asarray(Image.fromarray(PHOTOS[0]).resize((300, 200)))
    assert client.infer("tile", files([large, PHOTOS[1]])).as_numpy("anomaly_score").shape == (2,)


def test_a_version_can_be_asked_for(client):
    version = client.get_model_metadata("tile")["versions"][0]
    assert client.infer("tile", as_input(PHOTOS[:1]), model_version=version).get_response()["model_version"] == version
    with pytest.raises(triton.InferenceServerException, match=rf"Expected version {version} of tile, found '1'\."):
        client.infer("tile", as_input(PHOTOS[:1]), model_version="1")


SEVERAL = """
import json, sys
import numpy as np
import tritonclient.http as triton
address, photos = sys.argv[1], np.load(sys.argv[2])
def as_input(photo):
    tensor = triton.InferInput("image", list(photo.shape), "UINT8")
    tensor.set_data_from_numpy(photo)
    return [tensor]
with triton.InferenceServerClient(address, concurrency=8) as client:
    asked = [client.async_infer("tile", as_input(photos[i : i + 1])) for i in range(len(photos))]
    print(json.dumps([float(one.get_result().as_numpy("anomaly_score")[0]) for one in asked]))
"""


def test_several_at_a_time(server, expected, tmp_path):
    """In a process of its own: the client's event loop does not always survive what other tests do to theirs."""
    np.save(tmp_path / "photos.npy", np.concatenate([PHOTOS] * 4))
    command = [sys.executable, "-c", SEVERAL, server.address, str(tmp_path / "photos.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), [one.anomaly_score for one in expected] * 4, rtol=1e-4)


def body(**changes):
    tensor = {"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8", "data": [7] * 48}
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (b"{", "Expected an inference request, found in body: Invalid JSON"),
        ({"inputs": []}, "Expected one input, 'image' or 'file', found none."),
        (body(name="x"), "Expected one input, 'image' or 'file', found 'x'."),
        (body(datatype="FP32"), "Expected datatype UINT8 for 'image', found 'FP32'."),
        (body(name="file", shape=[1]), "Expected datatype BYTES for 'file', found 'UINT8'."),
        (body(name="file", datatype="BYTES"), "Expected 'file' as binary data, found JSON, which holds text only"),
        (body(shape=[4, 4, 3]), "Expected shape [N, height, width, 3] for 'image', found [4, 4, 3]."),
        (body(shape=[1, 4, 4, -3]), "Expected a shape of positive numbers, found [1, 4, 4, -3]."),
        (body(shape=[1, 4, 5, 3]), "Expected 60 whole numbers from 0 to 255, as the shape says, found others."),
        (body(data=[300] * 48), "Expected 48 whole numbers from 0 to 255, as the shape says, found others."),
        (body(data=["a"] * 48), "Expected 48 whole numbers from 0 to 255, as the shape says, found others."),
        (body(data=[[1], [1, 2]]), "Expected 48 whole numbers from 0 to 255, as the shape says, found others."),
        (body(data=None), "Expected data in the input, or binary data behind the request, found neither."),
        (body(parameters={"binary_data_size": 48}), "Expected 0 bytes of binary data, found binary_data_size 48."),
        (body() | {"outputs": [{"name": "x"}]}, "Expected outputs among anomaly_score, p_value, "),
        (body() | {"outputs": [{"name": "p_value"}] * 2}, "Expected each output once, found one twice; leave it out."),
        (body(shape=[100, 4, 4, 3]), "Expected 1 to 64 photographs a request, found 100."),
        (body(shape=[10**400, 4, 4, 3]), "Expected an inference request, found in inputs.0.shape.0: "),
        (body(shape=[1, 10**5, 10**5, 3]), "Expected at most 50,000,000 pixels a photograph, found "),
        (body(), "input 0: expected sides from "),
    ],
)
def test_requests_that_make_no_sense(server, sent, sentence):
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    response = httpx.post(f"{server.url}/v2/models/tile/infer", content=content)
    assert response.status_code == 400, response.text
    assert response.json()["error"].startswith(sentence)


def test_a_body_of_nothing_takes_no_time(server):
    """A million files of no length are seen to be too many before they are looked at."""
    head = json.dumps(
        body(name="file", datatype="BYTES", shape=[60], data=None, parameters={"binary_data_size": 8_000_000})
    )
    started = time.monotonic()
    headers = {"inference-header-content-length": str(len(head))}
    response = httpx.post(
        f"{server.url}/v2/models/tile/infer", content=head.encode() + bytes(8_000_000), headers=headers
    )
    assert response.status_code == 400
    assert response.json()["error"] == "Expected 60 files, each behind its length, found other bytes."
    assert time.monotonic() - started < 5


def test_a_binary_length_beyond_the_body(server):
    headers = {"inference-header-content-length": "1000"}
    response = httpx.post(f"{server.url}/v2/models/tile/infer", content=b"{}", headers=headers)
    assert response.json()["error"] == "Expected inference-header-content-length of at most 2 bytes, found '1000'."
    headers = {"inference-header-content-length": "1" * 5000}
    assert httpx.post(f"{server.url}/v2/models/tile/infer", content=b"{}", headers=headers).status_code == 400


# -- the OpenAPI document ----------------------------------------------------------------------------------------------


def test_the_server_does_what_its_description_says(server):
    """Requests made up from the document get answers that the document describes, and no failure of ours."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [one.ok() for one in schema.get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def conforms(case):
            # No schema says that bytes are a photograph: valid by it, most are rightly refused.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        conforms()
