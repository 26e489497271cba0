"""benchmarks/scale.py: the simulated clock, the fit of logs, real runs in small. pytest tests/test_scale_script.py"""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ddad.bulk.crew import MOST_LOSSES
from ddad.bulk.job import JOB, LOG
from ddad.errors import ConfigError, DataError

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "scale.py"
specification = importlib.util.spec_from_file_location("scale", SCRIPT)
assert specification
assert specification.loader
scale = importlib.util.module_from_spec(specification)
sys.modules["scale"] = scale  # dataclasses look there
specification.loader.exec_module(scale)

Costs, simulate = scale.Costs, scale.simulate
FIRST = datetime(2026, 11, 25, 18, 0, tzinfo=UTC)


def call(*arguments):
    """As a process of its own."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def run(*arguments):
    return scale.main([str(argument) for argument in arguments])


def mean_wall(images, size, workers, costs, seeds=8):
    """Infinite where shards were given up."""
    outcomes = [simulate(images, size, workers, costs, seed) for seed in range(seeds)]
    return statistics.mean(math.inf if outcome.given_up else outcome.wall for outcome in outcomes)


def test_without_overhead_and_losses_the_time_is_ideal():
    outcome = simulate(4000, 10, 4, Costs(0.5))
    assert outcome.wall == pytest.approx(500)
    assert outcome.share("useful") == pytest.approx(1)
    assert outcome.losses == 0


def test_the_last_shard_is_smaller_and_keeps_others_waiting():
    outcome = simulate(25, 10, 2, Costs(1))
    assert outcome.finished == [(10, 0), (10, 1), (15, 2)]
    assert (outcome.useful, outcome.idle) == (25, 5)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(
    "costs",
    [
        Costs(0.1),
        Costs(0.1, overhead=0.5, gap=0.01, start_up=30, spread=0.3),
        Costs(0.1, overhead=0.5, gap=0.01, start_up=30, spread=0.3, preemptions_per_hour=60, slow_share=0.25),
        Costs(0.1, overhead=1, start_up=5, preemptions_per_hour=100, slow_share=0.5, slow_factor=4),
    ],
)
def test_each_shard_is_done_once_and_all_time_is_accounted_for(costs, size, local):
    crew = scale.Simulated(8, costs, lambda shard: min(size, 2000 - shard * size), seed=1, local=local)
    outcome = scale.run_simulated(crew, range(-(-2000 // size)))
    shards = [shard for _, shard in outcome.finished] + outcome.given_up
    assert sorted(shards) == list(range(-(-2000 // size)))
    spent = outcome.useful + outcome.overhead + outcome.lost + outcome.starting + outcome.idle
    assert spent == pytest.approx(8 * outcome.wall)
    moments = [moment for moment, _ in outcome.finished]
    assert moments == sorted(moments)


def test_the_same_seed_gives_the_same_run():
    costs = Costs(0.1, overhead=0.5, spread=0.2, preemptions_per_hour=20, start_up=10)
    one, again, other = (simulate(5000, 50, 10, costs, seed) for seed in (3, 3, 4))
    assert one == again
    assert one.finished != other.finished


def test_lost_shards_come_last_as_in_the_real_loop():
    costs = Costs(1, start_up=5)
    crew = scale.Simulated(1, costs, lambda shard: 10, losses=[(20, 1)])
    outcome = scale.run_simulated(crew, range(4))
    assert outcome.finished == [(15, 0), (35, 2), (45, 3), (55, 1)]  # lost at 20, another worker is ready at 25
    assert (outcome.lost, outcome.starting, outcome.losses, outcome.elsewhere) == (5, 10, 1, 0)
    crew = scale.Simulated(1, Costs(1, start_up=15), lambda shard: 10, losses=[(20, 0)])  # it would be done at 25
    assert scale.run_simulated(crew, range(2)).finished == [(45, 1), (55, 0)]


def test_local_processes_have_their_shard_while_they_start():
    crew = scale.Simulated(1, Costs(1, start_up=5), lambda shard: 10, losses=[(2, 0), (20, 2)], local=True)
    outcome = scale.run_simulated(crew, range(3))
    # The first is lost while it starts with shard 0, the second has shard 1 until 17 and then shard 2 for 3 seconds.
    assert outcome.finished == [(17, 1), (35, 0), (45, 2)]
    assert (outcome.starting, outcome.lost, outcome.idle, outcome.elsewhere) == (12, 3, 0, 0)


def test_a_recorded_loss_meets_the_nearest_shard_where_nobody_has_the_one():
    crew = scale.Simulated(2, Costs(1, start_up=5), lambda shard: 10, losses=[(2, 0), (7, 9)])
    outcome = scale.run_simulated(crew, range(4))
    assert outcome.elsewhere == 2  # at 2 all are starting, at 7 shard 9 is not begun
    assert outcome.losses == 1
    assert outcome.finished[-1][1] == 1


def test_shards_too_long_for_the_machines_are_given_up_as_in_the_real_loop():
    # One in e shards of an hour survives an hour; so (1 - 1/e)^5 = 10 % are lost five times.
    outcome = simulate(400_000, 1000, 20, Costs(3.6, preemptions_per_hour=1))
    expected = 400 * (1 - math.exp(-1)) ** MOST_LOSSES
    assert 0.6 * expected < len(outcome.given_up) < 1.4 * expected


def test_shards_queue_for_the_driver():
    outcome = simulate(10_000, 1, 100, Costs(0.1, gap=0.01))
    assert outcome.wall == pytest.approx(100, rel=0.01)  # not 10: it hands out a hundred a second
    assert outcome.share("overhead") > 0.8


@pytest.mark.parametrize("workers", [1, 10])
@pytest.mark.parametrize(
    "costs",
    [
        Costs(0.1, overhead=3, gap=0.01, start_up=60, spread=0.1),
        Costs(0.1, overhead=3, gap=0.01, start_up=60, spread=0.1, preemptions_per_hour=5),
        Costs(0.1, overhead=3, gap=0.01, start_up=60, spread=0.1, slow_share=0.2, slow_factor=3),
    ],
)
def test_the_closed_form_agrees(costs, workers):
    images = 400_000  # about 500 losses, so that chance counts little
    for size in (200, 500):
        expected = scale.approximate_wall(images, size, workers, costs)
        assert mean_wall(images, size, workers, costs) == pytest.approx(expected, rel=0.02)


def test_the_rule_finds_the_best_size_and_it_moves_the_right_way():
    images, workers = 300_000, 5
    costs = Costs(0.1, overhead=2, spread=0.2, preemptions_per_hour=0.5, start_up=10)
    sizes = [100, 200, 400, 800, 1600, 3200]

    def best(costs):
        return min(sizes, key=lambda size: mean_wall(images, size, workers, costs, seeds=2))

    rule, found = scale.best_size(images, workers, costs), best(costs)
    assert found / 3 < rule < found * 3
    assert mean_wall(images, round(rule), workers, costs) < 1.01 * mean_wall(images, found, workers, costs)
    for changed, larger in (
        (replace(costs, overhead=20), True),
        (replace(costs, overhead=0.05), False),
        (replace(costs, preemptions_per_hour=20), False),
    ):
        assert (scale.best_size(images, workers, changed) > rule) is larger
        assert best(changed) > found if larger else best(changed) < found
    assert scale.best_size(10 * images, workers, costs) > rule  # the end weighs less


def test_stragglers_make_the_end_longer_where_shards_are_large():
    even, slow = Costs(0.1), Costs(0.1, slow_share=0.1, slow_factor=4)
    over = {
        size: simulate(100_000, size, 20, slow).wall / scale.ideal_wall(100_000, 20, slow) for size in (10, 100, 1000)
    }
    assert 1 <= over[10] < over[100] < over[1000]
    assert simulate(100_000, 1000, 20, even).wall < 0.5 * simulate(100_000, 1000, 20, slow).wall * over[1000]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"seconds_per_image": 0}, "seconds_per_image"),
        ({"seconds_per_image": 1, "overhead": -1}, "overhead"),
        ({"seconds_per_image": 1, "slow_factor": 0.5}, "slow_factor"),
        ({"seconds_per_image": math.inf}, "seconds_per_image"),
    ],
)
def test_impossible_costs_are_refused(values, name):
    with pytest.raises(ConfigError, match=rf"^Expected {name} to be a number .*, found {values[name]}\.$"):
        Costs(**values)


def write_log(out, outcome_of, images, size, workers, costs, began=FIRST, seed=0, losses=()):
    """The folder that `ddad score` would have left, had it taken the time that the simulation did."""
    crew = scale.Simulated(workers, costs, lambda shard: min(size, images - shard * size), seed, losses)
    lines = []
    submit, lose = crew.submit, crew._lose
    holder, generation = {}, dict.fromkeys(range(workers), 0)

    def submitted(task):
        worker = crew._free[-1]
        submit(task)
        holder[task] = f"host:{worker}.{generation[worker]}", crew.now + costs.gap

    def lost(worker):
        task, result = lose(worker)
        generation[worker] += 1
        lines.append({"time": began + timedelta(seconds=crew.now), "shard": task, "lost": result.reason})
        return task, result

    crew.submit, crew._lose = submitted, lost
    with crew:
        for shard, _ in scale.drive(crew, range(-(-images // size)), lambda shard, reason: None):
            worker, begin = holder[shard]
            count = crew._images(shard)
            lines.append(
                {"time": began + timedelta(seconds=crew.now), "shard": shard, "images": count, "worker": worker}
                | {"seconds": crew.now - begin, "bytes_read": 3000 * count, "bytes_written": 150 * count}
            )
    (out / LOG).mkdir(parents=True)
    (out / JOB).write_text(json.dumps({"images": images, "shard_size": size}))
    text = "".join(json.dumps(line | {"time": line["time"].isoformat()}) + "\n" for line in lines)
    (out / LOG / f"{began:%Y%m%dT%H%M%SZ}-host-1.jsonl").write_text(text + '{"time": "2026-')  # killed meanwhile
    return outcome_of(crew)


def test_a_fit_finds_the_costs_that_made_the_logs(tmp_path):
    costs = Costs(0.04, overhead=0.3, gap=0.02, start_up=7, spread=0.02)
    jobs = []
    for size in (4, 16, 64):
        write_log(tmp_path / f"{size}", lambda crew: None, 2048, size, 1, costs, seed=size)
        jobs.append(scale.read_job(tmp_path / f"{size}"))
    found = scale.fit(jobs)
    assert found["seconds_per_image"] == pytest.approx(0.04, rel=0.01)
    assert found["overhead"] == pytest.approx(0.3, rel=0.02)
    assert abs(found["overhead"] - 0.3) < 4 * found["overhead_error"]
    assert found["gap"] == pytest.approx(0.02, rel=0.01)
    assert found["start_up"] == pytest.approx(7.02, rel=0.01)  # with the first gap
    assert found["spread"] == pytest.approx(0.02, rel=0.5)
    assert (found["bytes_read"], found["bytes_written"]) == (3000, 150)
    assert [run["workers"] for run in found["runs"]] == [1] * 3
    assert scale.costs_of(found).overhead == found["overhead"]


def test_a_check_foresees_a_job_with_losses_from_a_fit_of_others(tmp_path, capsys):
    costs = Costs(0.04, overhead=0.3, gap=0.02, start_up=7, spread=0.02)
    for size in (16, 64):
        write_log(tmp_path / f"{size}", lambda crew: None, 4096, size, 1, costs, seed=size)
    losses = [(30.0, 10), (41.0, 20), (60.0, 33)]
    wall = write_log(tmp_path / "real", lambda crew: crew.outcome.wall, 5000, 50, 3, costs, seed=9, losses=losses)
    fitted, checked = tmp_path / "fit.json", tmp_path / "check.json"
    assert run("fit", tmp_path / "16", tmp_path / "64", "--json", fitted) == 0
    assert run("check", tmp_path / "real", "--fit", fitted, "--engine", "ray", "--json", checked) == 0
    by_fit, by_itself = json.loads(checked.read_text())
    assert (by_fit["workers"], by_fit["shards"], by_fit["losses"]) == (3, 100, 3)
    assert by_fit["wall"] == pytest.approx(wall, abs=0.01)
    assert abs(by_fit["error"]) < 0.03
    assert abs(by_itself["error"]) < 0.03
    assert by_fit["completion_error"] < 0.03 * wall
    capsys.readouterr()
    assert run("simulate", "--fit", fitted, "--images", 5000, "--workers", 3, "--sizes", "50,5000") == 0
    printed = capsys.readouterr().out
    assert printed.count("| 50 | 100 |") == 3
    assert printed.count("best by the rule") == 3


def test_the_table_says_where_the_loop_would_end(capsys):
    options = ["--images", 10_000, "--workers", 10, "--sizes", "10,1000", "--preemptions-per-hour", "10"]
    assert run("simulate", "--seconds-per-image", 36, *options) == 0
    printed = capsys.readouterr().out
    assert "| 1,000 | 10 | ends: Expected workers that do tasks," in printed
    assert "| 10 | 1,000 | 1" in printed


def test_runs_of_a_job_follow_each_other(tmp_path):
    costs = Costs(0.04)
    write_log(tmp_path / "job", lambda crew: None, 1000, 10, 1, costs)
    job = scale.read_job(tmp_path / "job")
    (log,) = job.logs
    first = replace(log, shards=log.shards[:60])
    # Another driver went on, a minute later, and logs from its own beginning.
    second = replace(
        log, began=log.began + 100, shards=[line | {"moment": line["moment"] - 24} for line in log.shards[60:]]
    )
    one, other = scale.compare(replace(job, logs=[first, second]), costs)
    assert one.predicted_wall == pytest.approx(one.wall)
    assert other.predicted_wall == pytest.approx(other.wall)
    with pytest.raises(DataError, match=r"^Expected runs of .* one after another, found two at the same time; check"):
        scale.compare(replace(job, logs=[first, replace(second, began=log.began + 10)]), costs)


def test_mistakes_end_in_one_sentence(tmp_path, capsys):
    (tmp_path / LOG).mkdir(parents=True)
    for arguments, sentence in (
        (("fit", tmp_path), f"Expected a job of ddad score in {tmp_path}, with {JOB} and {LOG}/*.jsonl, found none"),
        (("simulate", "--images", 1, "--workers", 1), "Expected --fit or --seconds-per-image, found neither;"),
        (
            ("simulate", "--images", 0, "--workers", 1, "--seconds-per-image", 1),
            "Expected images of at least 1, found 0.",
        ),
        (("check", tmp_path, "--fit", tmp_path / "no.json"), f"Expected a fit in {tmp_path / 'no.json'}, found none;"),
        (
            ("parts", "--only", "decode"),
            "Expected PHOTOS to make larger ones of for decode, found none; name a folder.",
        ),
    ):
        assert run(*arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith(sentence)
        assert said.count("\n") == 1
    (tmp_path / JOB).write_text('{"images": 10, "shard_size": 5}')
    with pytest.raises(DataError, match="at least one finished shard"):
        scale.read_job(tmp_path)


@pytest.mark.slow
def test_real_runs_are_fitted_and_foreseen(tmp_path):
    from tiny import train_model, write_photos

    photos = write_photos(tmp_path / "good", range(40))
    model = train_model(photos, tmp_path / "tile")
    runs = tmp_path / "runs"
    done = call("run", model, photos, runs, "--sizes", "4,32", "--images", 128)
    assert done.returncode == 0, done.stderr
    assert "128 photographs in" in done.stdout
    assert call("run", model, photos, tmp_path / "steady", "--sizes", "4,32", "--processor-time").returncode == 0
    steady = scale.fit([scale.read_job(tmp_path / "steady" / name) for name in ("4-0", "32-0")])
    assert steady["seconds_per_image"] > 0
    assert steady["overhead"] > 0
    options = ["--images", 600, "--workers", 2, "--kills", 2, "--kill-seconds", 4]
    done = call("run", model, photos, tmp_path / "killed", "--sizes", "20", *options)
    assert done.returncode == 0, done.stderr
    done = call("fit", runs / "4-0", runs / "32-0", "--json", tmp_path / "fit.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "fit.json").read_text())
    assert [run["shards"] for run in found["runs"]] == [32, 4]
    assert found["seconds_per_image"] > 0
    assert found["start_up"] > 0
    assert found["bytes_read"] > 100
    done = call(
        "check", tmp_path / "killed" / "20-0", "--fit", tmp_path / "fit.json", "--json", tmp_path / "check.json"
    )
    assert done.returncode == 0, done.stderr
    _, by_itself = json.loads((tmp_path / "check.json").read_text())
    assert by_itself["shards"] == 30
    assert abs(by_itself["error"]) < 0.5


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    from tiny import write_photos

    photos = write_photos(tmp_path / "good", range(4))
    options = ["--megapixels", "0.1,0.4", "--count", 2, "--rows", "2000,20000", "--files", 200, "--tasks", 200]
    done = call("parts", photos, *options, "--json", tmp_path / "parts.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "parts.json").read_text())
    small, large = found["decode"]
    assert small["ms"] < large["ms"]
    assert small["bytes"] < large["bytes"]
    assert [row["rows"] for row in found["listing"]] == [2000, 20000]
    assert found["listing"][1]["listing_bytes"] > 20_000 * 24  # random names do not compress below their content
    assert [row["shard_size"] for row in found["tables"]] == [100, 1000, 10_000]
    assert found["finished"]["files"] == 200
    assert found["loop"]["tasks_per_second"] > 1
