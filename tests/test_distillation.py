"""The one-call student. pytest tests/test_distillation.py"""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from analytic import GaussianUNet
from ddad.checkpoint import CheckpointStore
from ddad.cli import app
from ddad.config import make_settings
from ddad.data.samples import content_hash
from ddad.detector import STUDENT, Detector, read_record
from ddad.distillation import StudentTrainer, distil, student_settings
from ddad.errors import ConfigError, DataError, Interrupted, ModelError
from ddad.features import create_features
from ddad.refit import adapt, distill, recalibrate, tune
from ddad.sampling import to_unit
from ddad.unet import create_scheduler
from tiny import SHAPE, photo, train_model, write_photos

STEPS = 3
CPU = torch.device("cpu")


IMAGES = [photo(i) for i in range(7)]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Little is rebuilt and judged, and any student is good enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddad.distillation.MOST_REBUILT", 6)
        patch.setattr("ddad.distillation.DEFECTS", 12)
        patch.setattr("ddad.tuning.DEFECTS", 12)
        patch.setattr("ddad.tuning.MOST_ADAPTED", 16)
        patch.setattr("ddad.distillation.MOST_LOST", 1.0)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "good", range(110))


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    return train_model(photos, tmp_path_factory.mktemp("models") / "model", sampling={"stride": 100})


@pytest.fixture(scope="module")
def said():
    """What was said while `taught` was made."""
    return []


@pytest.fixture(scope="module")
def taught(model, photos, said, tmp_path_factory):
    """The model with a student."""
    out = tmp_path_factory.mktemp("taught") / "model"
    distill(model, photos, out, steps=STEPS, device="cpu", on_stage=said.append)
    return out


@pytest.fixture(scope="module")
def features():
    return create_features("efficientnet-lite2", (2, 3))


def load(folder, fast=False):
    return Detector.from_pretrained(folder, device="cpu", fast=fast)


def of(folder, hashes):
    return [path for path in sorted(folder.iterdir()) if content_hash(path) in set(hashes)]


def copied(paths, folder):
    folder.mkdir()
    for path in paths:
        shutil.copy(path, folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def scores(detector, images):
    return [prediction.anomaly_score for prediction in detector.predict(list(images))]


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["xs", "base", "paper"])
def test_the_student_makes_one_call_and_changes_nothing_else(preset):
    settings = make_settings(preset, sampling={"conditioning_weight": 2.0})
    student = student_settings(settings)
    assert student.sampling.timesteps == (settings.sampling.start_timestep,)
    assert (student.sampling.conditioning_weight, student.sampling.eta) == (0.0, 0.0)
    assert student.sampling.start_noise == "none"
    assert student.sampling.match_level == settings.sampling.match_level
    assert student.model_dump(exclude={"sampling"}) == settings.model_dump(exclude={"sampling"})


class Learner(GaussianUNet):
    """The closed-form denoiser, whose mean can be learned."""

    def __init__(self, mean, deviation=0.1, prediction_type="epsilon"):
        super().__init__(mean, deviation, prediction_type)
        del self.mean
        self.mean = nn.Parameter(torch.tensor(mean))


def closed_form_settings(prediction_type="epsilon", **changes):
    return make_settings(
        "xs",
        network={"prediction_type": prediction_type},
        sampling={"match_level": False},
        training={"batch_size": len(IMAGES), "precision": "fp32", **changes},
    )


def closed_form(target, mean, deviation, settings):
    """x̂₀ of √ā y for pixels N(mean, deviation²): mean + (y - mean) ā σ² / (ā σ² + 1 - ā)."""
    alpha = create_scheduler("epsilon").alphas_cumprod[settings.sampling.start_timestep]
    signal = alpha * deviation**2
    return mean + (target - mean) * signal / (signal + 1 - alpha)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_the_reconstruction_in_pixels(features, prediction_type):
    settings = closed_form_settings(prediction_type)
    unet = Learner(0.2, 0.1, prediction_type)
    one_call = student_settings(settings)
    detector = Detector(unet, create_scheduler(prediction_type), features, one_call, SHAPE, device="cpu")
    own = detector.reconstruct(IMAGES)
    assert unet.calls == [settings.sampling.start_timestep]
    torch.testing.assert_close(own, closed_form(to_unit(IMAGES), 0.2, 0.1, settings), rtol=0, atol=1e-5)

    assert float(StudentTrainer(unet, settings, own, CPU).step(IMAGES, 0, 1)) < 1e-10

    other = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trainer = StudentTrainer(Learner(0.2, 0.1, prediction_type), settings, other.half(), CPU)
    expected = np.square(own.numpy() - other.half().float().numpy()).mean()
    assert float(trainer.step(IMAGES, 0, 1)) == pytest.approx(expected, rel=1e-5)


