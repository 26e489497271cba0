"""pytest tests/test_ablation.py"""

import json
from pathlib import Path

import pytest

from ddad.ablation import VARIANTS, run_ablation, settings_of, spread_samples
from ddad.config import make_settings
from ddad.data.demo import write_demo_dataset
from ddad.data.samples import Sample
from ddad.detector import Detector
from ddad.errors import ConfigError, DataError
from ddad.fit import fit
from ddad.report import evaluate_folder

BY_NAME = {variant.name: variant for variant in VARIANTS}


def test_each_row_differs_from_the_published_one_by_what_it_says():
    trained = make_settings("xs")
    published = settings_of(BY_NAME["as published: both, adapted, n = 10"], trained)
    paper = make_settings("paper")
    assert published.sampling == paper.sampling
    assert published.scoring.model_copy(update={"features": paper.scoring.features}) == paper.scoring

    def differences(name):
        settings = settings_of(BY_NAME[name], trained)
        return {
            f"{group}.{key}"
            for group in ("sampling", "scoring")
            for key, value in getattr(settings, group).model_dump().items()
            if value != getattr(getattr(published, group), key)
        }

    assert differences("eta = 0") == {"sampling.eta"}
    assert differences("λ ≤ 1") == {"sampling.clamp"}
    assert differences("n = 25") == {"sampling.stride"}
    assert differences("units from good images") == {"scoring.fusion"}
    assert differences("unconditioned, pixel distance") == {
        "sampling.conditioning_weight", "scoring.layer_weights", "scoring.fusion",
    }  # fmt: skip
    assert settings_of(BY_NAME["all of ours"], trained) == trained
    assert len(BY_NAME) == len(VARIANTS)


def test_a_network_that_was_not_trained_that_far_is_refused():
    trained = make_settings("xs", sampling={"start_timestep": 100, "stride": 20})
    with pytest.raises(
        ConfigError, match=r"Expected a network trained up to timestep 225 for .*, found one trained up"
    ):
        settings_of(BY_NAME["eta = 0"], trained)


def test_samples_are_spread_over_kinds():
    samples = [Sample(Path(f"{kind}{i}"), kind) for kind, count in (("good", 30), ("hole", 60)) for i in range(count)]
    few = spread_samples(samples, 9)
    assert [sample.kind for sample in few] == ["good"] * 3 + ["hole"] * 6
    assert len({sample.path for sample in few}) == 9
    assert spread_samples(samples, None) == samples


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_demo_dataset(tmp_path_factory.mktemp("data") / "part", train=24, good=5, defective=5, size=32)


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory):
    settings = make_settings(
        "xs", image_size=32, false_alarms=0.3, training={"batch_size": 2}, adaptation={"epochs": 0}
    )
    return fit(parts, tmp_path_factory.mktemp("models") / "model", settings, steps=2)


def test_the_row_with_all_of_ours_is_the_model_itself(model, parts, tmp_path):
    wanted = ("as published: both, adapted, n = 10", "both, not adapted", "all of ours", "all of ours, not adapted")
    said = []
    table = run_ablation(model, parts, tmp_path, variants=[BY_NAME[name] for name in wanted], on_stage=said.append)
    rows = {row["variant"]: row for row in json.loads((tmp_path / "ablations.json").read_text())["rows"]}
    assert list(rows) == ["both, not adapted", "all of ours, not adapted"]  # the others are the same network here
    assert sum("left out, the same as" in sentence for sentence in said) == 2
    evaluation = evaluate_folder(Detector.from_pretrained(model), parts, tmp_path / "evaluation")
    for metric in ("image_auroc", "pixel_auroc", "aupro"):
        assert rows["all of ours, not adapted"][metric] == pytest.approx(evaluation.metrics[metric], abs=0.02)
    assert table == (tmp_path / "ablations.md").read_text()
    assert table.count("\n| ") == 3
    assert "5 good and 5 defective test images" in table


def test_other_good_images_are_refused(model, tmp_path):
    other = write_demo_dataset(tmp_path / "other", seed=1, train=8, good=2, defective=5, size=32)
    with pytest.raises(
        DataError, match=r"Expected the good images that .* was trained on in .*, found that some are mi"
    ):
        run_ablation(model, other, tmp_path)
