"""Models on a hub: pushed by one process, fetched by another, from a real server. pytest tests/test_hub.py"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from ddad.card import MEASURED
from ddad.detector import STUDENT, Detector, push_folder, read_record
from ddad.errors import ConfigError
from ddad.evaluation import METRICS
from ddad.hub import FILES, model_name, parse_name
from ddad.report import evaluate_folder
from hub_server import TOKEN, Hub
from tiny import photo, train_model, write_photos

NAME = "factory/tile"
OPEN = "factory/open"
IMAGES = [photo(i) for i in range(900, 903)]


def run(script, hub, home, *arguments, token=TOKEN):
    """The JSON that a new process prints in its last line; the hub's client reads its environment when imported."""
    hidden = ("http_proxy", "https_proxy", "all_proxy", "hf_token")
    environment = {name: value for name, value in os.environ.items() if name.lower() not in hidden}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "0"} | (
        {"HF_TOKEN": token} if token else {}
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


PUSH = """
import json, sys
from typer.testing import CliRunner
from ddad import ConfigError, Detector
from ddad.cli import app
from ddad.detector import push_folder
first, second, metrics = sys.argv[1:]
name = "factory/tile"
commits = [push_folder(first, name, metrics=json.loads(metrics)), Detector.from_pretrained(second).push_to_hub(name)]
commits.append(Detector.from_pretrained(first, fast=True).push_to_hub(name, revision="fast/only", private=False))
try:
    push_folder(first, name, token="hf_of_somebody_else")
except ConfigError as error:
    commits.append(str(error))
for command in (["push", first, "factory/open", "--public"], ["info", name], ["recalibrate", name, first]):
    result = CliRunner().invoke(app, command)
    commits.append(str(result.exception) if result.exception else result.output)
print(json.dumps(commits))
"""
FETCH = """
import json, sys
from pathlib import Path
import numpy as np
from ddad import Detector, DDADError
from ddad.detector import model_folder
images = [np.array(one, np.uint8) for one in json.loads(sys.argv[1])]
found = []
for name, revision, fast in json.loads(sys.argv[2]):
    try:
        detector = Detector.from_pretrained(name, device="cpu", revision=revision, fast=fast)
        folder = model_folder(name, revision)
        files = sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())
        found.append([detector.score(images), files])
    except DDADError as error:
        found.append(str(error))
print(json.dumps(found))
"""
DOWNLOAD = """
import json, sys, time
from ddad import DDADError
from ddad.hub import download
found = []
for name, revision in json.loads(sys.argv[1]):
    began = time.monotonic()
    try:
        found.append([str(download(name, revision)), time.monotonic() - began])
    except DDADError as error:
        found.append([str(error), time.monotonic() - began])
print(json.dumps(found))
"""


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


EXTRA = {
    f"{place}{name}": pickle.dumps(Harmful())
    for place in ("", "unet/", "features/", f"{STUDENT}/")
    for name in ("modeling.py", "pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pkl")
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, the first with a student (here: the second), and metrics of the first."""
    folder = tmp_path_factory.mktemp("models")
    first, second = train_model(write_photos(folder / "good", range(40)), folder / "first"), folder / "second"
    other = Detector.from_pretrained(first, "cpu")
    with torch.no_grad():
        for weights in other.unet.parameters():
            weights.mul_(1.2)
    other.save_pretrained(second)
    detector = Detector.from_pretrained(first, "cpu")
    detector.save_pretrained(first, student=other)
    data = folder / "data"
    for kind, seeds, level in (
        ("train/good", range(3), 120),
        ("test/good", range(9), 120),
        ("test/dark", range(9), 40),
    ):
        (data / kind).parent.mkdir(parents=True, exist_ok=True)
        write_photos(data / kind, seeds, level)
    return first, second, evaluate_folder(detector, data, folder / "out").to_dict()


@pytest.fixture(scope="module")
def pushed(models):
    """What PUSH and FETCH say, with commits between them that a model's owner would not make."""
    with Hub() as hub:
        first, second, metrics = models
        home = first.parent / "home"
        one, two, student, *said = run(PUSH, hub, home.with_name("owner"), first, second, json.dumps(metrics))
        weights = bytearray(hub.files(OPEN)["unet/diffusion_pytorch_model.safetensors"])
        weights[-1] ^= 1
        strange = [
            hub.commit(OPEN, EXTRA),
            hub.commit(OPEN, {"unet/diffusion_pytorch_model.safetensors": bytes(weights)}),
            hub.commit(OPEN, {"detector.json": None}),
        ]
        wanted = [(NAME, one, False), (NAME, None, False), (f"{NAME}@{one}", None, True), (NAME, "fast/only", False)]
        wanted += [(OPEN, commit, False) for commit in strange]
        fetched = run(FETCH, hub, home, json.dumps([image.tolist() for image in IMAGES]), json.dumps(wanted))
        guest = run(DOWNLOAD, hub, home.with_name("guest"), json.dumps([(NAME, None)]), token=None)
    return SimpleNamespace(
        hub=hub, home=home, commits=(one, two, student), said=said, models=fetched[:4], strange=fetched[4:], guest=guest
    )


@pytest.mark.slow
def test_pushed_by_one_process_and_fetched_by_another(models, pushed):
    first, second, _ = models
    one, two, student = pushed.commits
    expected = [Detector.from_pretrained(folder, "cpu") for folder in (first, second)]
    expected += [Detector.from_pretrained(first, "cpu", fast=True)] * 2
    for (scores, _), detector in zip(pushed.models, expected, strict=True):
        assert scores == pytest.approx(detector.score(IMAGES), rel=1e-6)
    assert pushed.models[0][0] != pytest.approx(pushed.models[1][0], rel=1e-3)
    assert pushed.hub.repositories[NAME]["branches"] == {"main": two, "fast/only": student}
    # The second model has no student: that of the first is gone with it.
    assert any(file.startswith(STUDENT) for file in pushed.hub.files(NAME, one))
    assert not any(file.startswith(STUDENT) for file in pushed.hub.files(NAME, two))


@pytest.mark.slow
def test_the_command_line_takes_names(pushed):
    refused, push, info, recalibrate = pushed.said
    assert refused == (
        f"Expected to write to {NAME} on the hub, found that it cannot be done (the hub answers 401); log in with `hf "
        "auth login`, or set HF_TOKEN, as somebody who may."
    )
    commit = list(pushed.hub.repositories[OPEN]["commits"])[1]  # after the one that makes a repository
    assert f"Pushed to {OPEN}. Next: ddad predict {OPEN}@{commit} IMAGES" in push
    assert "efficientnet-lite2" in info
    assert recalibrate == f"Expected a model folder, or --out for a model of the hub, found neither for {NAME}."


@pytest.mark.slow
def test_a_new_repository_is_private_unless_asked(pushed):
    assert pushed.hub.repositories[NAME]["private"]
    assert not pushed.hub.repositories[OPEN]["private"]
    assert (
        f"found neither at {NAME} (the hub shows none of that name; a private one takes a login" in pushed.guest[0][0]
    )


@pytest.mark.slow
def test_code_and_pickle_are_never_fetched_and_changed_weights_are_refused(models, pushed):
    with_code, changed, other = pushed.strange
    assert set(with_code[1]) == {str(file.relative_to(models[0])) for file in models[0].rglob("*.*")} - {
        "training.jsonl"
    }
    assert not any(file.endswith((".py", ".bin", ".pkl")) for _, file in pushed.hub.fetched)
    assert changed.startswith("Expected the files that ")
    assert "found that unet/diffusion_pytorch_model.safetensors differs" in changed
    assert other.startswith(f"Expected a model of ddad on the hub, found no detector.json in {OPEN} at revision")


@pytest.mark.slow
def test_offline_what_was_fetched_works_and_what_was_not_is_said_at_once(pushed):
    """The server is gone by now."""
    wanted = [(NAME, None), (NAME, pushed.commits[0]), ("models/tlie", None), (NAME, "v9")]
    newest, first, missing, revision = run(DOWNLOAD, pushed.hub, pushed.home, json.dumps(wanted))
    for (folder, _), commit in ((newest, pushed.commits[1]), (first, pushed.commits[0])):
        files = pushed.hub.files(NAME, commit)
        assert {one for one in FILES if (Path(folder) / one).is_file()} == files.keys() - {".gitattributes"}
        assert all((Path(folder) / one).read_bytes() == files[one] for one in FILES if one in files)
        assert model_name(Path(folder)) == "tile"
    for (said, seconds), place in ((missing, "models/tlie"), (revision, f"{NAME} at revision v9")):
        assert said == (
            f"Expected a model folder, or a model on the hub, found neither at {place} (the hub cannot be reached, and "
            "it was not fetched before); correct the name."
        )
        assert seconds < 5


@pytest.mark.slow
def test_the_card_on_the_hub_shows_what_was_measured(models, pushed):
    first, _, metrics = models
    card = ModelCard(pushed.hub.files(NAME, pushed.commits[0])["README.md"].decode())
    assert card.data.library_name == "ddad"
    assert card.data.pipeline_tag is None
    found = {one.metric_type: one for one in card.data.eval_results}
    assert set(found) == {name for name in MEASURED if metrics[name] is not None} >= {"image_auroc", "miss_rate"}
    for name, one in found.items():
        assert one.metric_value == metrics[name]
        assert one.metric_args.get("interval_95") == metrics["intervals"].get(name)
        assert one.dataset_args == {"good_images": read_record(first)["data"]["fingerprint"]}
    assert f"| {metrics['image_auroc']:.4g} |" in card.text
    assert f'from_pretrained("{NAME}")' in card.text
    assert "Accuracy on defects is not known" not in card.text
    later = ModelCard(pushed.hub.files(NAME, pushed.commits[1])["README.md"].decode())
    assert later.data.eval_results is None
    assert "Accuracy on defects is not known" in later.text


@pytest.mark.parametrize("change", [{"threshold": 1.5}, {"settings": {"seed": 7}}])
def test_metrics_of_another_model_are_refused(models, change):
    first, _, metrics = models
    assert set(METRICS) <= set(metrics)
    with pytest.raises(ConfigError, match=r"Expected the metrics of the model in .* itself, found those of another"):
        push_folder(first, NAME, metrics={**metrics, **change})


def test_what_reads_like_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_name("owner/name") == ("owner/name", None)
    assert parse_name("owner/name@v1.0") == parse_name("owner/name", "v1.0") == ("owner/name", "v1.0")
    for place in ("name", "/owner/name", "./name", "../name", "a/b/c", tmp_path):
        assert parse_name(place) is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_name("owner/name") is None  # a folder comes first
    for model, revision in (("owner/name", "v1"), ("other/name@v1", "v2")):
        with pytest.raises(ConfigError, match=f"Expected a model as owner/name on the hub to take revision {revision}"):
            parse_name(model, revision)
    assert model_name(tmp_path / "owner" / "name") == "name"
