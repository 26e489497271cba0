"""Several processes train one model, on this machine, with gloo. pytest tests/test_distributed.py

They run in a network of their own, since processes that wait for each other listen on all addresses of a machine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ddad.config import make_settings
from ddad.detector import read_record
from ddad.distributed import Processes, join
from ddad.errors import ConfigError
from ddad.fit import fit
from ddad.unet import create_unet
from tiny import write_photos

PRIVATE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Begins a command that has no network but a loopback device of its own."""


needs_private_network = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*PRIVATE, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a network of its own, which unshare -n is not allowed to make here",
)

STEPS = 8
TRAINING = {"batch_size": 4, "precision": "fp32", "augment": ["hflip", "rot90"]}
OPTIONS = {"image_size": 32, "false_alarms": 0.5, "training": TRAINING, "adaptation": {"epochs": 0}}
SCRIPT = """
import json, os, signal, sys
import ddad.fit as module
from ddad.config import make_settings
from ddad.training import Trainer

photos, out, settings, options = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
if not options.pop("measure", False):
    module._median_seconds = lambda *arguments: 0.01
stop, run = options.pop("stop", None), Trainer.run
Trainer.run = lambda *a, **k: run(*a, **{**k, "save_every_seconds": 0})
settings = make_settings("xs", **settings)
progress = lambda event: event.step == stop and os.kill(os.getpid(), signal.SIGTERM)

def watch(event, arguments):
    written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (written or event in ("os.mkdir", "os.rename", "os.remove")) and os.path.dirname(out) in str(arguments[0]):
        print("others write:", event, arguments[0])

if os.environ["RANK"] != "0":
    sys.addaudithook(watch)
module.fit(photos, out, settings, device="cpu", on_progress=progress, on_stage=print, **options)
print("goes on")
"""
# Each process with the environment that launchers give; then all of their exit codes.
LAUNCH = """
for rank in $(seq 0 $((WORLD_SIZE - 1))); do RANK=$rank LOCAL_RANK=$rank "$@" & all="$all $!"; done
for one in $all; do wait $one; echo "ended with $?"; done
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "good", range(14))


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    """The model of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddad.fit._median_seconds", lambda *arguments: 0.01)
        out = tmp_path_factory.mktemp("alone") / "model"
        return fit(photos, out, make_settings("xs", **OPTIONS), steps=STEPS, device="cpu")


def launch(count, *command):
    """Start a Python program as so many processes; returns what they said, and their exit codes."""
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    numbers = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    whole = [*PRIVATE, "sh", "-c", LAUNCH, "sh", sys.executable, *map(str, command)]
    environment = {**os.environ, **common, **numbers}
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, check=False, timeout=300)
    codes = [int(code) for code in re.findall(r"^ended with (\d+)$", done.stdout, re.MULTILINE)]
    return done.stdout + done.stderr, codes


def train(count, photos, out, **options):
    script = out.parent / "train.py"
    script.write_text(SCRIPT)
    return launch(count, script, photos, out, json.dumps(OPTIONS), json.dumps({"steps": STEPS, **options}))


def losses(model):
    log = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    return np.array([[entry["loss"], entry["held_out_loss"]] for entry in log])


def weights(model):
    return torch.cat([value.flatten() for value in load_file(next((model / "unet").glob("*.safetensors"))).values()])


def assert_same_training(model, other):
    """But for rounding, which Adam makes larger where gradients are as small as it."""
    of_losses = np.abs(losses(model) / losses(other) - 1).max()
    one, two = weights(model), weights(other)
    differences = (one - two).abs()
    torch.manual_seed(0)
    fresh = create_unet("xs").state_dict()
    names = load_file(next((model / "unet").glob("*.safetensors")))
    way = (two - torch.cat([fresh[name].flatten() for name in names])).norm()
    share, apart = (differences > 1e-6).float().mean(), differences.norm() / way
    print(
        f"losses differ by {of_losses:.1e} of them at most; weights by {differences.max():.1e} at most, "
        f"{100 * share:.2f} % of them by more than 1e-6, all together by {apart:.1e} of the way they went"
    )
    assert of_losses < 1e-5
    assert share < 0.01
    assert apart < 1e-3


@needs_private_network
def test_two_processes_give_the_model_of_one(photos, alone, tmp_path):
    said, codes = train(2, photos, tmp_path / "model")
    assert codes == [0, 0], said
    assert_same_training(tmp_path / "model", alone)
    # The main process alone spoke, wrote, and went on.
    assert said.count("14 good images at 32 x 32 pixels") == said.count("goes on") == 1
    assert "2 processes, with 2 images of each step." in said
    assert "others write" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "train.py"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in alone.iterdir()}
    for part in ("data", "settings"):
        assert read_record(tmp_path / "model")[part] == read_record(alone)[part]


