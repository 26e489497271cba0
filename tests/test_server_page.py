"""The page of the server, in a real browser, and its routes without one. pytest tests/test_server_page.py (a minute)"""

import io
import json
import re
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tiny import photo, train_model, write_photos

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx

from ddad.server import page as page_module
from ddad.server.guard import COOKIE, GuardSettings
from ddad.server.history import Inspection
from ddad.server.page import GALLERY, _distribution, _how_sure
from serving import Server, in_process, serving

try:
    from playwright.sync_api import expect, sync_playwright
except ModuleNotFoundError:
    sync_playwright = None

CHROMIUM = shutil.which("chromium")
CHROMIUM_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
]
TOKEN = "a token of twenty-six chars"
WIDE, NARROW = (1280, 900), (390, 844)
CONTROLS = {"button", "link", "textbox", "radio", "checkbox", "slider", "image", "dialog", "Video"}


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def defective():
    pixels = photo(3)
    pixels[8:20, 8:20] = 255
    return pixels


GOOD, BAD = png(photo(146)), png(defective())


def file(name, content=GOOD):
    return {"name": name, "mimeType": "image/png", "buffer": content}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    return train_model(write_photos(place / "good", range(40)), place / "tile")


# -- without a browser -------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path):
    with ExitStack() as stack:
        yield lambda *models, **options: stack.enter_context(in_process(models, tmp_path / "history", **options))


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with in_process([model], tmp_path_factory.mktemp("history")) as client:
        yield client


def upload(client, *files, **options):
    return client.post("/page/inspect", files=[("file", one) for one in files], **options)


