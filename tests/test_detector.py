"""pytest tests/test_detector.py"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from analytic import GaussianUNet
from ddad.config import make_settings
from ddad.detector import Detector, read_record
from ddad.errors import ConfigError, DataError, ModelError
from ddad.features import create_features
from ddad.unet import clean_from, create_scheduler, create_unet, predict
from snippets import ROOT, blocks

SHAPE = (64, 64)


def good_image(seed, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return np.clip(128 + 12 * rng.standard_normal((*shape, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)


def defective_image(seed):
    image = good_image(seed)
    image[20:32, 40:50] = 255
    return image


@pytest.fixture(scope="module")
def features():
    return create_features("efficientnet-lite2", (2, 3))


def analytic_detector(features, **sampling):
    settings = make_settings("xs", false_alarms=0.1, sampling=sampling, network={"prediction_type": "epsilon"})
    unet = GaussianUNet(0.0, 0.1)
    detector = Detector(unet, create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    detector.calibrate([good_image(i) for i in range(6)], [good_image(100 + i) for i in range(19)])
    return detector


@pytest.fixture(scope="module")
def detector(features):
    return analytic_detector(features)


def test_the_ideal_denoiser_finds_the_defect_where_it_is(detector):
    result = detector.predict(defective_image(7))
    assert result.is_anomalous is True
    assert result.p_value == pytest.approx(1 / 20)
    assert result.anomaly_score == pytest.approx(float(result.anomaly_map.max()))
    row, column = np.unravel_index(result.anomaly_map.argmax(), SHAPE)
    assert 20 <= row < 32
    assert 40 <= column < 50
    left, top, right, bottom = result.regions[0].box
    assert left < 45 < right
    assert top < 26 < bottom
    # The reconstruction is grey where the defect was white.
    assert result.reconstruction[20:32, 40:50].mean() < 160 < result.image[20:32, 40:50].mean()


def test_good_parts_are_flagged_about_as_often_as_promised(detector):
    flagged = [detector.predict(good_image(1000 + i)).is_anomalous for i in range(100)]
    # 10 % promised from 19 images: the realised rate is Beta(2, 18) distributed; 99.8 % of it is in this range.
    assert 0 < np.mean(flagged) < 0.4


@pytest.mark.parametrize("sampling", [{}, {"start_noise": "seeded", "eta": 1.0}])
def test_same_image_same_score_alone_in_any_batch_and_order(features, sampling):
    detector = analytic_detector(features, **sampling)
    images = [good_image(i) if i % 3 else defective_image(i) for i in range(7)]
    alone = [detector.predict(image).anomaly_score for image in images]
    for batch_size in (2, 7):
        together = [result.anomaly_score for result in detector.predict(images, batch_size)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)
    backwards = [result.anomaly_score for result in detector.predict(images[::-1], 3)][::-1]
    np.testing.assert_allclose(backwards, alone, rtol=1e-5)


def test_a_real_network_scores_the_same_in_any_batch_and_worker_count(features, tmp_path):
    torch.manual_seed(0)
    detector = Detector(
        create_unet("xs"), create_scheduler("v_prediction"), features, make_settings("xs"), SHAPE, device="cpu"
    )
    detector.calibrate([good_image(i) for i in range(3)], [good_image(10 + i) for i in range(3)])
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(defective_image(i)).save(paths[-1])
    alone = [detector.predict(path).anomaly_score for path in paths]
    for batch_size, workers in ((5, 1), (2, 4)):
        together = [result.anomaly_score for _, result in detector.stream(paths, batch_size, workers)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_bf16_keeps_scores_within_a_few_percent_and_verdicts_away_from_the_threshold(features):
    torch.manual_seed(0)
    settings = make_settings("xs", false_alarms=0.1)
    detector = Detector(create_unet("xs"), create_scheduler("v_prediction"), features, settings, SHAPE, device="cpu")
    detector.calibrate([good_image(i) for i in range(6)], [good_image(100 + i) for i in range(9)])
    images = [good_image(i) if i % 2 else defective_image(i) for i in range(8)]
    exact = detector.predict(images)
    detector.precision = "bf16"
    rough = detector.predict(images)
    for a, b in zip(exact, rough, strict=True):
        assert a.anomaly_score != b.anomaly_score  # bf16 really ran
        assert b.anomaly_score == pytest.approx(a.anomaly_score, rel=0.05)
        if abs(a.anomaly_score / a.threshold - 1) > 0.05:
            assert a.is_anomalous == b.is_anomalous


def test_every_kind_of_source_gives_the_same_prediction(detector, tmp_path):
    image = defective_image(3)
    path = tmp_path / "part.png"
    Image.fromarray(image).save(path)
    sources = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), image]
    scores = {round(result.anomaly_score, 6) for result in detector.predict(sources)}
    assert len(scores) == 1


def test_a_photograph_of_another_size_has_regions_in_its_own_pixels(detector):
    large = np.asarray(Image.fromarray(defective_image(5)).resize((192, 128), Image.Resampling.NEAREST))
    result = detector.predict(large)
    left, top, right, bottom = result.regions[0].box
    assert left < 135 < right <= 192
    assert top < 52 < bottom <= 128
    assert result.anomaly_map.shape == SHAPE


def test_an_unreadable_file_does_not_stop_a_stream(detector, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    results = [result for _, result in detector.stream([good_image(0), broken, good_image(1)], batch_size=2)]
    assert isinstance(results[1], DataError)
    assert results[2].anomaly_score == pytest.approx(detector.predict(good_image(1)).anomaly_score, rel=1e-5)
    with pytest.raises(DataError, match="the content is none of these"):
        detector.predict(broken)


def test_saved_and_loaded_is_the_same_without_pickle(features, tmp_path):
    torch.manual_seed(0)
    settings = make_settings("xs", false_alarms=0.2)
    detector = Detector(create_unet("xs"), create_scheduler("v_prediction"), features, settings, SHAPE, device="cpu")
    detector.calibrate([good_image(i) for i in range(3)], [good_image(10 + i) for i in range(4)])
    folder = tmp_path / "model"
    detector.save_pretrained(folder)
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors", ".md"}
    assert not list(tmp_path.glob(".unfinished*"))

    loaded = Detector.from_pretrained(folder, device="cpu")
    before, after = detector.predict(defective_image(0)), loaded.predict(defective_image(0))
    assert after.anomaly_score == before.anomaly_score
    assert (after.p_value, after.threshold, after.regions) == (before.p_value, before.threshold, before.regions)
    assert loaded.settings == settings


def test_position_statistics_are_kept_with_the_model(features, tmp_path):
    torch.manual_seed(0)
    settings = make_settings("xs")
    detector = Detector(create_unet("xs"), create_scheduler("v_prediction"), features, settings, SHAPE, device="cpu")
    detector.calibrate([good_image(i) for i in range(3)], [good_image(10 + i) for i in range(4)])
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", device="cpu")
    for one, two in zip(detector.statistics, loaded.statistics, strict=True):
        assert one.shape == (3, *SHAPE)
        assert torch.equal(one, two)


def test_a_defect_where_good_parts_vary_counts_less(features):
    """Good parts vary on the left; the same blob is odder on the right."""

    def part(seed, blob=None):
        image = good_image(seed).astype(int)
        image[:, :24] += np.random.default_rng(seed).integers(-60, 60, (64, 24, 1))
        if blob:
            image[28:38, blob : blob + 8] += 90
        return np.clip(image, 0, 255).astype(np.uint8)

    scores = {}
    for position in ("none", "standardise"):
        settings = make_settings("xs", network={"prediction_type": "epsilon"}, scoring={"position": position})
        detector = Detector(
            GaussianUNet(0.0, 0.1), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu"
        )
        detector.calibrate([part(i) for i in range(30)], [part(100 + i) for i in range(9)])
        left, right = detector.predict([part(500, blob=8), part(500, blob=46)])
        scores[position] = right.anomaly_score / left.anomaly_score
    assert scores["standardise"] > 1.2 * scores["none"]


@pytest.mark.parametrize("preset", ["xs", "s", pytest.param("base", marks=pytest.mark.slow)])
def test_parts_load_in_plain_diffusers(features, tmp_path, monkeypatch, preset):
    """With the very lines of docs/hub.md: same outputs, and a scheduler whose step is ours."""
    torch.manual_seed(0)
    settings = make_settings(preset)
    unet, scheduler = create_unet(settings.network.architecture), create_scheduler("v_prediction")
    Detector(unet, scheduler, features, settings, SHAPE, device="cpu").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    snippet = blocks(ROOT / "docs" / "hub.md")[-1].text
    with torch.no_grad():
        exec(snippet.replace("128, 128", "64, 64"), page)
        ours = Detector.from_pretrained("model", device="cpu")
        expected = predict(ours.unet, page["sample"], torch.tensor(160))
    assert torch.equal(page["output"], expected)
    assert page["unet"].config.in_channels == (12 if preset == "xs" else 3)
    assert page["scheduler"].config == ours.scheduler.config
    page["scheduler"].set_timesteps(5)
    found = page["scheduler"].step(page["output"], 160, page["sample"]).pred_original_sample
    alpha = ours.scheduler.alphas_cumprod[160]
    torch.testing.assert_close(found, clean_from(expected, page["sample"], alpha, "v_prediction"))


def test_the_published_head_count_is_set_after_loading(features, tmp_path):
    torch.manual_seed(0)
    settings = make_settings("paper-s", scoring={"features": "efficientnet-lite2"})
    detector = Detector(create_unet("s"), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", device="cpu")
    heads = {module.heads for module in loaded.unet.modules() if type(module).__name__ == "Attention"}
    assert heads == {2}


def test_without_calibration_there_is_no_verdict(features):
    detector = analytic_detector(features)
    detector.calibration = detector.calibration.model_copy(
        update={"scores": (), "threshold": None, "false_alarms": None}
    )
    result = detector.predict(defective_image(0))
    assert (result.p_value, result.is_anomalous, result.threshold, result.regions) == (None, None, None, ())
    detector.calibration = detector.statistics = None
    results = detector.predict([good_image(5), defective_image(0)])
    assert all((result.p_value, result.is_anomalous, result.threshold) == (None, None, None) for result in results)
    assert results[0].anomaly_score < results[1].anomaly_score


def test_batch_max_fusion_is_as_published_and_depends_on_the_batch(features):
    settings = make_settings(
        "xs",
        network={"prediction_type": "epsilon"},
        sampling={"match_level": False},
        scoring={"fusion": "batch-max", "layer_weights": (1.0, 1.0), "pixel_weight": 7.0, "position": "none"},
    )
    detector = Detector(GaussianUNet(0.0, 0.1), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    images = [good_image(1), defective_image(2)]
    results = [result for _, result in detector.stream(images, batch_size=2, batch_max=True)]
    distances = detector.distances(images, detector.reconstruct(images)).numpy()
    pixel, layers = distances[:, 0], distances[:, 1] + distances[:, 2]
    expected = layers + 7 * layers.max() / pixel.max() * pixel
    for result, raw in zip(results, expected, strict=True):
        smoothed = ndimage.gaussian_filter(raw, detector.sigma, mode="mirror", truncate=4)
        np.testing.assert_allclose(result.anomaly_map, smoothed, rtol=1e-3, atol=1e-4)
        assert result.is_anomalous is None
    (alone,) = [result for _, result in detector.stream(images[:1], batch_max=True)]
    assert alone.anomaly_score > 1.5 * results[0].anomaly_score


def test_outside_the_centre_nothing_counts(features):
    detector = analytic_detector(features)
    image = good_image(5)
    image[:8, :8] = 255
    whole = detector.predict(image)
    assert np.unravel_index(whole.anomaly_map.argmax(), SHAPE) < (12, 12)
    detector.settings = make_settings("xs", network={"prediction_type": "epsilon"}, scoring={"crop": 0.5})
    cropped = detector.predict(image)
    np.testing.assert_array_equal(cropped.anomaly_map[16:48, 16:48], whole.anomaly_map[16:48, 16:48])
    assert cropped.anomaly_map.sum() == pytest.approx(whole.anomaly_map[16:48, 16:48].sum())
    assert cropped.anomaly_score < whole.anomaly_score


def test_other_peoples_files_are_not_replaced(features, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    detector = Detector(create_unet("xs"), create_scheduler("v_prediction"), features, make_settings("xs"), SHAPE)
    with pytest.raises(ConfigError, match="Expected a new or empty folder, or an older model, found other files in"):
        detector.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_device_that_is_not_there_is_refused(features):
    def on(device):
        Detector(
            create_unet("xs"), create_scheduler("v_prediction"), features, make_settings("xs"), SHAPE, device=device
        )

    with pytest.raises(ConfigError, match="Expected a device such as cpu, cuda or cuda:1, found 'gpu'"):
        on("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="Expected a device of this machine, found cuda:1"):
            on("cuda:1")


def test_what_is_not_a_model_is_said_in_a_sentence(tmp_path, features):
    with pytest.raises(
        ModelError, match=r"Expected a model folder with a detector.json, found none at .*nowhere; name"
    ):
        Detector.from_pretrained(tmp_path / "nowhere")
    detector = Detector(create_unet("xs"), create_scheduler("v_prediction"), features, make_settings("xs"), SHAPE)
    detector.calibrate([good_image(0), good_image(1)], [good_image(2)])
    detector.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "detector.json"
    whole = path.read_text()

    path.write_text(json.dumps({**json.loads(whole), "format_version": 99}))
    with pytest.raises(ModelError, match=r"Expected model format 1 in .*, found 99; update ddad"):
        read_record(tmp_path / "model")
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"Expected a complete .*detector.json, found a damaged one"):
        Detector.from_pretrained(tmp_path / "model")
    path.write_text(whole)
    statistics = tmp_path / "model" / "statistics.safetensors"
    kept = statistics.read_bytes()
    statistics.unlink()
    with pytest.raises(ModelError, match="Expected the network, its scheduler and statistics in"):
        Detector.from_pretrained(tmp_path / "model")
    statistics.write_bytes(kept)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="Expected the network, its scheduler and statistics in"):
        Detector.from_pretrained(tmp_path / "model")
