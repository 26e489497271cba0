"""The API of the server: answers, refusals, models swapped, budgets. pytest tests/test_server_app.py"""

import base64
import io
import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from hostile import benign, corpus
from tiny import photo, train_model, write_photos

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")


from ddad import Detector
from ddad.detector import check_files
from ddad.errors import ConfigError, DataError, ModelError
from ddad.prediction import PhotoStatistics
from ddad.refit import recalibrate
from ddad.server.guard import COOKIE, GuardSettings
from ddad.server.hosting import LoadSettings, Version
from ddad.server.station import Station, StationSettings, shown
from serving import HERE, in_process

TOKEN = "a token of twenty-six chars"


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def defective():
    pixels = photo(3)
    pixels[8:20, 8:20] = 255
    return pixels


GOOD_SEED = 102
GOOD, BAD = png(photo(GOOD_SEED)), png(defective())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    photos = write_photos(place / "good", range(40))
    return train_model(photos, place / "tile")


@pytest.fixture
def serve(tmp_path):
    """A function that starts a server in this process; a history that is named is shared."""
    with ExitStack() as stack:
        yield lambda *models, history="history", **options: stack.enter_context(
            in_process(models, tmp_path / history, **options)
        )


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with in_process([model], tmp_path_factory.mktemp("history")) as client:
        yield client


def inspect(client, *contents, **options):
    return client.post("/v1/inspect", files=[("file", (f"{i}.png", one)) for i, one in enumerate(contents)], **options)


def one(response):
    assert response.status_code == 200, response.text
    return response.json()["results"][0]["inspection"]


# -- inspection --------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_detectors(client, model):
    detector = Detector.from_pretrained(model)
    response = inspect(client, GOOD, BAD)
    answer = response.json()
    assert response.status_code == 200
    for result, pixels in zip(answer["results"], (photo(GOOD_SEED), defective()), strict=True):
        expected = detector.predict(pixels)
        found = result["inspection"]
        assert found["anomaly_score"] == pytest.approx(expected.anomaly_score, rel=1e-4)
        assert found["p_value"] == expected.p_value
        assert found["is_anomalous"] is expected.is_anomalous
        assert found["threshold"] == expected.threshold
        assert [region["box"] for region in found["regions"]] == [list(region.box) for region in expected.regions]
        assert (found["height"], found["width"]) == (32, 32)
    assert [result["inspection"]["is_anomalous"] for result in answer["results"]] == [False, True]
    assert [result["file"] for result in answer["results"]] == ["0.png", "1.png"]
    assert answer["model"]["hash"].startswith(answer["model"]["version"])
    assert response.headers["x-request-id"] == answer["request_id"] == answer["results"][0]["inspection"]["request_id"]


def test_regions_are_in_pixels_of_the_photograph(client):
    large = np.asarray(Image.fromarray(defective()).resize((320, 160)))
    found = one(inspect(client, png(large)))
    assert (found["height"], found["width"]) == (160, 320)
    left, top, right, bottom = found["regions"][0]["box"]
    assert 0 <= left < 81
    assert 199 < right <= 320
    assert 0 <= top < 41
    assert 99 < bottom <= 160


def test_pictures_come_when_asked_for(client):
    answer = inspect(client, BAD, params={"pictures": ["heatmap", "overlay", "reconstruction"]}).json()
    pictures = answer["results"][0]["pictures"]
    assert sorted(pictures) == ["heatmap", "overlay", "reconstruction"]
    for content in pictures.values():
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert (picture.format, picture.size) == ("PNG", (32, 32))
    assert inspect(client, BAD).json()["results"][0]["pictures"] == {}


def test_the_score_is_the_same_in_every_batch(client):
    photographs = [png(photo(200 + i)) for i in range(8)]
    alone = [one(inspect(client, content))["anomaly_score"] for content in photographs]
    results = inspect(client, *photographs, *photographs[::-1]).json()["results"]
    together = [result["inspection"]["anomaly_score"] for result in results]
    np.testing.assert_allclose(together, alone + alone[::-1], rtol=1e-4)


