"""The comparison's own arithmetic: which runs are asked for, which rate is called the best, what a table calls a difference."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality  # noqa: E402
import quality_tables  # noqa: E402
from networks import FeatureShift, PixelLinear, ld, small_networks  # noqa: E402
from quality import Run, Study  # noqa: E402

CATS = Study("cats", 150)


def record(run, mse, **values):
    return vars(run) | dict(mse=mse, mse_newest=mse, frechet=100 * mse, parameters=1) | values


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results; done(run, mse) puts a run into it."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    networks = {
        "ours, adamw": [2.0, 4.0, 6.0],
        "unet, adamw": [1.0, 2.0, 1.0],
        "unet-attention, adamw": [2.0, 4.0, 6.0],
    }
    recipes = {"ours, adamw": [2.0, 2.0, 9.0], "ours, muon": [2.5, 2.5, 10.0]}
    quality.write(tmp_path / "step-times-16.json", dict(groups=[dict(seconds=networks), dict(seconds=recipes)]))
    quality.write(tmp_path / "step-times-32.json", dict(groups=[dict(seconds={"ours, adamw": [8.0, 9.0, 7.0]})]))
    return lambda run, mse: quality.write(tmp_path / "records" / f"{run.name}.json", record(run, mse))


def loss(lr, best):
    """A curve over rates with its lowest point at `best`."""
    return abs(torch.tensor(lr / best).log2().item()) + 1


@pytest.mark.parametrize(
    "best, extra", [(8e-3, []), (32e-3, [64e-3]), (128e-3, [64e-3, 128e-3, 256e-3]), (2e-3, [2e-3, 1e-3])]
)
def test_the_search_goes_on_until_the_best_rate_has_a_worse_one_on_either_side(results, best, extra):
    tried = []
    for run in quality.search(CATS, "ours"):
        tried.append(run.lr)
        results(run, loss(run.lr, best))
    assert tried == pytest.approx([4e-3, 8e-3, 16e-3, 32e-3, *extra])
    assert quality.best_rate(quality.records(), CATS, "ours") == pytest.approx(best)


def test_a_rate_that_gave_no_finite_loss_is_never_the_best(results):
    for lr, mse in ((4e-3, float("nan")), (8e-3, 0.3), (16e-3, float("nan"))):
        results(Run("cats", "ours", lr), mse)
    assert quality.best_rate(quality.records(), CATS, "ours") == 8e-3


def test_equal_time_is_the_median_of_ratios_within_rounds(results):
    assert quality.steps_in_equal_time(CATS, "unet") == 2 * CATS.steps
    assert quality.steps_in_equal_time(CATS, "ours") == CATS.steps
    assert quality.steps_in_equal_time(CATS, "ours", "muon") == CATS.steps * 0.8
    assert quality.steps_in_equal_time(CATS, "unet", "muon") == 2 * CATS.steps  # not timed: as AdamW
    assert quality.steps_in_equal_time(CATS, "resblocks", "muon") == CATS.steps  # not timed at all: as ours
    assert quality.step_share(16, "ours", "muon", base="unet, adamw") == 2  # not timed with Muon beside this one


def test_only_what_has_no_times_yet_is_timed_beside_ours(results):
    names = quality.untimed(16)
    assert names[0] == "ours, adamw" and {"resblocks, adamw", "unet, muon for 3x3 too"} < set(names)
    assert not {"unet, adamw", "ours, muon"} & set(names)
    everything = quality.untimed(16, again=True)
    assert set(names) | {"unet, adamw", "ours, muon"} <= set(everything)
    quality.write(quality.RESULTS / "step-times-16.json", dict(groups=[dict(seconds=dict.fromkeys(everything, [1.0]))]))
    assert not quality.untimed(16)


def test_a_run_that_grows_takes_the_time_of_one_that_does_not(results):
    steps = quality.steps_while_growing(Study("cats at 32 px", 300))
    small = (
        quality.SMALL_SHARE * steps
    )  # a step of 8 s at 32 px, where Muon was not timed, of 4 s and 5 s with Muon at 16 px
    assert small * 5 + (steps - small) * 8 == pytest.approx(300 * 8, rel=0.002)


def test_pictures_grow_after_their_share_of_the_steps():
    class Witness:
        seen, update = [], quality.trainer_of(Run("cats", "resblocks", 1e-2, steps=8)).update

        def train_step(self, images):
            self.seen.append(tuple(images.shape))

    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    quality.fit(Witness(), images, 0, 8, "", batch_size=2, small_share=3 / 4)
    assert Witness.seen == [(2, 3, 16, 16)] * 6 + [(2, 3, 32, 32)] * 2


def test_every_seed_is_run_at_each_familys_own_rate_in_equal_steps_and_in_equal_time(results):
    best = {"ours": 16e-3, "unet": 8e-3}
    asked = []
    for run in quality.families(CATS, tuple(best)):
        if run not in asked:
            asked.append(run)
            results(run, loss(run.lr, best[run.network]))
    final = {(run.network, run.seed, run.steps) for run in asked if run.lr == best[run.network]}
    assert final == {(n, s, k) for s in (0, 1, 2) for n, k in (("ours", 150), ("unet", 150), ("unet", 300))}
    others = [run for run in asked if run.lr != best[run.network]]
    assert {run.seed for run in others if (run.network, run.steps) == ("unet", 150)} == {0}
    again = {(run.network, run.seed, run.steps, run.lr) for run in others if run.seed}
    assert again == {
        (n, s, k, 8e-3 if n == "ours" else 4e-3) for s in (1, 2) for n, k in (("ours", 150), ("unet", 300))
    }
    lines = quality_tables.comparison_table(quality.records(), CATS).splitlines()
    unet, scores = (
        next(line for line in lines if line.startswith("| unet |")),
        "1.0000 (1.0000 to 1.0000) | 100.0 (100.0 to 100.0)",
    )
    assert unet == f"| unet | adamw | 1 | 0.008 | 150 x 3 | {scores} | 300 x 3 | {scores} |"


def test_differences_are_taken_seed_by_seed():
    ours = {seed: dict(mse=0.1 * seed) for seed in (0, 1, 2)}
    other = {seed: dict(mse=0.1 * seed + 0.01) for seed in (2, 1)}
    assert quality_tables.paired(other, ours, "mse") == pytest.approx([0.01, 0.01])
    assert quality_tables.verdict([0.01, 0.011, 0.012]) == "worse"
    assert quality_tables.verdict([-0.01, -0.011, -0.012]) == "better"
    assert (
        quality_tables.verdict([0.01, 0.03]) == "worse" and quality_tables.verdict([0.01, 0.04]) == "within the spread"
    )
    assert quality_tables.verdict([-0.01, 0.001]) == "within the spread" and quality_tables.verdict([-1]) == "one seed"


def test_names_of_runs_differ_whenever_the_runs_do():
    runs = [Run(d, n, lr, s, k, r) for d in ("cats", "fashion") for n in small_networks(16) for lr in (4e-3, 8e-3)
            for s in (0, 1) for k in (150, 222) for r in quality.RECIPES]  # fmt: skip
    assert len({run.name for run in runs}) == len(runs)


def test_a_run_without_distances_is_made_again(results, monkeypatch):
    run, made = Run("cats", "ours", 8e-3), []
    monkeypatch.setattr(quality, "queue", lambda names: [run])
    monkeypatch.setattr(quality, "scored", lambda run, *_: made.append(run.name) or record(run, 1.0))
    path = quality.RESULTS / "records" / f"{run.name}.json"
    for old in ({}, dict(frechet=1.0)):
        quality.write(path, vars(run) | old)
        quality.work({"cats": ()}, ("cats",), 1.0, None)
    assert made == [run.name]


def test_the_page_shows_the_tables_of_the_committed_results():
    known = quality.records()
    assert len(known) >= 9 and all(r["skipped"] == 0 for r in known.values())
    assert all(r["image_size"] == quality.SETS[r["data"]][1] for r in known.values())
    text = quality_tables.tables(known)
    assert "| ours | adamw | 922,547 |" in text and "| unet | adamw | 900,427 |" in text
    assert text in quality_tables.DOCS.read_text(), "run benchmarks/quality_tables.py"


@pytest.mark.parametrize("name", small_networks(16))
def test_compared_networks_have_0_9_million_parameters_and_learn(name):
    torch.manual_seed(0)
    model = small_networks(16)[name]()
    assert 0.87e6 < sum(p.numel() for p in model.parameters()) < 0.97e6
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.8])
    (model(x, t) - 1).square().mean().backward()
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


def test_the_gates_of_the_paper_and_of_ncps_see_t_itself_and_no_embedding_of_it():
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.0, 1.0])
    for name, at_zero in (("gate of the paper", lambda cell, z: torch.full_like(cell.f(z), 0.5)),
                          ("gate of ncps", lambda cell, z: torch.sigmoid(cell.s(z)))):  # fmt: skip
        model = small_networks(16)[name]()
        model(x, t)
        cell, (z, e) = cells(model)[0], (torch.randn(2, 16, 4, 4), torch.randn(2, 24))
        gate = cell.gate(z, e)
        torch.testing.assert_close(gate, cell.gate(z, torch.randn(2, 24)))
        torch.testing.assert_close(gate[0], at_zero(cell, z)[0])
        sign = -1 if name == "gate of the paper" else 1
        torch.testing.assert_close(gate[1].logit(), sign * cell.f(z)[1] + (cell.s(z)[1] if sign > 0 else 0))


def test_blocks_lose_the_part_that_their_name_says():
    torch.manual_seed(0)
    x, t, e = torch.randn(2, 32, 8, 8), torch.tensor([0.2, 0.8]), torch.randn(2, 24)

    def block(name):
        return next(m for m in small_networks(16)[name]().modules() if isinstance(m, ld.LiquidDiffusionBlock))

    def cell(b, x):
        n = b.norm_cfc(x, e)
        return b.relaxation(x, n, b.cfc(n, e), t)

    b = block("no mix")
    torch.testing.assert_close(b(x, t, e), cell(b, x) + b.ff(b.norm_ff(cell(b, x), e)))
    b = block("no feed-forward")
    x40 = torch.randn(2, 40, 8, 8)
    torch.testing.assert_close(b(x40, t, e), cell(b, x40) + b.mix(cell(b, x40), e))
    b = block("no cell, wider")
    x40 = torch.randn(2, 40, 8, 8)
    mixed = x40 + b.mix(x40, e)
    torch.testing.assert_close(b(x40, t, e), mixed + b.ff(b.norm_ff(mixed, e)))
    assert not hasattr(b, "cfc")
    b = block("mix in the cell")
    torch.nn.init.ones_(b.cfc.spatial.pool_weight)
    moved = b.cfc.spatial(x + 1) - b.cfc.spatial(x)  # inside the border, a constant adds the kernels' sums and the mean
    weight, _ = ld.MultiScaleSpatialMix.merged_kernel(b.cfc.spatial)
    torch.testing.assert_close(moved[..., 4, 4], (weight.sum((1, 2, 3)) + 1).expand(2, -1), atol=1e-4, rtol=1e-4)
    b = block("channel attention")
    torch.nn.init.zeros_(b.mix.attend.weight), torch.nn.init.constant_(b.mix.attend.bias, 50)  # all doors open
    plain = ld.MultiScaleSpatialMix.forward(b.mix, x, e)  # its pool weight is zero at the start
    torch.testing.assert_close(b.mix(x, e), plain)
    torch.nn.init.constant_(b.mix.attend.bias, -50)
    torch.testing.assert_close(b.mix(x, e), b.mix.project.bias[:, None, None].expand(2, 32, 8, 8))


def test_the_cell_on_a_dense_kernel_is_compared_with_and_without_its_gate():
    torch.manual_seed(0)
    x, t, e = torch.randn(2, 32, 8, 8), torch.tensor([0.2, 0.8]), torch.randn(2, 24)
    for name, gated in ((quality.DENSE, True), (f"{quality.DENSE}, gate 1-2", False)):
        block = next(m for m in small_networks(16)[name]().modules() if isinstance(m, ld.DenseLiquidBlock))
        cell = block.cfc
        z = cell.backbone(cell.spatial(block.norm_cfc(x, e)))
        a, shift = cell.time_a(e)[..., None, None], cell.time_b(e)[..., None, None]
        gate = torch.sigmoid(a * cell.f(z) - shift) if gated else 0.5
        assert not gated or gate.std() > 0.01
        torch.testing.assert_close(block(x, t, e) - x, gate * cell.g(z) + (1 - gate) * cell.h(z))
        heads = (cell.g[-1].weight, cell.h[-1].weight)
        assert all(p.std().item() * (3 * 32) ** 0.5 == pytest.approx(0.1, rel=0.15) for p in heads)


def test_ours_starts_literally_in_every_comparison_but_where_the_name_says_small():
    stds = {}
    for name, build in small_networks(16).items():
        blocks = [m for m in build().modules() if isinstance(m, ld.LiquidDiffusionBlock) and hasattr(m, "ff")]
        if blocks:
            fan_in = blocks[0].ff[-1].in_channels
            stds[name] = blocks[0].ff[-1].weight.std().item() * (3 * fan_in) ** 0.5  # 1 by PyTorch's rule
    for name, std in stds.items():
        assert std == pytest.approx(0.1 if "small" in name else 1.0, rel=0.1), name
    assert "ours" in stds and quality.DEFAULT in stds and len(stds) > 20
    resblocks = small_networks(16)["small start, resblocks"]().bottleneck[0].conv2.weight
    assert resblocks.std().item() * (3 * resblocks[0].numel()) ** 0.5 == pytest.approx(0.1, rel=0.1)


def test_immiscible_noise_is_the_nearest_of_four():
    seen = []

    class Witness(quality.Immiscible):
        def accumulate(self, images, noise, t):
            seen.append((images - noise).square().mean())
            return super().accumulate(images, noise, t)

    trainer = quality.trainer_of(Run("cats", "resblocks", 1e-2, recipe="immiscible", steps=4))
    assert type(trainer) is quality.Immiscible
    trainer.__class__ = Witness
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    trainer.train_step(images)
    d = (torch.randn(4, 4096, 192) - images.flatten(1).repeat(64, 1)).square().mean(2)
    assert seen[0].item() == pytest.approx(d.min(0).values.mean().item(), rel=0.01)
    assert seen[0] < 0.97 * d.mean()


def test_a_gate_on_the_skips_that_is_half_open_is_our_fusion_and_it_sees_time_and_picture():
    torch.manual_seed(0)
    model, (x, other, skip) = small_networks(16)["small start, gate on the skips"](), torch.randn(3, 2, 32, 4, 4)
    fusion, t = model.decoder.fuse[-1], torch.tensor([0.1, 0.9])
    model(torch.randn(2, 3, 16, 16), t)
    torch.testing.assert_close(fusion.t_emb, model.time(t))
    gates = []
    for z, e in ((x, fusion.t_emb), (other, fusion.t_emb), (x, fusion.t_emb.flip(0))):
        gates.append(ld.ParallelCfC.gate(fusion, z, e))
    assert (gates[0] - gates[1]).abs().max() > 1e-3 and (gates[0] - gates[2]).abs().max() > 1e-3
    for layer in (fusion.time_a, fusion.time_b):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(fusion(x, skip), fusion.heads(x, skip))
    torch.nn.init.constant_(fusion.time_b.bias, 50)  # shut: nothing of the skip
    torch.testing.assert_close(fusion(x, skip), fusion(x, 0 * skip))


def test_feature_shift_without_its_kernel_is_our_cell():
    torch.manual_seed(0)
    model = small_networks(16)["shift of picture and time"]()
    cell = cells(model)[0]
    assert isinstance(cell, FeatureShift)
    torch.nn.init.zeros_(cell.s.weight), torch.nn.init.zeros_(cell.s.bias)
    z, e = torch.randn(2, 16, 4, 4), torch.randn(2, 24)
    torch.testing.assert_close(cell.gate(z, e), ld.ParallelCfC.gate(cell, z, e))


def test_recipes_say_which_kernels_go_to_muon():
    sizes = {}
    for recipe in ("adamw", "muon", "muon for 3x3 too"):
        update = quality.trainer_of(Run("cats", "ours", 1e-3, recipe=recipe)).update
        sizes[recipe] = {p.shape[-1] for o in update.optimizers[1:] for g in o.param_groups for p in g["params"]}
        assert max(update.peak_lrs) == 1e-3 and len(set(update.peak_lrs)) > 1  # by fan-in for AdamW's
    assert list(sizes.values()) == [set(), {1}, {1, 3}]


def test_muon_is_asked_for_at_its_own_rate_in_the_time_of_adamw(results):
    for lr in quality.RATES_ELSE:
        results(Run("cats", "ours", lr), loss(lr, 8e-3))
    asked = []
    for run in quality.with_muon(CATS, ("ours",)):
        asked.append(run)
        results(run, loss(run.lr, 16e-3) - 0.5)
    assert {run.recipe for run in asked} == {"muon"}
    final = {(run.seed, run.steps) for run in asked if run.lr == 16e-3}
    assert final == {(seed, steps) for seed in quality.SEEDS for steps in (150, 120)}
    text = quality_tables.difference_table(
        quality.records(), CATS, quality_tables.recipe_variants(quality.records(), CATS)
    )
    assert "Ours by adamw after 150 steps at 16 px, rate 0.008, 1 seeds" in text
    assert "| muon, rate 0.016 | 1 | -0.5000 | one seed | -50.0 | one seed |" in text
    assert "| muon, rate 0.016, 120 steps: equal time | 1 |" in text


def test_parts_are_taken_from_the_network_that_users_get_at_its_own_rate(results):
    for lr in (4e-3, 8e-3, 16e-3):
        results(Run("cats", quality.DEFAULT, lr, recipe="muon"), loss(lr, 8e-3))
    runs = [run for seed in (0, 1) for run in quality.parts(CATS, seed)]
    assert {(run.lr, run.steps, run.recipe) for run in runs} == {(8e-3, 150, "muon")}
    assert {run.network for run in runs} == {quality.DEFAULT, *quality.PARTS} <= set(small_networks(16))
    for run in runs:
        results(run, 0.5 if run.network == quality.DEFAULT else 0.6 + 0.01 * run.seed)
    variants = quality_tables.default_variants(CATS)
    text = quality_tables.difference_table(quality.records(), CATS, variants, "muon", network=quality.DEFAULT)
    assert "Branches start small by muon after 150 steps at 16 px, rate 0.008, 2 seeds: MSE 0.5000" in text
    assert "| gate 1-2 | 2 | +0.1050 (+0.1000 to +0.1100) | worse |" in text
    assert "literal start" not in text and "growing" not in text  # not run


def test_starts_are_what_their_names_say():
    for name in ("output starts at zero", "small start, output starts at zero"):
        assert small_networks(16)[name]()(torch.randn(2, 3, 16, 16), torch.rand(2)).abs().max() == 0
    model = small_networks(16)["modulations start at random"]()
    assert all(m.linear.weight.abs().max() > 0 for m in model.modules() if isinstance(m, ld.TimeModulation))


def test_other_widths_of_the_time_embedding_have_the_same_number_of_weights():
    ours = small_networks(16)[quality.DEFAULT]()
    count = sum(p.numel() for p in ours.parameters())
    assert ours.config["t_dim"] == 24
    for width in (8, 48, 64):
        model = small_networks(16)[f"small start, time embedding of {width}"]()
        assert model.time(torch.rand(2)).shape == (2, width)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.015)


def test_muon_takes_attention_and_feed_forward_of_a_dit_which_computes_as_before():
    torch.manual_seed(0)
    model = small_networks(16)["dit-2"]().eval()
    taken = ld.muon_kernels(model)
    matrices = [m for b in model.net.transformer_blocks for m in (b.attn1, b.ff)]
    assert len(taken) == 24 and {id(p) for p in taken} == {
        id(p) for m in matrices for p in m.parameters() if p.ndim > 1
    }
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    torch.nn.init.normal_(model.net.proj_out_2.weight)
    with torch.no_grad():
        answer = model(x, t)
        for layer in [m for m in model.modules() if isinstance(m, PixelLinear)]:
            layer.__class__, layer.weight = torch.nn.Linear, torch.nn.Parameter(layer.weight.data[:, :, 0, 0])
        torch.testing.assert_close(model(x, t), answer)


def test_slow_start_warms_up_over_50_steps_in_a_run_of_20():
    trainer = quality.trainer_of(Run("cats", "resblocks", 1e-2, steps=20, recipe="slow start"))
    images, peak = torch.rand(2, 3, 16, 16) * 2 - 1, trainer.update.peak_lrs[0]
    found = [trainer.train_step(images)["lr"] / peak for _ in range(4)]
    assert found == pytest.approx([(i + 1) / 50 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(4)])
