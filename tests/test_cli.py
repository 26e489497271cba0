"""What a user types, and what comes back. pytest tests/test_cli.py"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from analytic import GaussianUNet
from ddad.cli import app
from ddad.config import make_settings
from ddad.data.samples import paths_by_hash
from ddad.detector import Detector, read_record
from ddad.features import create_features
from ddad.results import write_results
from ddad.unet import create_scheduler

SHAPE = (64, 64)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ddad(*arguments, **options):
    """The command as installed, in a process of its own."""
    command = [sys.executable, "-m", "ddad.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def pixels(seed, size=SHAPE):
    return np.clip(128 + 12 * np.random.default_rng(seed).standard_normal((*size, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small folder in MVTec layout, real files."""
    root = tmp_path_factory.mktemp("data") / "plate"
    for part in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (root / part).mkdir(parents=True)
    for i in range(20):
        Image.fromarray(pixels(i)).save(root / "train/good" / f"{i:03d}.png")
    for i in range(6):
        Image.fromarray(pixels(100 + i)).save(root / "test/good" / f"{i:03d}.png")
        image, mask = pixels(200 + i), np.zeros(SHAPE, np.uint8)
        rows, columns = slice(10 + 5 * i, 20 + 5 * i), slice(30, 42)
        image[rows, columns], mask[rows, columns] = 250, 255
        Image.fromarray(image).save(root / "test/hole" / f"{i:03d}.png")
        Image.fromarray(mask).save(root / "ground_truth/hole" / f"{i:03d}_mask.png")
    return root