def test_what_is_no_photograph_gets_a_sentence_and_the_others_go_on(client):
    answer = inspect(client, GOOD, b"no picture", BAD)
    assert answer.status_code == 200
    first, second, third = answer.json()["results"]
    assert (first["inspection"]["is_anomalous"], third["inspection"]["is_anomalous"]) == (False, True)
    assert second == {"file": "1.png", "inspection": None, "pictures": {}, "error": second["error"]}
    assert second["error"].startswith("1.png: expected a PNG, JPEG, BMP, TIFF or WebP image, but")


@pytest.mark.parametrize("every", [32, pytest.param(1, marks=pytest.mark.slow)])
def test_every_hostile_file_is_answered_by_a_sentence(serve, model, tmp_path, every):
    shutil.copytree(model, tmp_path / "tile")
    record = json.loads((tmp_path / "tile" / "detector.json").read_text())
    record["image_rule"]["white"] = 4095  # of a 12-bit camera
    (tmp_path / "tile" / "detector.json").write_text(json.dumps(record))
    client = serve(tmp_path / "tile")
    for name, content in list(corpus().items())[::every]:
        response = client.post("/v1/inspect", files={"file": (name, content)})
        sentence = response.json()["error"]
        assert response.status_code == 422, name
        assert sentence.endswith("."), name
        assert "\n" not in sentence, name
        assert "Traceback" not in sentence, name
    for name, content in list(benign().items())[::every]:
        response = client.post("/v1/inspect", files={"file": (name, content)})
        assert response.status_code == 200, (name, response.text)
    assert one(inspect(client, GOOD))["is_anomalous"] is False


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_inspections_are_remembered_with_their_pictures(serve, model):
    client = serve(model)
    found = [one(inspect(client, content)) for content in (GOOD, BAD, GOOD)]
    listed = client.get("/v1/inspections").json()
    assert listed == found[::-1]
    assert client.get("/v1/inspections", params={"is_anomalous": True}).json() == [found[1]]
    assert client.get("/v1/inspections", params={"before": found[1]["id"]}).json() == [found[0]]
    assert client.get(f"/v1/inspections/{found[1]['id']}").json() == found[1]
    assert sorted(found[1]["pictures"]) == ["heatmap", "overlay", "photo", "reconstruction"]
    for address in found[1]["pictures"].values():
        response = client.get(address)
        with Image.open(io.BytesIO(response.content)) as picture:
            assert picture.size == (32, 32)
            assert response.headers["content-type"] == f"image/{picture.format.lower()}"


def test_a_restart_remembers(serve, model):
    first = serve(model)
    found = one(inspect(first, BAD))
    first.put("/v1/models/tile/budget", json={"false_alarms": 0.4})
    for _ in range(10):
        inspect(first, GOOD)
    watched = first.station.default.current.monitor
    first.__exit__(None, None, None)
    second = serve(model)
    assert second.get(f"/v1/inspections/{found['id']}").json() == found
    assert second.get("/v1/models/tile").json()["false_alarms"] == 0.4
    if watched:
        assert second.station.default.current.monitor.images == watched.images


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/v1/inspections/../../etc/passwd", 404),
        ("/v1/inspections/..%2f..%2fetc%2fpasswd", 404),
        (f"/v1/inspections/{'0' * 32}", 404),
        (f"/v1/inspections/{'0' * 32}/overlay", 404),
        (f"/v1/inspections/{'0' * 32}/..%2f..%2fdetector.json", 404),
        ("/v1/inspections/short", 422),
        ("/v1/inspections?count=0", 422),
        ("/v1/inspections?count=1000000", 422),
        ("/v1/inspections?model=other", 200),
        ("/v1/models/other", 404),
        ("/v1/models/%2e%2e", 404),
        ("/static/../app.py", 404),
        ("/nothing", 404),
    ],
)
def test_addresses_that_lead_nowhere(client, address, status):
    response = client.get(address)
    assert response.status_code == status
    if status != 200:
        assert response.json().keys() == {"error", "request_id"}


# -- models and budgets ------------------------------------------------------------------------------------------------