def test_each_photograph_learns_its_own_reconstruction(features):
    """A batch holds some images only, in an order of its own."""
    settings = closed_form_settings(batch_size=3, learning_rate=1e-9)
    own = closed_form(to_unit(IMAGES), 0.2, 0.1, settings)
    trainer = StudentTrainer(Learner(0.2), settings, list(own), CPU)
    assert max(float(trainer.step(IMAGES, step, 1000)) for step in range(7)) < 1e-10
    shifted = StudentTrainer(Learner(0.2), settings, list(own.roll(1, 0)), CPU)
    assert float(shifted.step(IMAGES, 0, 1)) > 1e-6


def test_training_finds_what_rebuilds_like_that():
    settings = closed_form_settings(learning_rate=0.4, warmup_steps=0, ema_decay=None, weight_decay=0.0)
    unet = Learner(0.0)
    StudentTrainer(unet, settings, list(closed_form(to_unit(IMAGES), 0.3, 0.1, settings)), CPU).run(IMAGES, 60)
    assert unet.mean.item() == pytest.approx(0.3, abs=0.01)


def tiny_unet(dropout=0.0):
    torch.manual_seed(0)
    return UNet2DModel(
        in_channels=12, out_channels=12, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        dropout=dropout, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def tiny_trainer(dropout=0.0, **changes):
    training = {"batch_size": 2, "warmup_steps": 2, "precision": "fp32", **changes}
    settings = make_settings("xs", training=training)
    rebuilt = [torch.full((3, *SHAPE), 0.1 * i).half() for i in range(len(IMAGES))]
    return StudentTrainer(tiny_unet(dropout), settings, rebuilt, CPU)


def test_training_lowers_the_loss():
    losses = []
    tiny_trainer(learning_rate=0.02).run(IMAGES, 80, on_progress=lambda progress: losses.append(progress.loss))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def weights(trainer):
    with trainer.averaged() as unet:
        return {name: value.clone() for name, value in unet.state_dict().items()}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, dropout):
    whole = tiny_trainer(dropout)
    whole.run(IMAGES, 6)

    store = CheckpointStore(tmp_path)

    def stop_at_three(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        tiny_trainer(dropout).run(IMAGES, 6, store=store, on_progress=stop_at_three)
    second = tiny_trainer(dropout)
    resumed_from = []
    second.run(IMAGES, 6, store=store, on_resume=resumed_from.append)
    assert resumed_from == [3]
    expected, found = weights(whole), weights(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    fresh = weights(tiny_trainer(dropout))
    assert any(not torch.equal(expected[name], fresh[name]) for name in expected)


def test_scores_that_depend_on_the_batch_cannot_be_learned(features):
    settings = make_settings("paper", scoring={"features": "efficientnet-lite2"})
    detector = Detector(GaussianUNet(), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    message = r"Expected a model that scores each image by itself, found batch-max fusion \(preset paper\); distil a m"
    with pytest.raises(ConfigError, match=message):
        distil(detector, IMAGES, IMAGES)
    assert detector.unet.calls == []


# -- in a model folder -------------------------------------------------------------------------------------------------


def test_a_model_gets_a_student_and_stays_as_it_is(model, taught, said, photos):
    before, after, student = load(model), load(taught), load(taught, fast=True)
    assert len(before.settings.sampling.timesteps) > 1
    assert after.settings == before.settings
    assert after.calibration == before.calibration
    assert student.settings == student_settings(before.settings)
    assert student.settings.sampling.timesteps == (before.settings.sampling.start_timestep,)
    some = sorted(photos.iterdir())[:6]
    np.testing.assert_array_equal(scores(after, some), scores(before, some))
    assert not np.allclose(scores(student, some), scores(after, some), rtol=1e-3)
    for file in ("unet/diffusion_pytorch_model.safetensors", "features/model.safetensors", "training.jsonl"):
        assert (taught / file).read_bytes() == (model / file).read_bytes()
    assert not (model / STUDENT).exists()
    assert [path.name for path in taught.parent.iterdir()] == ["model"]  # no state is left beside it

    distillation = read_record(taught / STUDENT)["distillation"]
    assert distillation["said"] in said
    assert distillation["said"].startswith(f"One network call instead of {len(before.settings.sampling.timesteps)}, ")
    assert distillation["steps"] == STEPS
    assert f"learned in {STEPS} steps from 12 reconstructions" in distillation["said"]
    assert 0 < distillation["synthetic_auroc"] <= 1
    assert "distillation" not in read_record(taught)


def test_the_student_learned_something(model, taught):
    first, last = (load_file(one / "unet" / "diffusion_pytorch_model.safetensors") for one in (model, taught / STUDENT))
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_student_is_calibrated_by_itself_on_the_same_images(taught, photos):
    detector, student = load(taught), load(taught, fast=True)
    for part in ("train", "select", "calibration"):
        assert sorted(student.record["data"][part]) == sorted(detector.record["data"][part])
    assert len(student.calibration.scores) == len(detector.calibration.scores)
    assert student.calibration.scores != detector.calibration.scores
    ranked = of(photos, student.record["data"]["calibration"])
    np.testing.assert_allclose(sorted(scores(student, ranked)), student.calibration.scores, rtol=1e-5)
    assert not torch.equal(student.statistics.mean, detector.statistics.mean)


@pytest.mark.slow
def test_nothing_is_learned_where_the_first_call_does_as_well(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("ddad.distillation.MOST_LOST", 1.0)
    steps, said = [], []
    distill(model, photos, tmp_path / "model", device="cpu", on_stage=said.append, on_progress=steps.append)
    assert steps == []
    first, last = (
        load_file(one / "unet" / "diffusion_pytorch_model.safetensors") for one in (model, tmp_path / "model" / STUDENT)
    )
    assert all(torch.equal(first[name], last[name]) for name in first)
    distillation = read_record(tmp_path / "model" / STUDENT)["distillation"]
    assert distillation["steps"] == 0
    assert distillation["synthetic_auroc"] == distillation["first_call_synthetic_auroc"]
    assert re.fullmatch(
        r"One network call instead of 2, the model's own first call: image AUROC on synthetic defects [01]\.\d{3}, "
        r"with all calls [01]\.\d{3}\.",
        distillation["said"],
    )
    assert distillation["said"] in said
    monkeypatch.setattr("ddad.distillation.MOST_LOST", -1.0)  # the first call cannot gain so much: it is taught
    monkeypatch.setattr("ddad.distillation.STEPS", 1)
    with pytest.raises(ConfigError, match=r"found [01]\.\d{3} after 1 steps; give more --steps\."):
        distill(model, photos, tmp_path / "other", device="cpu", on_progress=steps.append)
    assert len(steps) == 1


@pytest.mark.slow
def test_distilled_again_it_is_the_same_student(model, taught, photos, tmp_path):
    """Also after a stop: the same call goes on from there."""
    out, steps = tmp_path / "model", []

    def stop_at_two(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=f"step 2 of {STEPS}"):
        distill(model, photos, out, steps=STEPS, device="cpu", on_progress=stop_at_two)
    assert not out.exists()
    assert (tmp_path / "model.adapt").is_dir()
    distill(model, photos, out, steps=STEPS, device="cpu", on_progress=lambda progress: steps.append(progress.step))
    assert steps == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    one, other = (load_file(each / STUDENT / "unet" / "diffusion_pytorch_model.safetensors") for each in (taught, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load(out, fast=True).calibration == load(taught, fast=True).calibration


@pytest.fixture(scope="module")
def refused(model, photos, tmp_path_factory):
    """A model whose student was refused, since no student can gain so much."""
    folder = tmp_path_factory.mktemp("refused") / "model"
    shutil.copytree(model, folder)
    message = (
        r"Expected a student that finds synthetic defects as well as the model \(image AUROC [01]\.\d{3}, within .*\), "
        r"found [01]\.\d{3} after 1 steps; give more --steps\. Nothing was written\."
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddad.distillation.MOST_LOST", -1.0)
        with pytest.raises(ConfigError, match=message):
            distill(folder, photos, steps=1, device="cpu")
    return folder


def test_a_student_that_finds_defects_worse_is_refused(refused, model):
    files = {path.relative_to(refused): path.read_bytes() for path in refused.rglob("*") if path.is_file()}
    assert files == {path.relative_to(model): path.read_bytes() for path in model.rglob("*") if path.is_file()}


def test_nothing_is_left_of_a_refused_student(refused):
    assert [path.name for path in refused.parent.iterdir()] == ["model"]


def test_without_a_student(model, photos, tmp_path):
    message = r"Expected a one-call student in .*model, found none; make it with ddad distill .*model DATA, or leave"
    with pytest.raises(ModelError, match=message):
        load(model, fast=True)
    result = run("predict", model, photos / "000.png", "--fast", "--out", tmp_path / "out")
    assert isinstance(result.exception, ModelError)
    assert not (tmp_path / "out").exists()
    assert "instead of" not in run("info", model).output


def test_info_says_it(taught):
    output = " ".join(run("info", taught).output.split())
    assert f"student {read_record(taught / STUDENT)['distillation']['said']}" in output


def test_the_card_says_it(taught):
    assert read_record(taught / STUDENT)["distillation"]["said"] in (taught / "README.md").read_text()


@pytest.mark.parametrize("merge", [False, True])
def test_recalibration_keeps_the_student_and_calibrates_it_too(taught, tmp_path, merge):
    new = write_photos(tmp_path / "new", range(500, 530), level=125)
    recalibrate(taught, new, tmp_path / "again", merge=merge, false_alarms=0.2, device="cpu")
    for fast in (False, True):
        before, after = load(taught, fast), load(tmp_path / "again", fast)
        assert after.settings.false_alarms == 0.2
        assert after.settings.sampling == before.settings.sampling
        for part in ("train", "select", "calibration"):
            assert after.record["data"][part] == read_record(tmp_path / "again")["data"][part]
        assert after.record.get("distillation") == before.record.get("distillation")
        ranked = of(new, after.record["data"]["calibration"])
        found = [*(before.calibration.scores if merge else ()), *scores(after, ranked)]
        assert len(ranked) >= (30 if merge else 15)
        np.testing.assert_allclose(sorted(found), after.calibration.scores, rtol=1e-5)


@pytest.mark.parametrize("change", [adapt, tune])
def test_a_student_of_another_model_is_left_out(taught, photos, tmp_path, change):
    said = []
    options = {"epochs": 1} if change is adapt else {"seconds": 0}
    change(taught, photos, tmp_path / "changed", device="cpu", on_stage=said.append, **options)
    sentence = "The one-call student is that of the model as it was, and is left out; make it again: ddad distill."
    assert said.count(sentence) == 1
    assert not (tmp_path / "changed" / STUDENT).exists()
    assert (taught / STUDENT).is_dir()
    with pytest.raises(ModelError, match="Expected a one-call student"):
        load(tmp_path / "changed", fast=True)


@pytest.mark.slow
def test_from_the_command_line(model, photos, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    result = run("distill", tmp_path / "model", photos, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "step 2 of 2, loss " in result.output
    assert "learned in 2 steps from 12 reconstructions" in result.output
    assert f"Model written to {tmp_path / 'model'}." in result.output

    out, image = tmp_path / "out", photos / "003.png"
    rows = {}
    for options in ((), ("--fast",)):
        result = run("predict", tmp_path / "model", image, "--out", out, "--device", "cpu", *options)
        assert result.exit_code == 0, result.output
        rows[options] = json.loads((out / "results.jsonl").read_text())
        detector = load(tmp_path / "model", fast=bool(options))
        assert rows[options]["anomaly_score"] == pytest.approx(detector.predict(image).anomaly_score, rel=1e-5)
        assert rows[options]["threshold"] == pytest.approx(detector.calibration.threshold)
    assert rows[()]["anomaly_score"] != rows[("--fast",)]["anomaly_score"]


def test_the_wrong_folder_is_refused(model, photos, tmp_path):
    data = read_record(model)["data"]
    ranked = of(photos, data["calibration"])

    without = copied([*of(photos, data["select"]), *ranked], tmp_path / "untrained")
    with pytest.raises(DataError, match=r"Expected in .* good images that the model was trained on, found none; name"):
        distill(model, without, tmp_path / "out", steps=1)

    few = copied([*of(photos, data["train"]), *of(photos, data["select"])[:7], *ranked], tmp_path / "few")
    message = r"Expected at least 8 good images in .*few that the model has set aside to choose by, found 7; name the f"
    with pytest.raises(DataError, match=message):
        distill(model, few, tmp_path / "out", steps=1)

    unranked = copied(of(photos, [*data["train"], *data["select"]]), tmp_path / "unranked")
    with pytest.raises(DataError, match=rf"ranked by, found that {len(ranked)} are missing; name a folder with all"):
        distill(model, unranked, tmp_path / "out", steps=1)
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_few_images_is_refused(model, photos, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    record = read_record(model)
    record["calibration"]["folds"] = 10
    (tmp_path / "model" / "detector.json").write_text(json.dumps(record))
    message = "Expected a model with good images set aside to choose by, found one calibrated in folds, as of fewer th"
    with pytest.raises(DataError, match=message):
        distill(tmp_path / "model", photos, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_student_has_graphs_of_its_own(taught, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    some = sorted(photos.iterdir())[:5]
    for fast in (True, False):
        graphs = Detector.from_pretrained(taught, fast=fast, backend="onnxruntime")
        np.testing.assert_allclose(scores(graphs, some), scores(load(taught, fast), some), rtol=1e-4)
    assert len(list((tmp_path / "ddad").iterdir())) == 2