class Tags(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_from_elsewhere_and_no_inline_code(client):
    upload(client, ("a.png", BAD))
    tags = Tags(client.get("/").text).tags
    for tag, attributes in tags:
        assert not [name for name in attributes if name == "style" or name.startswith(("on", "hx-on"))]
        for name in ("src", "href", "hx-get", "hx-post", "action"):
            assert attributes.get(name, "/").startswith("/")
        assert tag != "style"
        if tag == "script":
            assert attributes["src"].startswith("/static/")
    config = next(json.loads(found["content"]) for _, found in tags if found.get("name") == "htmx-config")
    assert config == {
        "includeIndicatorStyles": False,
        "allowEval": False,
        "allowScriptTags": False,
        "historyCacheSize": 0,
    }


def test_files_of_the_page_last_under_their_hash(client):
    page = client.get("/").text
    addresses = set(re.findall(r'"(/static/[^"]+)"', page))
    assert len(addresses) == 4
    for address in addresses:
        assert client.get(address).headers["cache-control"] == "public, max-age=31536000, immutable"
        plain = client.get(address.split("?")[0])
        assert (plain.status_code, plain.headers["cache-control"]) == (200, "no-cache")
    assert client.get("/static/style.css").headers["content-type"].startswith("text/css")
    for name in ("page.py", "..%2fpage.py", "%2e%2e/page.py", "index.html"):
        assert client.get(f"/static/{name}").status_code == 404


def test_a_hostile_file_name_is_only_text(client):
    name = """'"><img src=x onerror=alert(1)><script>.png"""
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n' % one
        for one in ((name.replace('"', '\\"').encode(), BAD), (b"<b id=x>.png", b"no picture"))
    )
    answer = client.post(
        "/page/inspect", content=body + b"--x--", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    for html in (answer.text, client.get("/").text, client.get("/page/gallery").text, client.get("/page/report").text):
        tags = Tags(html).tags
        assert not [found for _, found in tags if {found.get("src"), found.get("id")} & {"x"} or "onerror" in found]
        assert not [found for tag, found in tags if tag == "script" and "/static/" not in found.get("src", "")]
        assert name in [found.get("alt", "").removeprefix("Overlay of ") for _, found in tags]
    assert name in Tags(client.get("/").text).text
    assert "<b id=x>.png: expected a PNG" in Tags(answer.text).text


def test_only_what_is_kept_is_shown(client):
    unknown = client.get(f"/page/inspections/{'0' * 32}")
    sentence = "Expected the id of an inspection that is kept, found none of this id."
    assert (unknown.status_code, unknown.json()["error"]) == (404, sentence)
    assert sentence in client.get(f"/?inspection={'0' * 32}").text
    assert client.get("/page/inspections/..%2f..").status_code == 404
    assert client.get("/page/gallery", params={"before": "x"}).status_code == 422
    for address in ("/", "/page/gallery", "/page/report"):
        assert client.get(address, params={"model": "other"}).status_code == 404
    assert client.get("/page/budget", params={"model": "other", "percent": "1"}).status_code == 404


@pytest.mark.parametrize("percent", ["0", "100", "-1", "nan", "inf", "", "many", "<b>"])
def test_a_budget_that_is_no_rate(client, percent):
    before = client.get("/v1/models/tile").json()
    for answer in (
        client.get("/page/budget", params={"percent": percent}),
        client.post("/page/budget", data={"percent": percent}),
    ):
        assert answer.status_code == 422
        assert answer.json()["error"] == (
            f"Expected a rate above 0 and below 100 %, found {percent!r}; enter one such as 1 or 0.5."
        )
    assert client.get("/v1/models/tile").json() == before


@pytest.mark.parametrize("percent", ["25", "25 %", "25,0"])
def test_a_budget_as_people_write_it(client, percent):
    text = Tags(client.get("/page/budget", params={"percent": percent}).text).text
    effect = client.get("/v1/models/tile/budget", params={"false_alarms": 0.25}).json()
    assert f"Threshold {effect['threshold']:.3f} instead of" in text
    assert f"{effect['flagged']} of the {effect['calibration_images']} calibration images" in text
    assert effect["promise"] in text


def test_the_view_says_what_another_budget_would_change(serve, model):
    client = serve(model)
    found = re.search(r'data-id="(\w+)"', upload(client, ("a.png", GOOD)).text)[1]
    assert "the threshold of its time" not in client.get("/").text
    client.post("/page/budget", data={"percent": "99"})
    view = Tags(client.get(f"/page/inspections/{found}").text).text
    assert "No defect found" in view
    assert "By today's, " in view
    assert "the verdict would be anomalous." in view


def test_an_inspection_by_a_version_no_longer_at_hand(serve, model):
    client = serve(model)
    upload(client, ("a.png", BAD))
    client.station.default.current.digest = "0" * 64
    view = Tags(client.get("/").text).text
    assert "which is no longer in use: p" in view
    assert "Bars:" not in view


def inspected(p_value):
    return Inspection(
        time=datetime.now(UTC),
        request_id="",
        file="",
        model="tile",
        version="abc",
        anomaly_score=1,
        p_value=p_value,
        is_anomalous=False,
        threshold=1,
        false_alarms=0.1,
        height=1,
        width=1,
        regions=[],
        photo={},
    )


@pytest.mark.parametrize(
    ("p_value", "expected"),
    [
        (4 / 101, "Of 100 good calibration parts, 3 scored at least this high: p = 0.04."),
        (1 / 101, "None of 100 good calibration parts scored this high: p = 0.0099."),
        (1.0, "Of 100 good calibration parts, 100 scored at least this high: p = 1."),
    ],
)
def test_how_sure_in_words(p_value, expected):
    assert _how_sure(inspected(p_value), 100).replace("\xa0", " ") == expected


@pytest.mark.parametrize("scores", [[0.5] * 10, [0.1, 1, 10], [-1.0, 0, 1], list(np.linspace(0.9, 1.1, 99))])
def test_the_distribution_counts_every_part(scores):
    shown = _distribution(scores, scores[-1], scores[-1])
    assert sum(bar["count"] for bar in shown["bars"]) == len(scores)
    assert max(bar["height"] for bar in shown["bars"]) == 100
    assert all(2 <= bar["x"] <= 98 for bar in shown["bars"])
    assert 2 <= shown["threshold"] == shown["score"] <= 98.01
    assert shown["logarithmic"] is (scores == [0.1, 1, 10])


def test_a_report_counts_all_and_shows_the_latest(serve, model, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_REPORTED", 3)
    client = serve(model)
    upload(client, ("first.png", GOOD), *[("a.png", GOOD)] * 3, ("last.png", BAD))
    answer = client.get("/page/report")
    assert re.fullmatch(
        r'attachment; filename="ddad-tile-\d{4}-\d\d-\d\d-\d{4}\.html"', answer.headers["content-disposition"]
    )
    text = re.sub(r"\s+", " ", Tags(answer.text).text)
    assert "Inspected5" in text.replace(" ", "")
    assert "▲ Anomalous 1 " in re.sub(r"(Anomalous)(\d)", r"\1 \2 ", text)
    assert "The latest 3; 2 earlier ones are left out, but counted above." in text
    assert "last.png" in text
    assert "first.png" not in text
    assert answer.text.count("<img ") == 12
    later = datetime.now(UTC) + timedelta(minutes=1)
    for since, said in ((later.isoformat(), "None."), ("2000-01-01T00:00:00", "The latest 3; 2 earlier")):
        assert said in client.get("/page/report", params={"since": since}).text


def test_login_without_a_token_leads_to_the_page(client):
    for method in ("get", "post"):
        answer = getattr(client, method)("/login", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "set-cookie" not in answer.headers


def test_login_sets_a_cookie_that_scripts_cannot_read(serve, model):
    client = serve(model, guard=GuardSettings(token=TOKEN, rate=1e6))
    refused = client.post("/login", data={"token": "wrong"}, follow_redirects=False)
    assert refused.status_code == 401
    assert "This is not the server's token" in refused.text.replace("&#39;", "'")
    assert "set-cookie" not in refused.headers
    # Else browsers would send "Origin: null", which the guard refuses.
    assert client.get("/login").headers["referrer-policy"] == "same-origin"
    answer = client.post("/login", data={"token": f" {TOKEN}\n"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert re.fullmatch(rf"{COOKIE}=\w+; HttpOnly; Path=/; SameSite=strict", answer.headers["set-cookie"])
    assert TOKEN not in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200
    secure = client.post("https://127.0.0.1/login", data={"token": TOKEN}, follow_redirects=False)
    assert "; Secure" in secure.headers["set-cookie"]


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None:
        pytest.skip("playwright is not installed; CI installs it")
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed; CI installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, model, tmp_path_factory):
    """Serves the model under several names, so that each test has a history and a budget of its own."""
    place = tmp_path_factory.mktemp("serving")
    names = ("budget", "paging", "keys", "filter", "drift")
    copies = [shutil.copytree(model, place / name) for name in names]
    with serving([model, *copies], place / "history", "--rate", "1000") as server:
        yield server


class Visit:
    """A page in a fresh profile; what went wrong in it is kept until `expected` takes it."""

    def __init__(self, browser, url, size=WIDE, **options):
        self.url = url
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.page = self.context.new_page()
        self.problems = []
        self.page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._see)

    def _see(self, request):
        if not request.url.startswith((self.url + "/", "blob:", "data:")):
            self.problems.append(f"asked for {request.url}")

    def open(self, path="/"):
        self.page.goto(self.url + path)
        return self.page

    def expected(self, part):
        """Forget the complaints of the browser and of htmx about an answer that is meant to be a refusal."""
        assert self.problems
        assert all(part in problem for problem in self.problems), self.problems
        self.problems.clear()


@pytest.fixture
def visit(browser, server):
    visits = []

    def start(url=server.url, **options):
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.context.close()
        assert one.problems == []


def fill(server, model, *contents):
    for start in range(0, len(contents), 16):
        files = [("file", (f"{start + i}.png", one)) for i, one in enumerate(contents[start : start + 16])]
        assert httpx.post(f"{server.url}/v1/inspect?model={model}", files=files, timeout=60).status_code == 200


def heading(page):
    return page.locator("#view h2")


def clip(page):
    return page.locator(".other.reconstruction").evaluate("(one) => getComputedStyle(one).clipPath")


def test_photographs_are_inspected_and_judged_in_words(visit):
    page = visit().open()
    page.set_input_files("#file", [file("good part.png"), file("bad part.png", BAD)])
    expect(heading(page)).to_have_text(re.compile(r"^Anomalous: \d+ regions?$"))
    expect(page.locator("#announce")).to_have_text(re.compile("^Anomalous"))
    expect(page.locator(".verdict p")).to_have_text(re.compile(r"^None of \d+ good calibration parts scored this high"))
    expect(page.locator("article dl")).to_contain_text("bad part.png")
    expect(page.locator("#busy")).to_be_empty()
    assert page.locator(".boxes > .line").count() == page.locator("article tbody tr").count() > 0
    good = page.locator("#gallery a", has=page.get_by_alt_text("Overlay of good part.png")).first
    good.click()
    expect(heading(page)).to_have_text("No defect found")
    expect(good).to_have_attribute("aria-current", "true")
    expect(page.locator("#gallery [aria-current]")).to_have_count(1)
    assert good.get_attribute("data-id") in page.url
    page.reload()
    expect(heading(page)).to_have_text("No defect found")


def test_photographs_are_dropped_and_pasted(visit):
    page = visit().open()
    page.set_input_files("#file", [file("chosen.png", BAD)])
    expect(page.locator("article dl")).to_contain_text("chosen.png")
    make = """([bytes, names]) => {
        const carrier = new DataTransfer();
        for (const name of names) carrier.items.add(new File([Uint8Array.from(bytes)], name, { type: "image/png" }));
        return carrier;
    }"""
    dropped = page.evaluate_handle(make, [list(GOOD), ["a.png", "b.png"]])
    page.dispatch_event("body", "dragover", {"dataTransfer": dropped})
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    pasted = page.evaluate_handle(make, [list(GOOD), ["pasted.png"]])
    # While the first two are on their way: it waits for its turn.
    page.evaluate(
        '(data) => document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }))',
        pasted,
    )
    expect(page.locator("article dl")).to_contain_text("pasted.png")
    for name in ("a", "b", "pasted", "chosen"):
        expect(page.get_by_alt_text(f"Overlay of {name}.png", exact=True)).to_have_count(1)
    expect(heading(page)).to_have_text("No defect found")


def test_a_photograph_from_the_camera(visit):
    page = visit(permissions=["camera"]).open()
    page.get_by_role("button", name="Use the camera").click()
    shoot = page.get_by_role("button", name="Take photograph")
    expect(shoot).to_be_focused()
    page.locator("#live").evaluate("(live) => live.videoWidth || new Promise((done) => { live.onresize = done; })")
    shoot.click()
    expect(page.locator("article dl")).to_contain_text(re.compile(r"photograph \S+\.png"))
    page.get_by_role("button", name="Close camera").click()
    expect(page.locator("#live")).to_be_hidden()


def test_no_camera_is_said(visit):
    page = visit().open()
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("alert").filter(has_text="No camera can be used: allow it in")).to_be_visible()


def test_the_slider_moves_by_keyboard_and_pointer(visit, server):
    fill(server, "tile", BAD)
    page = visit().open()
    slider = page.get_by_role("slider")
    assert clip(page) == "inset(0px 0px 0px 50%)"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert clip(page) == "inset(0px 0px 0px 51%)"
    page.keyboard.press("Home")
    assert clip(page) == "inset(0px 0px 0px 0%)"
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    assert clip(page) == "inset(0px 0px 0px 25%)"
    page.locator("#gallery a").first.click()
    expect(slider).to_have_value("25")
    assert clip(page) == "inset(0px 0px 0px 25%)"


def test_past_inspections_by_verdict(visit, server):
    fill(server, "filter", GOOD, BAD, GOOD)
    page = visit().open("/?model=filter")
    links = page.locator("#gallery a")
    expect(links).to_have_count(3)
    expect(page.locator("#counts")).to_have_text("3 kept, 1 anomalous")
    page.get_by_role("radio", name="Anomalous").check(force=True)
    expect(links).to_have_count(1)
    expect(links).to_contain_text("Anomalous, score")
    page.get_by_role("radio", name="Good").check(force=True)
    expect(links).to_have_count(2)
    page.set_input_files("#file", [file("another.png", BAD)])
    expect(heading(page)).to_have_text(re.compile("^Anomalous"))
    expect(page.locator("#counts")).to_have_text("4 kept, 2 anomalous")
    expect(links).to_have_count(2)  # still the good ones


def test_older_inspections_come_when_asked_for(visit, server):
    fill(server, "paging", *[GOOD] * (2 * GALLERY + 1))
    page = visit().open("/?model=paging")
    links = page.locator("#gallery a")
    for shown in (GALLERY, 2 * GALLERY):
        expect(links).to_have_count(shown)
        page.get_by_role("button", name="Show more").click()
        expect(links.nth(shown)).to_be_focused()
    expect(links).to_have_count(2 * GALLERY + 1)
    expect(page.get_by_role("button", name="Show more")).to_have_count(0)
    assert len(set(links.evaluate_all("(links) => links.map((link) => link.dataset.id)"))) == 2 * GALLERY + 1


def test_keys(visit, server):
    fill(server, "keys", *[GOOD] * 4, BAD)
    page = visit().open("/?model=keys")
    links = page.locator("#gallery a")
    page.keyboard.press("ArrowRight")  # from the one that is shown
    expect(links.nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(links.nth(4)).to_be_focused()
    page.keyboard.press("ArrowRight")  # there is none
    page.keyboard.press("ArrowUp")
    expect(links.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text("No defect found")
    expect(links.nth(1)).to_have_attribute("aria-current", "true")
    expect(links.nth(1)).to_be_focused()
    for key, kind in (("2", "heatmap"), ("3", "overlay"), ("1", "reconstruction")):
        page.keyboard.press(key)
        expect(page.locator(".other:visible")).to_have_class(f"other {kind}")
    page.keyboard.press("2")
    page.keyboard.press("ArrowLeft")  # the radio button did not take the focus away
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text(re.compile("^Anomalous"))
    expect(page.locator(".other:visible")).to_have_class("other heatmap")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    page.fill("#percent", "")
    page.locator("#percent").press_sequentially("12?")
    expect(page.locator("#percent")).to_have_value("12?")
    expect(page.locator(".other:visible")).to_have_class("other heatmap")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_budget_shows_its_effect_and_is_applied(visit, server):
    fill(server, "budget", GOOD, BAD)
    visiting = visit()
    page = visiting.open("/?model=budget")
    before = page.locator("#threshold").inner_text()
    page.fill("#percent", "90")
    effect = page.locator("#effect")
    expect(effect).to_contain_text(f"instead of {before}.")
    expect(effect).to_contain_text("Of the last 2 inspections, 1 would become anomalous and 0 good.")
    promised = effect.locator("strong").inner_text().removeprefix("Threshold ")
    expect(page.locator("#threshold")).to_have_text(before)
    page.fill("#percent", "lots")
    expect(effect).to_have_text(re.compile(r"^Expected a rate above 0 and below 100 %, found 'lots'; "))
    visiting.expected("422")
    page.fill("#percent", "90")
    page.get_by_role("button", name="Apply 90").click()
    expect(page.locator("#threshold")).to_have_text(promised)
    expect(effect.locator("p")).to_be_focused()
    expect(effect).to_have_text(f"Applied: threshold {promised} from now on.")
    expect(page.locator("#view .note")).to_contain_text(f"By today's, {promised}, the verdict would be the same.")
    page.set_input_files("#file", [file("again.png")])
    expect(heading(page)).to_have_text(re.compile("^Anomalous"))


def test_drift_is_said_once(visit, server):
    fill(server, "drift", *[png(photo(300 + i, level=200)) for i in range(63)])
    page = visit().open("/?model=drift")
    banner = page.locator("#drift")
    expect(banner).to_have_role("alert")
    expect(banner).to_contain_text("Recent photographs are not like those the model was calibrated on.")
    expect(banner).to_contain_text("The last 50 photographs are brighter than at calibration")
    banner.evaluate("(one) => { one.dataset.seen = 1; }")
    page.set_input_files("#file", [file("bright.png", png(photo(400, level=200)))])
    expect(page.locator("article dl")).to_contain_text("bright.png")
    expect(banner).to_have_attribute("data-seen", "1")  # not read out again


def test_a_file_that_is_no_photograph_gets_a_sentence(visit):
    visiting = visit()
    page = visiting.open()
    alert = page.locator("#message")
    page.set_input_files("#file", [file("notes.png", b"no picture")])
    expect(alert).to_have_text(re.compile(r"^notes\.png: expected a PNG, JPEG, BMP, TIFF or WebP image, but "))
    visiting.expected("422")
    page.set_input_files("#file", [file("part.png", BAD), file("empty.png", b" ")])
    expect(page.locator("article dl")).to_contain_text("part.png")
    expect(alert).to_have_text(re.compile(r"^empty\.png: "))
    page.set_input_files("#file", [file("next.png")])
    expect(page.locator("article dl")).to_contain_text("next.png")
    expect(alert).to_be_empty()


def test_refusals_and_silence_are_said(visit):
    visiting = visit()
    page = visiting.open()
    alert = page.locator("#message")
    page.set_input_files("#file", [file(f"{i}.png") for i in range(33)])
    expect(alert).to_have_text("Expected at most 32 files a request, found 33; send fewer.")
    visiting.expected("413")
    visiting.context.set_offline(True)
    page.set_input_files("#file", [file("a.png")])
    expect(alert).to_have_text("The server does not answer; see that it runs, and try again.")
    visiting.problems.clear()
    visiting.context.set_offline(False)
    page.set_input_files("#file", [file("b.png")])
    expect(page.locator("article dl")).to_contain_text("b.png")


def test_the_report_is_one_file(visit, server, tmp_path, browser):
    fill(server, "tile", GOOD, BAD)
    page = visit().open()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save report").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    tags = Tags(saved.read_text()).tags
    assert not [tag for tag, _ in tags if tag == "script"]
    addresses = [found[name] for _, found in tags for name in ("src", "href") if name in found]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    alone = browser.new_context(offline=True).new_page()
    alone.goto(saved.as_uri())
    assert alone.locator("img").evaluate_all("(all) => all.every((one) => one.naturalWidth > 0)")
    alone.context.close()


@pytest.mark.slow
def test_login(browser, model, tmp_path):
    server = Server([model], tmp_path / "history", DDAD_TOKEN=TOKEN)
    visiting = Visit(browser, server.url)
    page = visiting.open()
    assert page.url == f"{server.url}/login"
    page.get_by_label("Token of this server").fill("another token altogether")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(
        "This is not the server's token; ask whoever runs the server for it."
    )
    visiting.expected("401")
    page.get_by_label("Token of this server").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="No inspection yet")).to_be_visible()
    page.set_input_files("#file", [file("a.png")])
    expect(heading(page)).to_have_text("No defect found")
    visiting.context.clear_cookies()
    page.locator("#gallery a").click()
    page.wait_for_url("**/login")
    visiting.expected("401")
    visiting.context.close()
    server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_everything_fits_has_a_name_and_can_be_hit(visit, server, size, scheme):
    wide = png(np.asarray(Image.fromarray(defective()).resize((400, 40))))
    fill(server, "tile", GOOD, BAD, wide)
    visiting = visit(size=size, color_scheme=scheme)
    page = visiting.open()
    page.fill("#percent", "20")
    page.get_by_role("button", name="Apply").wait_for()
    long = f"{'long-name-' * 20}.png"
    page.set_input_files("#file", [file(long, b"no picture"), file(long, wide)])
    expect(page.locator("#message p")).to_have_count(1)
    expect(heading(page)).to_have_text(re.compile("^Anomalous"))
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    background = page.locator("body").evaluate("(body) => getComputedStyle(body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")

    session = visiting.context.new_cdp_session(page)
    nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    found = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes]
    assert [role for role, name in found if role in CONTROLS and not name] == []
    assert {"button", "link", "textbox", "radio", "checkbox", "slider", "image", "main", "banner"} <= {
        role for role, _ in found
    }
    small = page.locator("button:visible, a:visible, .choice label:visible, .tick:visible, #percent").evaluate_all(
        "(all) => all.filter((one) => one.getBoundingClientRect().height < 40).map((one) => one.outerHTML)"
    )
    assert small == []