def test_a_budget_shows_its_effect_before_it_is_applied(serve, model):
    client = serve(model)
    before = client.get("/v1/models/tile").json()
    score = one(inspect(client, GOOD))["anomaly_score"]
    scores = client.station.default.current.calibration.scores
    effect = client.get("/v1/models/tile/budget", params={"false_alarms": 0.5}).json()
    assert effect["calibration_images"] == len(scores)
    assert effect["flagged"] == sum(one > effect["threshold"] for one in scores)
    assert effect["flagged"] <= len(scores) / 2
    assert effect["threshold"] < before["threshold"]
    assert effect["recent"] == {"inspections": 1, "more": int(score > effect["threshold"]), "fewer": 0}
    assert client.get("/v1/models/tile").json() == before

    after = client.put("/v1/models/tile/budget", json={"false_alarms": 0.5}).json()
    assert (after["threshold"], after["false_alarms"]) == (effect["threshold"], 0.5)
    found = one(inspect(client, GOOD))
    assert found["threshold"] == effect["threshold"]
    assert found["is_anomalous"] is (found["anomaly_score"] > effect["threshold"])


@pytest.mark.parametrize("rate", [0, 1, -1, 2, "nan", "many"])
def test_a_budget_that_is_no_rate(client, rate):
    response = client.get("/v1/models/tile/budget", params={"false_alarms": rate})
    assert response.status_code == 422
    assert response.json()["error"].startswith("query.false_alarms: input should be ")
    if rate != "nan":
        assert client.put("/v1/models/tile/budget", json={"false_alarms": rate}).status_code == 422


def test_a_new_version_is_swapped_in_and_set_back(serve, model, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(model, folder)
    client = serve(folder)
    first = client.get("/v1/models/part").json()
    assert client.post("/v1/models/part/reload").json() == {"changed": False, "model": first}
    refused = client.post("/v1/models/part/rollback")
    assert refused.status_code == 409
    assert refused.json()["error"] == "Expected an earlier version of part to go back to, found none since the start."

    recalibrate(folder, write_photos(tmp_path / "more", range(300, 320)), false_alarms=0.3)
    swapped = client.post("/v1/models/part/reload").json()
    assert swapped["changed"]
    assert swapped["model"]["version"] != first["version"]
    assert swapped["model"]["has_previous"]
    assert inspect(client, GOOD).json()["model"]["version"] == swapped["model"]["version"]
    assert f'version="{swapped["model"]["version"]}"' in client.get("/metrics").text

    assert client.post("/v1/models/part/rollback").json()["model"]["version"] == first["version"]
    assert one(inspect(client, GOOD))["threshold"] == first["threshold"]
    assert client.post("/v1/models/part/rollback").json()["model"]["version"] == swapped["model"]["version"]


def test_a_broken_new_version_leaves_the_old_one(serve, model, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(model, folder)
    client = serve(folder)
    first = client.get("/v1/models/part").json()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused = client.post("/v1/models/part/reload")
    assert refused.status_code == 409
    assert "found that unet/diffusion_pytorch_model.safetensors differs; copy the model again." in refused.text
    assert client.get("/v1/models/part").json() == first
    assert one(inspect(client, GOOD))["version"] == first["version"]


def test_a_student_is_checked_and_told_apart(model, tmp_path):
    shutil.copytree(model, tmp_path / "part")
    shutil.copytree(model, tmp_path / "part" / "fast")  # a student is a model of its own
    record = tmp_path / "part" / "fast" / "detector.json"
    record.write_text(record.read_text().replace('"image_size"', ' "image_size"'))
    assert check_files(tmp_path / "part", fast=True) != check_files(tmp_path / "part")
    with (tmp_path / "part" / "fast" / "unet" / "config.json").open("a") as config:
        config.write(" ")
    check_files(tmp_path / "part")
    with pytest.raises(ModelError, match=r"found that unet/config.json differs"):
        Station([tmp_path / "part"], StationSettings(history=tmp_path / "history"), LoadSettings(fast=True))


def test_drift_is_seen_whatever_thread_looks(model):
    def alarms(threads):
        version = Version("tile", "0" * 64, Detector.from_pretrained(model), None)
        seen = []

        def watch(number):
            version.watch(100.0, PhotoStatistics(250.0, -9.0, 0.9, 0.9))
            seen.append(bool(version.alarms))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(watch, range(200)))
        return seen.index(True), all(seen[60:])

    assert alarms(1) == (49, True)
    assert alarms(4)[1]


def test_requests_go_on_while_a_version_is_swapped(serve, model, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(model, folder)
    client = serve(folder)
    done, answers = threading.Event(), []

    def ask():
        while not done.is_set():
            answers.append(inspect(client, GOOD, BAD))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    recalibrate(folder, write_photos(tmp_path / "more", range(300, 320)), false_alarms=0.3)
    assert client.post("/v1/models/part/reload").json()["changed"]
    versions = set()
    while len(versions) < 2:
        client.post("/v1/models/part/rollback")
        versions = {answer.json()["model"]["version"] for answer in answers}
        time.sleep(0.2)
    done.set()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:  # threshold and version always belong together
        found = answer.json()["results"][0]["inspection"]
        assert found["version"] == answer.json()["model"]["version"]
    assert len({(a.json()["model"]["version"], one(a)["threshold"]) for a in answers}) == 2


def test_several_models_are_served_by_name(serve, model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    client = serve(model, tmp_path / "other")
    assert [one["name"] for one in client.get("/v1/models").json()] == ["tile", "other"]
    assert one(inspect(client, GOOD))["model"] == "tile"
    assert one(inspect(client, GOOD, params={"model": "other"}))["model"] == "other"
    assert [found["model"] for found in client.get("/v1/inspections", params={"model": "other"}).json()] == ["other"]
    missing = inspect(client, GOOD, params={"model": "none"})
    assert (missing.status_code, missing.json()["error"]) == (404, "Expected a model among tile, other, found 'none'.")


def without_calibration(folder):
    record = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps(record | {"calibration": None}))


def without_hashes(folder):
    record = json.loads((folder / "detector.json").read_text())
    del record["files"]
    (folder / "detector.json").write_text(json.dumps(record))


def with_another_file(folder):
    (folder / "unet" / "extra.py").write_text("print()")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without_calibration,
            r"Expected a calibrated model in .*part, found none; run ddad recalibrate ",
        ),
        (without_hashes, r"Expected the hashes of its files in .*detector.json, found none; ddad recal"),
        (
            with_another_file,
            r"Expected the files that .*detector.json records, found that unet/extra.py di",
        ),
        (shutil.rmtree, r"Expected a model folder with a detector.json, found none at .*part; na"),
    ],
)
def test_a_model_that_cannot_be_served(model, tmp_path, damage, message):
    shutil.copytree(model, tmp_path / "part")
    damage(tmp_path / "part")
    with pytest.raises(ModelError, match=f"^{message}"):
        Station([tmp_path / "part"], StationSettings(history=tmp_path / "history"))
    # The history is free again.
    Station([model], StationSettings(history=tmp_path / "history")).history.close()


