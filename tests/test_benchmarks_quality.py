"""The comparison's own arithmetic: which runs are asked for, which rate is called the best, what a table calls a difference."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality  # noqa: E402
from networks import FeatureShift, ld, small_networks  # noqa: E402
from quality import STEPS, Run  # noqa: E402


def record(run, mse, **values):
    return vars(run) | dict(mse=mse, mse_newest=mse, frechet=100 * mse, parameters=1) | values


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results; done(run, mse) puts a run into it."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    seconds = {"ours": [2.0, 4.0, 6.0], "unet": [1.0, 2.0, 1.0], "unet-attention": [2.0, 4.0, 6.0]}
    quality.write(tmp_path / "step-times.json", dict(seconds=seconds))
    return lambda run, mse: quality.write(tmp_path / "records" / f"{run.name}.json", record(run, mse))


def loss(lr, best):
    """A curve over rates with its lowest point at `best`."""
    return abs(torch.tensor(lr / best).log2().item()) + 1


@pytest.mark.parametrize(
    "best, extra", [(8e-3, []), (32e-3, [64e-3]), (128e-3, [64e-3, 128e-3, 256e-3]), (2e-3, [2e-3, 1e-3])]
)
def test_the_search_goes_on_until_the_best_rate_has_a_worse_one_on_either_side(results, best, extra):
    tried = []
    for run in quality.search("cats", "ours"):
        tried.append(run.lr)
        results(run, loss(run.lr, best))
    assert tried == pytest.approx([4e-3, 8e-3, 16e-3, 32e-3, *extra])
    assert quality.best_rate(quality.records(), "cats", "ours") == pytest.approx(best)


def test_a_rate_that_gave_no_finite_loss_is_never_the_best(results):
    for lr, mse in ((4e-3, float("nan")), (8e-3, 0.3), (16e-3, float("nan"))):
        results(Run("cats", "ours", lr), mse)
    assert quality.best_rate(quality.records(), "cats", "ours") == 8e-3


def test_equal_time_is_the_median_of_ratios_within_rounds(results):
    assert quality.steps_in_equal_time("unet") == 2 * STEPS
    assert quality.steps_in_equal_time("ours") == STEPS


def test_every_seed_is_run_at_each_familys_own_rate_in_equal_steps_and_in_equal_time(results):
    best = {"ours": 16e-3, "unet": 8e-3}
    asked = []
    for network in best:
        for run in quality.family("cats", network):
            if run not in asked:
                asked.append(run)
                results(run, loss(run.lr, best[run.network]))
    final = {(run.network, run.seed, run.steps) for run in asked if run.lr == best[run.network]}
    assert final == {(n, s, k) for s in (0, 1, 2) for n, k in (("ours", STEPS), ("unet", STEPS), ("unet", 2 * STEPS))}
    assert {run.seed for run in asked if run.lr != best[run.network]} == {0}
    unet = quality.comparison_table(quality.records(), "cats").splitlines()[3]
    scores = "1 (1 to 1) | 100 (100 to 100)"
    assert unet == f"| unet | 1 | 0.008 | 3 | {scores} | {2 * STEPS} x 3 | {scores} |"


def test_differences_are_taken_seed_by_seed():
    ours = {seed: dict(mse=0.1 * seed) for seed in (0, 1, 2)}
    other = {seed: dict(mse=0.1 * seed + 0.01) for seed in (2, 1)}
    assert quality.paired(other, ours, "mse") == pytest.approx([0.01, 0.01])
    assert quality.verdict([0.01, 0.011, 0.012]) == "worse"
    assert quality.verdict([-0.01, -0.011, -0.012]) == "better"
    assert quality.verdict([0.01, 0.03]) == "worse" and quality.verdict([0.01, 0.04]) == "within the spread"
    assert quality.verdict([-0.01, 0.001]) == "within the spread" and quality.verdict([-1]) == "one seed"


def test_names_of_runs_differ_whenever_the_runs_do():
    runs = [Run(d, n, lr, s, k, r) for d in ("cats", "fashion") for n in small_networks(16) for lr in (4e-3, 8e-3)
            for s in (0, 1) for k in (150, 222) for r in quality.RECIPES]  # fmt: skip
    assert len({run.name for run in runs}) == len(runs)


def test_the_page_shows_the_tables_of_the_committed_results():
    known = quality.records()
    assert len(known) >= 9 and all(r["image_size"] == 16 and r["skipped"] == 0 for r in known.values())
    text = quality.tables(known)
    assert "| ours | 922,547 |" in text and "| unet | 900,427 |" in text
    assert text in quality.DOCS.read_text(), "run benchmarks/quality.py --table"


@pytest.mark.parametrize("name", small_networks(16))
def test_compared_networks_have_0_9_million_parameters_and_learn(name):
    torch.manual_seed(0)
    model = small_networks(16)[name]()
    assert 0.87e6 < sum(p.numel() for p in model.parameters()) < 0.97e6
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.8])
    model(x, t).square().mean().backward()
    assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0


def cells(model):
    return [module for module in model.modules() if isinstance(module, ld.ParallelCfC)]


def test_each_changed_gate_sees_what_its_name_says():
    torch.manual_seed(0)
    z, other_z = torch.randn(2, 1, 16, 4, 4)
    e, other_e = torch.randn(2, 1, 24)
    sees = {}
    for name in ("gate 1-2", "gate of the time", "gate of the picture", "shift of picture and time", "ours"):
        gate = cells(small_networks(16)[name]())[0].gate
        picture, time = ((gate(*a) - gate(z, e)).abs().max() > 1e-4 for a in ((other_z, e), (z, other_e)))
        sees[name] = (bool(picture), bool(time))
    assert list(sees.values()) == [(False, False), (False, True), (True, False), (True, True), (True, True)]
    assert cells(small_networks(16)["gate 1-2"]())[0].gate(z, e) == 0.5


def test_feature_shift_without_its_kernel_is_our_cell():
    torch.manual_seed(0)
    model = small_networks(16)["shift of picture and time"]()
    cell = cells(model)[0]
    assert isinstance(cell, FeatureShift)
    torch.nn.init.zeros_(cell.s.weight), torch.nn.init.zeros_(cell.s.bias)
    z, e = torch.randn(2, 16, 4, 4), torch.randn(2, 24)
    torch.testing.assert_close(cell.gate(z, e), ld.ParallelCfC.gate(cell, z, e))


def test_muon_moves_the_1x1_kernels_and_adamw_all_else():
    trainer = quality.trainer_of(Run("cats", "ours", 1e-3, steps=4, recipe="muon"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):  # after one, kernels behind a modulation that starts at zero have moved too
        trainer.train_step(torch.rand(4, 3, 16, 16) * 2 - 1)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    optimizer = trainer.update.optimizer
    kernels = {id(kernel) for kernel, _ in optimizer.kernels}
    adams = {id(p) for group in optimizer.adamw.param_groups for p in group["params"]}
    everything = {id(p) for p in trainer.model.parameters()}
    assert kernels | adams == everything and not kernels & adams
    assert len(moved) > 0.95 * len(before)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_slow_start_warms_up_over_50_steps_in_a_run_of_20():
    trainer = quality.trainer_of(Run("cats", "resblocks", 1e-2, steps=20, recipe="slow start"))
    images, peak = torch.rand(2, 3, 16, 16) * 2 - 1, trainer.update.peak_lrs[0]
    found = [trainer.train_step(images)["lr"] / peak for _ in range(4)]
    assert found == pytest.approx([(i + 1) / 50 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(4)])