@needs_private_network
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(photos, alone, tmp_path):
    """One process, then two, then one; each stopped by a signal to the main process."""
    out, run = tmp_path / "model", tmp_path / "model.run"
    for count, stop, saved in ((1, 2, 2), (2, 4, 5)):  # several agree to stop in the step after
        said, codes = train(count, photos, out, stop=stop)
        assert f"Interrupted: step {saved} of {STEPS}" in said
        assert codes == [1, 130][:count]  # the script, unlike the command line, shows the exception
        assert [path.name for path in run.glob("step-*")] == [f"step-{saved:09d}"]
    said, codes = train(1, photos, out)
    assert codes == [0], said
    assert f"Resuming after step 5 of {STEPS}." in said
    assert_same_training(out, alone)


@needs_private_network
@pytest.mark.slow
def test_a_time_budget_is_measured_by_all_and_a_finished_model_is_found(photos, tmp_path):
    out = tmp_path / "model"
    options = {"measure": True, "steps": None, "time_budget": 20}
    said, codes = train(2, photos, out, **options)
    assert codes == [0, 0], said
    steps = read_record(out)["training"]["steps"]
    assert steps > 10
    assert len((out / "training.jsonl").read_text().splitlines()) == steps
    said, codes = train(2, photos, out, **options)
    assert codes == [0, 0]
    assert said.count("is already trained with these settings on these images; nothing to do.") == 1
    assert said.count("goes on") == 1


def commands(photos, out, *more):
    return ["-m", "ddad.cli", "train", photos, "--out", out, "--image-size", "32", "--false-alarms", "50%", *more]


@needs_private_network
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (2, ["--steps", "3"], r"Expected a new folder for the model, found .*, which is something else; choose"),
        (3, ["--steps", "3"], r"share a batch of 16 images evenly \(1, 2, 4, 8, 16\), found 3\."),
        (2, ["--steps", "3", "--time-budget", "9s"], r"Expected either a number of steps or a time budget, found both"),
        (2, ["--steps", "3", "--features", "local-dir:no"], r"Expected a timm backbone .* in no, found something else"),
    ],
)
def test_a_mistake_is_one_sentence_and_ends_all(count, options, words, photos, tmp_path):
    if "evenly" not in words and "--features" not in options:
        (tmp_path / "model").mkdir()
    said, codes = launch(count, *commands(photos, tmp_path / "model", *options))
    assert codes == [1] * count, said
    assert len(re.findall(words, said)) == said.count("Error:") == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:1", "Expected no number in the device of 1000 processes, which take one GPU each, found cuda:1; leave"),
        ("cuda", r"Expected a GPU for each process, found 1000 processes and \d+ GPUs on this machine; launch no more"),
    ],
)
def test_each_process_needs_a_gpu_of_its_own(device, words, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1000")
    with pytest.raises(ConfigError, match=words):
        join(torch.device(device))


@pytest.mark.slow
def test_half_a_launch_is_a_mistake(photos, tmp_path):
    """Somebody has set WORLD_SIZE, and nothing else."""
    command = [sys.executable, *map(str, commands(photos, tmp_path / "model"))]
    environment = {**os.environ, "WORLD_SIZE": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Error: Expected 2 processes that find each other, found that they do not (" in done.stderr
    assert "Traceback" not in done.stderr


ONE_FAILS = """
import sys, torch
from ddad.distributed import join
from ddad.errors import DataError
processes = join(torch.device("cpu"))
with processes.together() as known:
    known["by"] = processes.number
assert known == {"by": 0}
try:
    with processes.together():
        if processes.number == 1:
            raise DataError("the second cannot read it")
except DataError as error:
    print(f"{processes.number} says that {error}")
"""


@needs_private_network
@pytest.mark.slow
def test_what_one_process_cannot_do_the_main_one_says(tmp_path):
    (tmp_path / "script.py").write_text(ONE_FAILS)
    said, codes = launch(2, tmp_path / "script.py")
    assert codes == [0, 1]
    assert said.count("0 says that the second cannot read it") == said.count("says that") == 1


@needs_private_network
@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_ends_all(photos, tmp_path):
    run = tmp_path / "model.run"
    command = commands(photos, tmp_path / "model", "--steps", "5000")
    launcher = [*PRIVATE, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen([*launcher, *map(str, command)], env=environment, stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            if (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) > 5:
                break
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        said.seek(0)
        text = said.read()
    stopped = re.findall(r"Stopped at step (\d+) of 5000, and saved. The same command goes on from there.", text)
    assert len(stopped) == 1, text
    assert [path.name for path in run.glob("step-*")] == [f"step-{int(stopped[0]):09d}"]
    assert len((run / "log.jsonl").read_text().splitlines()) == int(stopped[0])
    assert not (tmp_path / "model").exists()


def test_shares_are_equal_and_cover_the_batch():
    def share(count, number, batch_size=12):
        return list(Processes(number, count, count, torch.device("cpu")).share(batch_size))

    assert share(1, 0) == list(range(12))
    assert [place for number in range(4) for place in share(4, number)] == list(range(12))
    with pytest.raises(ConfigError, match=r"share a batch of 12 images evenly \(1, 2, 3, 4, 6, 12\), found 5\."):
        share(5, 0)