def test_names_of_models(model, tmp_path):
    shutil.copytree(model, tmp_path / "tile")
    with pytest.raises(ConfigError, match=r"^Expected models of different names, found two called tile; rename one of"):
        Station([model, tmp_path / "tile"], StationSettings(history=tmp_path / "history"))
    (tmp_path / "tile").rename(tmp_path / "my tile")
    with pytest.raises(
        ConfigError, match=r"with a name of letters, digits, '\.', '_' and '-', found 'my tile'; rename"
    ):
        Station([tmp_path / "my tile"], StationSettings(history=tmp_path / "history"))


def test_a_history_in_use(serve, model):
    serve(model)
    with pytest.raises(DataError, match=r"^Expected a history that no other server keeps, found another process"):
        serve(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\parts\\1.png", "1.png"),
        ("a\nb\x00.png", "a?b?.png"),
        ("", "unnamed"),
        ("x" * 1000, "x" * 255),
        ("naïve.png", "naïve.png"),
    ],
)
def test_names_are_shown_not_used(name, expected):
    assert shown(name) == expected


# -- limits ------------------------------------------------------------------------------------------------------------


def test_too_many_files(serve, model):
    client = serve(model, max_files=2)
    response = inspect(client, GOOD, GOOD, GOOD)
    assert response.status_code == 413
    assert response.json()["error"] == "Expected at most 2 files a request, found 3; send fewer."


@pytest.mark.parametrize("declared", [True, False])
def test_too_many_bytes_are_refused_while_they_arrive(serve, model, declared):
    client = serve(model, guard=GuardSettings(max_bytes=100_000, rate=1e6))
    sent = 0

    def body():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(100):
            sent += 10_000
            yield b"0" * 10_000
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    if declared:
        headers["content-length"] = "1000075"
    response = client.post("/v1/inspect", content=body(), headers=headers)
    assert response.status_code == 413
    assert response.json()["error"].startswith("Expected at most 100,000 bytes a request, found more; send fewer or ")


