"""The longer comparison: who runs, at which rate and for how long; and a run that was cut off ends as one that was not."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import long_runs  # noqa: E402
import quality  # noqa: E402
import quality_tables  # noqa: E402

import ld_eval  # noqa: E402


def test_every_network_runs_at_its_own_rate_for_the_same_time():
    asked, known = list(long_runs.runs()), quality.records()
    assert {run.network for run in asked} == set(long_runs.RECIPES)
    for run in asked:
        if run.lr != 1e-4:
            assert run.lr == quality.best_rate(known, long_runs.SHORT, run.network, run.recipe)
        share = quality.step_share(32, run.network, run.recipe)
        assert run.steps * share == pytest.approx(long_runs.STUDY.steps, rel=0.005)
    assert [run.network for run in asked if run.lr == 1e-4] == ["relaxation spec"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """run(name, stop): a short run in a folder of that name, cut off after `stop` parts; returns its record."""
    monkeypatch.setitem(quality.SETS, "cats", ("none", 8))
    monkeypatch.setattr(long_runs, "PARTS", 2)
    monkeypatch.setattr(long_runs, "SCORED", (1, 2))
    images = torch.randint(256, (320, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    real = ld_eval.features(quality.held_out(images)[0])
    run = quality.Run("cats", quality.DEFAULT, 1e-2, steps=6, recipe="muon")

    class Cut(Exception):
        pass

    def go(name, stop=None):
        monkeypatch.setattr(long_runs, "RESULTS", tmp_path / name)
        (tmp_path / name).mkdir(exist_ok=True)
        written = []

        def write(path, record):
            quality.write(path, record)
            written.append(record)
            if len(written) == stop:
                raise Cut

        with monkeypatch.context() as patch:
            patch.setattr(long_runs, "write", write)
            try:
                long_runs.go(run, images, real, tmp_path / name)
            except Cut:
                assert stop
        return json.loads((tmp_path / name / f"{run.name}.json").read_text())

    return go


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(small):
    whole, half = small("whole"), small("cut", stop=1)
    assert half["done"] == 1 and set(half["points"]) == {"1"}
    again = small("cut")
    assert again["points"] == whole["points"] and again["done"] == 2 and again["cpu_seconds"] > half["cpu_seconds"]
    assert small("cut") == again  # nothing is left to do


def test_the_table_has_the_lowest_last_distance_first(tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs, "RESULTS", tmp_path)
    monkeypatch.setattr(long_runs, "HELD_OUT", tmp_path / "held-out" / "32.json")
    quality.write(long_runs.HELD_OUT, dict(frechet=4.2))
    for network, distances in (("unet", {"1": 30.0, "8": 20.0}), ("ours", {"1": 40.0, "8": 10.0}), ("new", {})):
        points = {n: dict(frechet=d, mse=d / 100) for n, d in distances.items()}
        run = dict(network=network, recipe="muon", lr=8e-3, steps=2000, seed=0, points=points)
        quality.write(tmp_path / f"{network}.json", run)
    lines = quality_tables.long_table({"unet": "U-Net"}, {"muon": "Muon"}).splitlines()
    assert lines[2:4] == [
        "| ours | Muon | 0.008 | 2,000 | 0 | 40.0 |  |  | 10.0 | 0.1000 |",
        "| U-Net | Muon | 0.008 | 2,000 | 0 | 30.0 |  |  | 20.0 | 0.2000 |",
    ]
    assert lines[5:] == ["As many held-out pictures score 4.2."]
    curve = quality_tables.long_curves()["ours, muon, 0.008, seed 0"]
    first, last = curve
    assert curve == {first: 40.0, last: 10.0} and last == pytest.approx(8 * first)
    steps = quality.step_seconds(32)[-1]["ours, adamw"]
    assert 60 * last == pytest.approx(long_runs.STUDY.steps * sorted(steps)[len(steps) // 2])
