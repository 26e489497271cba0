"""One network for many categories: labels, files, resuming, what people type. pytest tests/test_family.py"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import ddad.fit_family
from ddad.cli import app
from ddad.config import make_settings
from ddad.data.samples import content_hash
from ddad.detector import Detector, read_record
from ddad.errors import ConfigError, DataError, Interrupted, ModelError
from ddad.family import Family, check_files, read_family
from ddad.fit_family import EvenDraw, load_categories, train_family
from ddad.unet import create_unet, for_category, predict
from tiny import SHAPE, photo, write_photos

STEPS = 3


def tiny(**changes):
    training = {"batch_size": 2, "precision": "fp32"}
    return make_settings("xs", image_size=SHAPE[0], false_alarms=0.2, training=training, **changes)


def striped(seed):
    """A product that nobody takes for the plain one of `tiny`."""
    pixels = photo(seed, 150).astype(int)
    pixels[::4] -= 100
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module", autouse=True)
def little_is_measured():
    """A time budget is not kept to the second in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddad.fit_family, "_TIMED", 2)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two categories: one in MVTec layout, one a plain folder of fewer photographs."""
    root = tmp_path_factory.mktemp("lines")
    for part in ("train/good", "test/good", "test/spot"):
        (root / "striped" / part).mkdir(parents=True)
    for seed in range(14):
        Image.fromarray(striped(seed)).save(root / "striped/train/good" / f"{seed:03d}.png")
    for seed in range(100, 103):
        Image.fromarray(striped(seed)).save(root / "striped/test/good" / f"{seed:03d}.png")
        spotted = striped(seed + 50)
        spotted[8:16, 8:16] = 255
        Image.fromarray(spotted).save(root / "striped/test/spot" / f"{seed:03d}.png")
    write_photos(root / "plain", range(7))
    return root


@pytest.fixture(scope="module")
def family_folder(root, tmp_path_factory):
    return train_family(root, tmp_path_factory.mktemp("models") / "family", tiny(), steps=STEPS)


@pytest.fixture(scope="module")
def family(family_folder):
    return Family.from_pretrained(family_folder, device="cpu")


def mixed():
    """Photographs of both categories, in turn, each with a spot."""
    images = [striped(200 + seed) if seed % 2 else photo(200 + seed) for seed in range(5)]
    for image in images:
        image[6:26, 6:16] = 255
    return images


def scores(results):
    return [result.anomaly_score for result in results]


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_label_reaches_the_network():
    torch.manual_seed(0)
    unet = create_unet("xs", categories=2).eval()
    sample, timesteps = torch.randn(2, 3, *SHAPE), torch.tensor([50, 100])
    with torch.no_grad():
        one, two = (predict(unet, sample, timesteps, torch.full((2,), label)) for label in (0, 1))
        both = predict(unet, sample, timesteps, torch.tensor([0, 1]))
    assert (one - two).abs().max() > 1e-3
    torch.testing.assert_close(both, torch.stack([one[0], two[1]]))


def test_a_category_becomes_a_network_of_its_own():
    torch.manual_seed(0)
    unet = create_unet("xs", categories=3).eval()
    sample, timesteps = torch.randn(2, 3, *SHAPE), torch.tensor([50, 100])
    with torch.no_grad():
        for label in (0, 2):
            expected = predict(unet, sample, timesteps, torch.full((2,), label))
            torch.testing.assert_close(predict(for_category(unet, label), sample, timesteps), expected)


@pytest.mark.slow
def test_training_told_other_labels_gives_another_network(root, family_folder, tmp_path):
    told, untold = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (family_folder, train_family(root, tmp_path / "untold", tiny(), steps=STEPS, conditional=False))
    )
    assert (len(told["class_embedding.weight"]), len(untold["class_embedding.weight"])) == (2, 1)
    assert read_family(tmp_path / "untold")["categories"] == {"plain": 0, "striped": 0}
    assert any(not torch.equal(told[name], untold[name]) for name in told if "class_embedding" not in name)


@pytest.mark.parametrize("counts", [[12, 4, 3], [5, 7], [6, 6], [1, 9]])
def test_no_category_starves_and_none_of_its_photographs_is_preferred(counts):
    images = list(range(sum(counts)))
    drawn = EvenDraw(images, counts)
    assert len(drawn) == len(drawn.members)
    of_category = np.repeat(np.arange(len(counts)), counts)
    assert [of_category[drawn[place]] for place in range(len(drawn))] == drawn.members
    times = np.bincount([drawn[place] for place in range(len(drawn))])
    for number in range(len(counts)):
        assert len(set(times[of_category == number])) == 1
    places = np.bincount(drawn.members)
    assert places.min() > 0.66 * places.max()


# -- use ---------------------------------------------------------------------------------------------------------------


def test_the_category_is_seen_in_the_photograph(family):
    assert family.categories == ("plain", "striped")
    found = [family.infer_category(image) for image in mixed()]
    assert found == ["plain", "striped"] * 2 + ["plain"]
    assert [result.category for result in family.predict(mixed(), batch_size=3)] == found


def test_a_score_depends_on_its_own_photograph_only(family):
    images = mixed()
    alone = [family.predict(image).anomaly_score for image in images]
    assert max(alone[::2]) > 0 < max(alone[1::2])
    for batch_size in (2, 5):
        np.testing.assert_allclose(scores(family.predict(images, batch_size)), alone, rtol=1e-4)
    own = [family.predict(image, category="plain").anomaly_score for image in images[::2]]
    np.testing.assert_allclose(own, alone[::2], rtol=1e-4)


def test_each_category_is_judged_by_its_own_calibration_and_label(family, root):
    image = photo(300)
    as_plain, as_striped = (family.predict(image, category=name) for name in family.categories)
    assert (as_plain.category, as_striped.category) == ("plain", "striped")
    assert as_plain.anomaly_score != as_striped.anomaly_score
    for name, folder in (("plain", root / "plain"), ("striped", root / "striped/train/good")):
        detector = family.detector(name)
        by_hash = {content_hash(path): path for path in folder.iterdir()}
        assert as_plain.threshold == family.detector("plain").calibration.threshold
        ranked = [by_hash[digest] for digest in detector.record["data"]["calibration"]]
        np.testing.assert_allclose(sorted(scores(detector.predict(ranked))), detector.calibration.scores, rtol=1e-4)
    assert family.detector("plain").unet is family.detector("striped").unet
    reconstructions = [family.detector(name).reconstruct([image]) for name in family.categories]
    assert (reconstructions[0] - reconstructions[1]).abs().max() > 1e-4


def test_a_category_saved_as_a_model_scores_the_same(family, tmp_path):
    family.detector("striped").save_pretrained(tmp_path / "striped")
    model = Detector.from_pretrained(tmp_path / "striped", device="cpu")
    assert model.label is None
    assert model.unet.config.num_class_embeds is None
    images = [striped(400), striped(401)]
    expected = family.predict(images, category="striped")
    np.testing.assert_allclose(scores(model.predict(images)), scores(expected), rtol=1e-4)
    assert model.predict(images[0]).category is None
    card = (tmp_path / "striped" / "README.md").read_text()
    assert "| the network was trained for | plain, striped |" in card
    assert "| adaptation | The features are not adapted, since all categories share them. |" in card


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_family_is_a_folder_without_pickle(family_folder):
    files = sorted(path.relative_to(family_folder).as_posix() for path in family_folder.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "categories/plain/detector.json",
        "categories/plain/statistics.safetensors",
        "categories/striped/detector.json",
        "categories/striped/statistics.safetensors",
        "family.json",
        "features/config.json",
        "features/model.safetensors",
        "gallery.safetensors",
        "scheduler/scheduler_config.json",
        "training.jsonl",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    record = read_family(family_folder)
    assert set(record["files"]) == set(files) - {"README.md", "family.json", "training.jsonl"}
    assert record["categories"] == {"plain": 0, "striped": 1}
    training = record["training"]
    assert (training["steps"], training["conditional"]) == (STEPS, True)
    assert training["places"] == {"plain": 10, "striped": 8}  # 5 photographs twice, 8 once
    assert training["held_out_loss"] > 0
    card = (family_folder / "README.md").read_text()
    assert "# Anomaly detector for plain, striped" in card
    assert card.count("good calibration images") == 2


def test_saved_and_loaded_again_it_is_the_same(family, family_folder, tmp_path):
    family.save_pretrained(tmp_path / "copy")
    again = Family.from_pretrained(tmp_path / "copy", device="cpu")
    assert scores(again.predict(mixed())) == scores(family.predict(mixed()))
    first, second = (read_family(folder) for folder in (family_folder, tmp_path / "copy"))
    assert first == second
    assert check_files(tmp_path / "copy")
    (tmp_path / "copy" / "categories" / "plain" / "detector.json").write_text("{}")
    with pytest.raises(ModelError, match=r"found that categories/plain/detector\.json differs; copy the family again"):
        check_files(tmp_path / "copy")


def interrupted_at(step):
    """What a stop does to `train_family` at a step, whoever sends it."""
    plain = ddad.fit_family.Trainer.run

    def run(trainer, *arguments, on_progress, **options):
        def progress(event):
            on_progress(event)
            if event.step == step:
                raise Interrupted(f"step {step}")

        plain(trainer, *arguments, on_progress=progress, save_every_seconds=0.0, **options)

    return run


def test_resumed_equals_uninterrupted_bit_for_bit(root, family_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ddad.fit_family.Trainer, "run", interrupted_at(2))
        with pytest.raises(Interrupted):
            train_family(root, tmp_path / "resumed", tiny(), steps=STEPS)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(ConfigError, match=r"Expected the command that began the run in .*, found changes in settings"):
        train_family(root, tmp_path / "resumed", tiny(seed=1), steps=STEPS)
    said = []
    resumed = train_family(root, tmp_path / "resumed", tiny(), steps=STEPS, on_stage=said.append)
    assert "Resuming after step 1 of 3." in said
    assert not (tmp_path / "resumed.run").exists()
    weights = [
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (family_folder, resumed)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in ("plain", "striped"):
        records = [read_record(folder / "categories" / name) for folder in (family_folder, resumed)]
        assert records[0]["calibration"] == records[1]["calibration"]
    assert [json.loads(line)["step"] for line in (resumed / "training.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_finished_family_is_not_trained_again_and_another_is_refused(root, family_folder, tmp_path):
    said = []
    assert train_family(root, family_folder, tiny(), steps=STEPS, on_stage=said.append) == family_folder
    assert said == [f"{family_folder} is already trained with these settings on these images; nothing to do."]
    with pytest.raises(
        ConfigError, match=r"trained with other budget\.steps \(3 before, 4 now\); choose another --out"
    ):
        train_family(root, family_folder, tiny(), steps=4)
    shutil.copytree(root, tmp_path / "lines")
    (tmp_path / "lines" / "plain" / "000.png").unlink()
    write_photos(tmp_path / "lines" / "more", range(20, 26))
    with pytest.raises(ConfigError) as refused:
        train_family(tmp_path / "lines", family_folder, tiny(), steps=STEPS)
    assert "categories (plain, striped before, more, plain, striped now), the good images of plain;" in str(
        refused.value
    )
    with pytest.raises(
        ConfigError, match=r"Expected a new folder for the family, found .*plain, which is something els"
    ):
        train_family(root, root / "plain", tiny(), steps=STEPS)


@pytest.mark.slow
def test_a_time_budget_gives_the_steps(root, tmp_path):
    estimates = []
    out = train_family(root, tmp_path / "family", tiny(), time_budget=12, on_estimate=estimates.append)
    assert read_family(out)["training"]["steps"] == estimates[0].steps > 10
    with pytest.raises(
        ConfigError, match="Expected a time budget for at least 10 training steps, found 0 s, which allow"
    ):
        train_family(root, tmp_path / "other", tiny(), time_budget=0.3)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_what_is_no_folder_of_categories_is_refused_in_a_sentence(root, tmp_path):
    with pytest.raises(ConfigError, match=r"Expected categories among plain, striped in .*, found 'round'\."):
        load_categories(root, ["plain", "round"])
    with pytest.raises(
        ConfigError, match=r"at least two different categories in .*, found plain; name others, or leave"
    ):
        load_categories(root, ["plain"])
    with pytest.raises(ConfigError, match=r"at least two different categories in .*, found plain, plain; name others"):
        load_categories(root, ["plain", "plain"])
    with pytest.raises(
        DataError, match=r"expected a folder for each category, but found one category, with train in it"
    ):
        load_categories(root / "striped")
    shutil.copytree(root, tmp_path / "lines")
    for path in sorted((tmp_path / "lines" / "plain").iterdir())[3:]:
        path.unlink()
    with pytest.raises(
        DataError, match=r"^plain: expected at least 5 different images of good parts, but found 3; add"
    ):
        train_family(tmp_path / "lines", tmp_path / "family", tiny(), steps=STEPS)


def test_several_processes_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Expected one process to train many categories, found 2; start it without"):
        train_family(root, tmp_path / "family", tiny(), steps=STEPS)


def test_what_is_no_family_is_refused_in_a_sentence(family_folder, tmp_path):
    with pytest.raises(ModelError, match=r"Expected the folder of a family, with a family\.json, found none at"):
        Family.from_pretrained(tmp_path)
    broken = tmp_path / "family"
    shutil.copytree(family_folder, broken)
    record = read_family(broken)

    def changed(**values):
        (broken / "family.json").write_text(json.dumps({**record, **values}))
        return broken

    with pytest.raises(ModelError, match=r"Expected family format 1 in .*, found 2; update ddad\."):
        Family.from_pretrained(changed(format_version=2))
    for names in ({"../plain": 0}, {"..": 0}, {}, ["plain"]):
        with pytest.raises(ModelError, match=r"Expected a complete .*family\.json, found a damaged one; copy or train"):
            Family.from_pretrained(changed(categories=names))
    for values in ({"categories": {"plain": 2}}, {"shape": [64, 64]}, {"categories": {"plain": 0, "none": 1}}):
        with pytest.raises(ModelError, match="Expected a"):
            Family.from_pretrained(changed(**values))
    (broken / "gallery.safetensors").unlink()
    with pytest.raises(ModelError, match=r"Expected a complete family in .*, found something else \(.*gallery"):
        Family.from_pretrained(changed())


def test_a_device_that_is_not_there_is_no_fault_of_the_family(family_folder):
    with pytest.raises(ConfigError, match="Expected a device of this machine, found cuda:9;"):
        Family.from_pretrained(family_folder, device="cuda:9")


def test_a_detector_says_what_a_family_is(family_folder):
    with pytest.raises(
        ModelError, match=r"Expected a model of one category, found a family of many in .*; ddad predict"
    ):
        Detector.from_pretrained(family_folder)
    with pytest.raises(
        ModelError, match=r"found one category of the family in .*; name that folder, and --category plain"
    ):
        Detector.from_pretrained(family_folder / "categories" / "plain")


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_predict_takes_a_family_and_infers_the_category_or_is_told(root, family_folder, tmp_path):
    said = run("predict", family_folder, root / "striped/test", root / "plain/000.png", "--out", tmp_path / "inferred")
    assert "7 images" in said
    assert " as striped (score " in said
    rows = [json.loads(line) for line in (tmp_path / "inferred" / "results.jsonl").read_text().splitlines()]
    assert [row["category"] for row in rows] == ["striped"] * 6 + ["plain"]
    image = root / "striped/test/good/100.png"
    run("predict", family_folder, image, "--out", tmp_path / "told", "--category", "plain")
    (row,) = [json.loads(line) for line in (tmp_path / "told" / "results.jsonl").read_text().splitlines()]
    assert row["category"] == "plain"
    assert row["threshold"] == read_record(family_folder / "categories" / "plain")["calibration"]["threshold"]


def test_evaluate_and_info_take_a_family(root, family_folder, tmp_path):
    run("evaluate", family_folder, root / "striped", "--category", "striped", "--out", tmp_path / "judged")
    metrics = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    assert metrics["counts"] == {"good": 3, "defective": 3}
    said = run("info", family_folder)
    assert "plain, striped" in said
    assert said.count("good calibration image") == 2
    assert json.loads(run("info", family_folder, "--json"))["categories"] == {"plain": 0, "striped": 1}


def test_mistakes_on_the_command_line(root, family_folder, tmp_path, mistake):
    image, out = root / "plain/000.png", ("--out", tmp_path / "out")
    told = mistake("predict", family_folder, image, *out, "--category", "round")
    assert "Expected a category among plain, striped, found 'round'." in told
    told = mistake("evaluate", family_folder, root / "striped", *out)
    assert "Expected --category with one of plain, striped, found none." in told
    told = mistake("predict", family_folder, image, *out, "--fast")
    assert "Expected neither --fast nor another --backend or --precision for a family" in told
    told = mistake("predict", tmp_path, image, *out, "--category", "plain")
    assert "Expected a family for --category, found a model of one" in told
    told = mistake("train", root, *out, "--categories", "all", "--log-with", "tensorboard")
    assert "Expected no --log-with beside --categories" in told
    assert "found a family of many" in mistake("serve", family_folder)


@pytest.mark.slow
def test_train_with_categories(root, tmp_path):
    small = ("--steps", 2, "--image-size", 32, "--false-alarms", "20%")
    said = run("train", root, "--out", tmp_path / "family", "--categories", "striped,plain", *small)
    assert "Family written to" in said
    assert read_family(tmp_path / "family")["categories"] == {"striped": 0, "plain": 1}