def test_a_client_that_asks_too_often(serve, model):
    client = serve(model, guard=GuardSettings(rate=5))
    answers = [client.get("/v1/models") for _ in range(15)]
    assert [answer.status_code for answer in answers[:10]] == [200] * 10
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    time.sleep(1)
    assert client.get("/v1/models").status_code == 200


def slow(client, seconds):
    """Hold the network up for a while."""
    client.station._network.submit(time.sleep, seconds)


def test_a_full_queue_says_when_to_come_again(serve, model):
    client = serve(model, most_waiting=5)
    assert len(inspect(client, *[GOOD] * 5).json()["results"]) == 5
    slow(client, 1.5)
    with ThreadPoolExecutor(1) as elsewhere:
        first = elsewhere.submit(inspect, client, *[GOOD] * 4)
        time.sleep(0.5)
        refused, taken = inspect(client, GOOD, BAD), inspect(client, BAD)
        assert first.result().status_code == taken.status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"] == "Expected room in the queue, found it full; try again later."
    assert len(client.get("/v1/inspections").json()) == 10  # nothing of the refused request was kept


def test_a_deadline(serve, model):
    client = serve(model, deadline=0.2)
    slow(client, 1.0)
    response = inspect(client, GOOD)
    assert response.status_code == 503
    assert response.json()["error"] == "Expected a result within 0.2 s, found none; try again later."
    time.sleep(1)
    assert client.get("/v1/inspections").json() == []


def test_a_deadline_that_passes_between_verdict_and_answer_is_no_deadline(serve, model):
    """What is remembered is answered: a client that is told to come again finds nothing doubled."""
    client = serve(model, deadline=0.8)
    codes = [inspect(client, *[GOOD] * count).status_code for count in range(4, 20, 3)]
    answered = sum(count for count, code in zip(range(4, 20, 3), codes, strict=True) if code == 200)
    assert len(client.get("/v1/inspections", params={"count": 200}).json()) == answered


def test_decoding_does_not_hold_up_the_rest(serve, model):
    client = serve(model, workers=1)
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "PNG")
    with ThreadPoolExecutor(1) as elsewhere:
        large = elsewhere.submit(inspect, client, *[buffer.getvalue()] * 6)
        time.sleep(0.3)
        started = time.monotonic()
        assert client.get("/v1/inspections").json() == []
        seconds, was_busy = time.monotonic() - started, not large.done()
        assert large.result().status_code == 200
    assert was_busy
    assert seconds < 1


def test_pictures_are_drawn_once_each(client):
    started = time.monotonic()
    answer = inspect(client, BAD, params={"pictures": ["overlay"] * 2000})
    assert time.monotonic() - started < 5
    assert list(answer.json()["results"][0]["pictures"]) == ["overlay"]


def test_a_charset_that_takes_hours_is_refused(client):
    for charset in (
        "charset=punycode",
        'Charset="utf-7"',
        "charset=utf-8; charset=punycode",
        "charset*=utf-8''punycode",
    ):
        kind = f"multipart/form-data; boundary=x; {charset}"
        response = client.post("/login", content=b"--x--", headers={"content-type": kind})
        assert (response.status_code, "another charset" in response.text) == (400, True)
    form = {"content-type": "application/x-www-form-urlencoded; charset=UTF-8"}
    assert client.post("/login", content=b"token=x", headers=form, follow_redirects=False).status_code == 303
    assert client.post("/login", content=b"token=" + b"x" * 20_000, headers=form).status_code == 413


def test_bodies_that_are_too_many_together(serve, model):
    client = serve(model, guard=GuardSettings(max_inside=10_000, rate=1e6))
    assert inspect(client, GOOD).status_code == 200
    assert inspect(client, GOOD, b"0" * 10_000).status_code == 429
    assert inspect(client, GOOD).status_code == 200  # what is answered no longer counts