@pytest.fixture
def ideal(monkeypatch):
    """Loading any model gives the closed-form denoiser of these very images, calibrated."""
    settings = make_settings("xs", false_alarms=0.05, network={"prediction_type": "epsilon"})
    features = create_features("efficientnet-lite2", (2, 3))
    detector = Detector(GaussianUNet(0.0, 0.1), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    detector.calibrate([pixels(300 + i) for i in range(8)], [pixels(400 + i) for i in range(19)])
    monkeypatch.setattr(Detector, "from_pretrained", lambda folder, device=None, **how: detector)
    return detector


def test_predict_writes_rows_and_pictures(ideal, data, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((data / "test/good/000.png").read_bytes()[:200])
    wide = tmp_path / "000.png"  # the same stem as another image
    Image.fromarray(pixels(7, (64, 160))).save(wide)
    out = tmp_path / "out"
    result = run("predict", "MODEL", data / "test", broken, wide, "--out", out)
    assert result.exit_code == 0, result.output
    assert "14 images: " in result.output
    assert "1 unreadable" in result.output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    assert set(rows[0]) == {
        "path", "anomaly_score", "p_value", "is_anomalous", "threshold", "photo", "regions", "files", "error",
    }  # fmt: skip
    for row in rows:
        if row["path"] == str(broken):
            assert "cannot be decoded" in row["error"]
            assert (row["anomaly_score"], row["is_anomalous"], row["regions"], row["files"]) == (None, None, [], {})
            continue
        assert row["error"] is None
        assert row["is_anomalous"] == (row["anomaly_score"] > row["threshold"])
        for kind in ("heatmap", "overlay", "reconstruction"):
            assert Image.open(out / row["files"][kind]).size == Image.open(row["path"]).size
    holes = [row for row in rows if "/hole/" in row["path"]]
    assert len(holes) == 6
    for i, row in enumerate(holes):
        assert row["is_anomalous"]
        left, top, right, bottom = row["regions"][0]["box"]
        assert left < 36 < right
        assert top < 15 + 5 * i < bottom
    assert len({row["files"]["heatmap"] for row in rows if row["files"]}) == 13


def test_a_file_that_vanishes_on_the_way_does_not_end_the_run(ideal, data, tmp_path, monkeypatch):
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        shutil.copy(data / "test/good/000.png", paths[-1])
    inspected = ideal.stream

    def stream(*arguments):
        for path, result in inspected(*arguments):
            if path == paths[1]:
                path.unlink()  # inspected already, but not drawn yet
            yield path, result

    monkeypatch.setattr(ideal, "stream", stream)
    rows = list(write_results(ideal, paths, tmp_path / "out", batch_size=3))
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert "1.png" in rows[1]["error"]
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3


def test_a_good_part_does_not_glow(ideal, data, tmp_path):
    run("predict", "MODEL", data / "test", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    brightest = {row["path"]: np.asarray(Image.open(tmp_path / row["files"]["heatmap"])).max() for row in rows}
    for row in rows:
        assert (brightest[row["path"]] > 90) == row["is_anomalous"], row


def test_predict_as_json_is_one_row_a_line(ideal, data, tmp_path):
    result = run("predict", "MODEL", data / "test/hole/000.png", "--out", tmp_path, "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "results.jsonl").read_text())


def test_evaluate_writes_metrics_and_a_report(ideal, data, tmp_path):
    result = run("evaluate", "MODEL", data, "--out", tmp_path / "eval")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    for name in ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro", "aupro_0.05",
                 "false_alarm_rate", "miss_rate", "mean_image_auroc", "seconds_per_image"):  # fmt: skip
        assert isinstance(metrics[name], float), name
    assert metrics["image_auroc"] == 1.0
    assert metrics["miss_rate"] == 0.0
    assert metrics["aupro"] > 0.8
    assert metrics["counts"] == {"good": 6, "defective": 6}
    assert metrics["per_kind"]["hole"]["count"] == 6
    page = (tmp_path / "eval" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http://" not in re.sub(r"http://www.w3.org\S*", "", page)
    assert "https://" not in page
    assert "image_f1_max (oracle)" in result.output
    low, high = metrics["intervals"]["miss_rate"]
    assert low == 0
    assert f"0 to {high:.4g}" in result.output
    assert metrics["baseline"] is None


def test_evaluate_beside_a_baseline(ideal, data, tmp_path):
    paths = paths_by_hash((data / "train/good").iterdir())
    hashes = sorted(paths)
    ideal.record = {"data": {"train": hashes[:12], "select": [], "calibration": hashes[12:]}}
    result = run("evaluate", "MODEL", data, "--out", tmp_path, "--baseline")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    beside = metrics["baseline"]
    assert beside["name"] == "nearest neighbours"
    for name in ("image_auroc", "pixel_auroc", "aupro", "false_alarm_rate", "miss_rate"):
        assert 0 <= beside[name] <= 1
    assert beside["image_auroc"] > 0.9
    assert beside["per_kind"]["hole"]["count"] == 6
    assert "nearest neighbours" in result.output
    assert "nearest neighbours" in (tmp_path / "report.html").read_text()
    ideal.record["data"]["train"].append("0" * 64)
    other = run("evaluate", "MODEL", data, "--out", tmp_path, "--baseline")
    assert "good images that the model was trained on, found 12 of them" in str(other.exception)


def save_calibration(detector, folder):
    folder.mkdir()
    record = {"format_version": 1, "calibration": detector.calibration.model_dump(mode="json")}
    (folder / "detector.json").write_text(json.dumps(record))


def test_monitor_warns_of_photographs_unlike_calibration(ideal, tmp_path):
    folders = {"same": 0, "darker": -30}
    save_calibration(ideal, tmp_path / "model")
    for name, shift in folders.items():
        (tmp_path / name).mkdir()
        for i in range(30):
            shifted = np.clip(pixels(500 + i).astype(int) + shift, 0, 255).astype(np.uint8)
            Image.fromarray(shifted).save(tmp_path / name / f"{i:02d}.png")
        assert run("predict", "MODEL", tmp_path / name, "--out", tmp_path / f"{name}.out").exit_code == 0
    options = ("--window", "20", "--alarm-rate", "0.1%")
    same = run("monitor", tmp_path / "model", tmp_path / "same.out/results.jsonl", *options)
    assert same.output == "30 photographs, no alarms.\n"
    darker = run("monitor", tmp_path / "model", tmp_path / "darker.out/results.jsonl", *options)
    assert darker.exit_code == 0
    assert "After 20 photographs: The last 20 photographs are darker than at calibration" in darker.output
    few = run("monitor", tmp_path / "model", tmp_path / "darker.out/results.jsonl")
    assert few.output == "30 photographs, no alarms; fewer than a window of 50, so nothing was compared.\n"
    as_json = run("monitor", tmp_path / "model", tmp_path / "darker.out/results.jsonl", *options, "--json")
    assert "brightness" in {json.loads(line)["what"] for line in as_json.stdout.splitlines()}


def test_what_cannot_be_monitored_is_one_sentence(ideal, tmp_path, mistake):
    save_calibration(ideal, tmp_path / "model")
    for content, sentence in (
        (None, "Error: Expected a results.jsonl at "),
        ("[]", "Error: Expected a JSON object in line 1 of "),
        ('{"threshold": 0.0}', "Error: Expected results of the model as it is calibrated now, found others; inspect"),
        ('{"path": "x"}', "Error: Expected the results.jsonl of ddad predict, found a row without anomaly_score and p"),
    ):
        if content:
            (tmp_path / "results.jsonl").write_text(content)
        assert mistake("monitor", tmp_path / "model", tmp_path / "results.jsonl").startswith(sentence)


def test_check_draws_synthetic_defects(data, tmp_path):
    result = run("check", data, "--image-size", "64", "--synthetic", tmp_path / "sheet.png")
    assert result.exit_code == 0
    assert f"are drawn in {tmp_path / 'sheet.png'}." in result.output.replace("\n", " ")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4 * (64 + 4), 8 * (64 + 4), 3)
    red = (sheet == (255, 40, 40)).all(axis=2)
    assert red.any()


def test_an_unreadable_test_image_is_left_out_and_named(ideal, data, tmp_path):
    copy = tmp_path / "plate"
    shutil.copytree(data, copy)
    (copy / "test/good/003.png").write_bytes(b"broken")
    result = run("evaluate", "MODEL", copy, "--out", tmp_path / "eval")
    assert result.exit_code == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["counts"] == {"good": 5, "defective": 6}
    assert any("Left out, since it cannot be read" in note and "003.png" in note for note in metrics["notes"])


def test_evaluate_without_test_images(ideal, data, mistake):
    said = mistake("evaluate", "M", data / "train" / "good", "--out", "x")
    assert said.startswith("Error: Expected labelled test images in ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("predict", "nowhere", "cli.py", "--out", "x"),
            "Expected an image or a folder at cli.py, found nothing",
        ),
        (("evaluate", "nowhere", ".", "--out", "x"), "Error: Expected a model folder with a detector.json, found none"),
        (("info", "nowhere"), "Error: Expected a model folder with a detector.json, found none at nowhere; name the"),
        (("train", "nowhere", "--out", "x"), "nowhere"),
        (
            ("train", ".", "--out", "x", "--preset", "huge"),
            "Expected a preset among xs, s, base, paper, paper-s",
        ),
        (
            ("train", ".", "--out", "x", "--image-size", "100"),
            "Setting image_size: Input should be a multiple of",
        ),
        (("train", ".", "--out", "x", "--denoising-steps", "7"), "Error: Expected a number of denoising steps that"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_1(arguments, sentence, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    assert sentence in mistake(*arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", ".", "--out", "x", "--time-budget", "soon"), "expected a duration such as 90s, 30m or 1h30m"),
        (("train", ".", "--out", "x", "--false-alarms", "100%"), "expected a rate such as 1% or 0.01"),
        (("train", "."), "Missing option '--out'"),
        (("polish",), "No such command 'polish'"),
    ],
)
def test_a_wrong_option_exits_with_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_check_lists_findings_and_decides(data, tmp_path):
    result = run("check", data, "--image-size", "64")
    assert result.exit_code == 0
    assert "Training can start." in result.output
    assert "20 good images to train on" in result.output
    report = json.loads(run("check", data, "--image-size", "64", "--json").output)
    assert report["can_train"] is True
    few = tmp_path / "few"
    few.mkdir()
    Image.fromarray(pixels(0)).save(few / "one.png")
    result = run("check", few)
    assert result.exit_code == 1
    assert "Training cannot start." in result.output


def test_train_predict_evaluate_info_as_a_user(data, tmp_path):
    """The whole way in real processes with a real network, far too short to be good."""
    model = tmp_path / "model"
    options = ("--image-size", "64", "--steps", "3", "--false-alarms", "20%")
    result = ddad("train", data, "--out", model, *options)
    assert result.returncode == 0, result.stderr
    assert "20 good images at 64 x 64 pixels" in result.stdout
    assert "3.8 M parameters" in result.stdout
    assert "step 3 of 3" in result.stdout
    assert f"Model written to {model}" in result.stdout.replace("\n", " ")
    assert "nothing to do" in run("train", data, "--out", model, *options).output
    other = ddad("train", data, "--out", model, *options, "--seed", "1")
    assert other.returncode == 1
    assert "trained with other seed (0 before, 1 now)" in other.stderr
    assert other.stderr.count("\n") == 1

    assert json.loads(run("info", model, "--json").output)["training"]["steps"] == 3
    assert "good calibration images" in run("info", model).output.replace("\n", " ")
    predicted = ddad("predict", model, data / "test" / "good", "--out", tmp_path / "out")
    assert predicted.returncode == 0, predicted.stderr
    assert "6 images" in predicted.stdout
    evaluated = run("evaluate", model, data, "--out", tmp_path / "eval", "--json")
    assert 0 <= json.loads(evaluated.stdout)["image_auroc"] <= 1


def test_our_bugs_keep_their_traceback(monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ddad.data.check.check", broken)
    result = run("check", ".")
    assert isinstance(result.exception, ZeroDivisionError)


def test_version():
    assert re.fullmatch(r"ddad \d+\.\d+\.\d+\n", ddad("--version").stdout)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    done = run("train", data, "--out", out, "--image-size", "32", "--steps", "2", "--false-alarms", "30%", "--no-adapt")
    assert done.exit_code == 0, done.output
    assert "The features are not adapted: the settings say so." in done.output
    return out


def test_recalibrate_says_what_it_can_promise(trained, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    for i in range(12):
        Image.fromarray(pixels(900 + i)).save(new / f"{i}.png")
    result = run("recalibrate", trained, new, "--out", tmp_path / "model", "--false-alarms", "20%")
    assert result.exit_code == 0, result.output
    assert "6 good calibration images: about 14 % of good parts are flagged in the long run, with 95 % confide" in (
        result.output.replace("\n", " ")
    )
    assert f"Model written to {tmp_path / 'model'}." in result.output
    shown = run("info", tmp_path / "model").output
    assert "+ 6 + 6 (train + select + calibration)" in shown


def test_merging_and_too_few_images_to_tune_by(trained, data, tmp_path, mistake):
    new = tmp_path / "new"
    new.mkdir()
    for i in range(5):
        Image.fromarray(pixels(950 + i)).save(new / f"{i}.png")
    before = read_record(trained)["calibration"]
    assert run("recalibrate", trained, new, "--out", tmp_path / "model", "--merge").exit_code == 0
    after = read_record(tmp_path / "model")["calibration"]
    assert len(after["scores"]) == len(before["scores"]) + 5
    said = mistake("tune", trained, data, "--out", tmp_path / "other")
    assert re.fullmatch(r"Error: Expected at least 8 good images in .* to choose by, .*\n", said)


def test_too_few_images_to_adapt_on_is_one_sentence(trained, data, tmp_path, mistake):
    said = mistake("adapt", trained, data, "--out", tmp_path / "model", "--epochs", "1")
    assert said.startswith("Error: Expected more good images in ")


def test_convert_refuses_what_is_no_checkpoint(tmp_path, mistake):
    (tmp_path / "weights").write_text("nothing of the kind")
    said = mistake("convert", tmp_path / "weights", "--out", tmp_path / "model")
    assert said.startswith("Error: Expected a state dict, as torch.save writes it, in ")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_benchmark_of_one_category_with_its_ablation(data, tmp_path):
    out = tmp_path / "out"
    options = ("--dataset", "folder", "--seeds", "1", "--steps", "2", "--image-size", "32", "--out", out)
    result = ddad("benchmark", data, *options, "--ablate", "--ablate-images", "4")
    assert result.returncode == 0, result.stderr
    assert "| plate |" in result.stdout
    assert "| eta = 0 |" in result.stdout
    assert (out / "xs" / "plate" / "seed-0" / "ablations.json").is_file()
    again = ddad("benchmark", data, *options)
    assert "1 trainings, 1 of them done before." in again.stdout


def test_benchmark_of_something_else(tmp_path, mistake):
    assert mistake("benchmark", tmp_path, "--dataset", "visa", "--out", tmp_path / "out").startswith("Error: ")