# -- who may enter -----------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for(serve, model):
    client = serve(model, guard=GuardSettings(token=TOKEN, rate=1e6))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"cookie": f"{COOKIE}=x"},
    ):
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in response.text
    assert client.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/metrics").status_code == 401
    page = client.get("/", headers={"accept": "text/html"}, follow_redirects=False)
    assert (page.status_code, page.headers["location"]) == (303, "/login")


def test_cookies_of_other_programs_lock_nobody_out(serve, model):
    guard = GuardSettings(token=TOKEN, rate=1e6)
    client = serve(model, guard=guard)
    for others in ('prefs={"a": 1}', "x", "a/b=1", "="):
        cookie = f"{others}; {COOKIE}={guard.session}"
        assert client.get("/v1/models", headers={"cookie": cookie}).status_code == 200, others


def test_a_slow_rate_lets_in_one_at_a_time(serve, model):
    client = serve(model, guard=GuardSettings(rate=0.4))
    assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("origin", ["http://[", "http://a:b:c"])
def test_an_origin_that_is_none(client, origin):
    assert inspect(client, GOOD, headers={"origin": origin}).status_code == 403


def test_invented_methods_are_counted_together(client):
    for method in ("FOO1", "FOO2"):
        assert client.request(method, "/").status_code == 405
    text = client.get("/metrics").text
    assert "FOO" not in text
    assert 'method="other"' in text
    assert client.head("/").status_code == 200


def test_a_short_token_is_refused():
    with pytest.raises(ConfigError, match=r"^Expected a token of at least 16 characters, found 5; make one with: open"):
        GuardSettings(token="short")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1"])
def test_another_host_is_refused_without_a_token(client, host):
    response = client.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"].startswith("Expected a request to 127.0.0.1, found one to ")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "[::1]:8000"])
def test_this_machine_by_any_name(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_form_on_another_page_is_refused(client, origin):
    response = inspect(client, GOOD, headers={"origin": origin})
    assert response.status_code == 403
    assert inspect(client, GOOD, headers={"origin": HERE}).status_code == 200


def test_every_answer_has_the_headers_of_a_safe_page(client):
    for response in (client.get("/v1/models"), client.get("/nothing"), client.get("/"), client.get("/metrics")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["referrer-policy"] == "no-referrer"


def test_our_bugs_are_logged_and_not_shown(serve, model, monkeypatch, caplog):
    client = serve(model)

    def broken(*arguments, **options):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(client.station.history, "latest", broken)
    with caplog.at_level(logging.INFO, "ddad.server.access"):
        response = client.get("/v1/inspections", headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert response.json() == {
        "error": "Something went wrong in the server; its log has more under request mine-1.",
        "request_id": "mine-1",
    }
    assert "secret detail" in caplog.text
    assert any(getattr(record, "request_id", "") == "mine-1" and record.status == 500 for record in caplog.records[1:])


@pytest.mark.parametrize("given", ["x" * 65, "a b", 'a"b', "ä"])
def test_a_request_id_that_could_do_harm_is_replaced(client, given):
    response = client.get("/v1/models", headers={"x-request-id": given.encode()})
    assert len(response.headers["x-request-id"]) == 32


def test_metrics_count_what_happened(serve, model):
    client = serve(model)
    inspect(client, GOOD, BAD, b"no picture")
    inspect(client, b"no picture")
    text = client.get("/metrics").text
    for line in (
        'ddad_requests_total{method="POST",route="/v1/inspect",status="200"} 1.0',
        'ddad_requests_total{method="POST",route="/v1/inspect",status="422"} 1.0',
        'ddad_verdicts_total{model="tile",verdict="anomalous"} 1.0',
        'ddad_verdicts_total{model="tile",verdict="good"} 1.0',
        'ddad_refused_total{reason="file"} 2.0',
        'ddad_queue_length{model="tile"} 0.0',
        'ddad_stage_seconds_count{stage="decode"} 4.0',
        'ddad_stage_seconds_count{stage="queue"} 2.0',
        "ddad_batch_size_sum 2.0",
    ):
        assert line in text


def test_the_api_describes_itself(client):
    document = client.get("/openapi.json").json()
    assert {"/v1/inspect", "/v2/models/{name}/infer", "/v1/models/{name}/budget"} <= document["paths"].keys()
    assert not [path for path in document["paths"] if path.startswith(("/page", "/static", "/login"))]
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere
