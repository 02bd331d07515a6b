"""Laws of the trainer: the update, the average, randomness kept apart, precision, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

import liquid_diffusion as ld
from liquid_diffusion import (
    LiquidDiffusion,
    Muon,
    PowerEMA,
    RectifiedFlowTrainer,
    liquid_diffusion,
    lr_factor,
    muon_kernels,
    orthogonalise,
    parameter_groups,
)


def small_trainer(network=None, **options):
    torch.manual_seed(0)
    model = LiquidDiffusion(channels=(8, 16), blocks=(1, 1), **network or {})
    return RectifiedFlowTrainer(model, device="cpu", **options)


def pictures(n=4, size=8, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()


def test_quick_start_of_the_specification():
    trainer = small_trainer(lr=1e-4, warmup_steps=1)
    metrics = trainer.train_step(pictures())
    assert float(f"{metrics['loss']:.4f}") > 0
    assert torch.is_tensor(metrics["loss"])  # not read back from the device unless somebody formats it
    samples = trainer.sample(batch_size=4, image_size=8, num_steps=5)
    assert samples.shape == (4, 3, 8, 8)
    assert samples.abs().max() <= 1


def test_training_learns_one_picture():
    """The exact flow to a single picture ends in that picture; 400 steps come near it from any noise."""
    target = pictures(1, seed=3)
    trainer = small_trainer(total_steps=400, warmup_steps=20)
    for _ in range(400):
        trainer.train_step(target.expand(16, -1, -1, -1))
    error = (trainer.sample(8, 8, num_steps=20, seed=5) - target).square().mean()
    assert error < 0.02
    assert error < (pictures(8, seed=9) - target).square().mean() / 20


# ---- the learning rate ----------------------------------------------------------------------------------------------


def test_a_given_rate_is_used_for_every_weight():
    trainer = small_trainer(lr=1e-4, warmup_steps=1)
    trainer.train_step(pictures())
    assert {group["lr"] for group in trainer.update.groups()} == {1e-4}


def test_the_measured_rate_falls_with_the_width():
    with torch.device("meta"):
        rates = {name: ld.measured_rate(liquid_diffusion(name)) for name in ld.PRESETS}
    assert rates == pytest.approx(dict(nano=16e-3, tiny=8e-3, small=16e-3 / 3, base=4e-3, large=4e-3))
    assert ld.measured_rate(nn.Conv2d(3, 3, 1)) == 16e-3
    with torch.device("meta"):
        adamw, muon = ld.optimizers(LiquidDiffusion(channels=(128,), blocks=(1,)))
    assert max(g["lr"] for g in adamw.param_groups) == muon.param_groups[0]["lr"] == 4e-3
    assert ld.measured_rate(LiquidDiffusion(channels=(8, 16), blocks=(1, 1))) == 16e-3


def test_the_plain_recipe_is_the_literal_specification_one_keyword_away():
    model = liquid_diffusion("nano", "plain")
    assert {m.form for m in model.modules() if isinstance(m, ld.LiquidRelaxation)} == {"spec"}
    torch.manual_seed(0)
    literal = nn.Conv2d(240, 96, 1).weight.std().item()
    blocks = [m for m in model.modules() if isinstance(m, ld.LiquidDiffusionBlock) and m.ff[-1].out_channels == 96]
    assert blocks and all(m.ff[-1].weight.std().item() == pytest.approx(literal, rel=0.03) for m in blocks)
    trainer = RectifiedFlowTrainer(model, device="cpu", recipe="plain", warmup_steps=1)
    trainer.train_step(pictures())
    assert {group["lr"] for group in trainer.update.groups()} == {1e-4}
    assert trainer.time_distribution == "uniform"
    assert small_trainer().time_distribution == "logit-normal"
    given = RectifiedFlowTrainer(
        liquid_diffusion("nano"), 3e-4, "cpu", recipe="plain", time_distribution="logit-normal"
    )
    assert (given.update.peak_lrs, given.time_distribution) == ([3e-4], "logit-normal")
    for build in (lambda: liquid_diffusion("nano", "tasty"), lambda: RectifiedFlowTrainer(model, recipe="tasty")):
        with pytest.raises(ValueError, match="no recipe 'tasty'; choose one of measured, dense, plain"):
            build()


def test_the_recipe_scales_the_rate_by_fan_in():
    model = LiquidDiffusion(channels=(8, 16), blocks=(1, 1))
    groups = parameter_groups(model.parameters(), lr=0.016)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    block = model.bottleneck[0]
    assert rate[id(block.cfc.spatial.weight)] == pytest.approx(0.016 * math.sqrt(32 / 49))  # depthwise 7x7
    assert rate[id(block.ff[2].weight)] == pytest.approx(0.016 * math.sqrt(32 / 40))  # 1x1 from 40 channels
    assert rate[id(model.encoder.down[0].weight)] == pytest.approx(0.016 * math.sqrt(32 / 72))  # 3x3 from 8 channels
    assert rate[id(block.relaxation.rho)] == 0.016
    assert {group["lr"] for group in parameter_groups(model.parameters(), 0.016, by_fan_in=False)} == {0.016}


# ---- Muon -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (3, 32, 32)])
def test_orthogonalise_keeps_the_directions_and_levels_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalise(x) @ v.mT  # of U V^T itself: the identity
    rest = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert rest.abs().max() < 1e-4
    if len(shape) == 2:  # square ones have singular values near 0, which five steps do not lift to 1
        assert 0.6 < inner.diagonal().min() and inner.diagonal().max() < 1.25
    assert orthogonalise(torch.zeros(2, 4)).abs().max() == 0


def test_muon_is_torchs_but_for_its_bfloat16():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 32, 1, 1), (48, 32, 1, 1), (16, 5, 3, 3))]
    theirs = [torch.nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    before = [p.detach().clone() for p in theirs]
    pair = Muon(ours, 0.01), torch.optim.Muon(theirs, 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1).clone()
        for optimizer in pair:
            optimizer.step()
    for p, q, start in zip(ours, theirs, before):
        assert (p.flatten(1) - q).norm() < 0.02 * (q - start).norm()


def test_muon_takes_dense_1x1_kernels_and_adamw_all_else():
    trainer = small_trainer()
    adamw, muon = ({id(p) for g in o.param_groups for p in g["params"]} for o in trainer.update.optimizers)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert adamw | muon == set(names) and not adamw & muon
    block = "bottleneck.0."
    assert {n.removeprefix(block) for i, n in names.items() if i in muon and n.startswith(block)} == {
        *(f"cfc.{part}.weight" for part in ("backbone.0", "f", "g.2", "h.2")),
        *("mix.project.weight", "ff.0.weight", "ff.2.weight"),
    }
    assert all(p.shape[1] > 1 for p in muon_kernels(trainer.model, 7))  # no depthwise ones
    assert {p.shape[2] for p in muon_kernels(trainer.model, 3)} == {1, 3} and not muon_kernels(trainer.model, 0)
    before = {id(p): p.detach().clone() for p in trainer.model.parameters()}
    for _ in range(2):  # after one, kernels behind a modulation that starts at zero have moved too
        rate = trainer.train_step(pictures())["lr"]
    assert trainer.update.groups()[-1]["lr"] == rate < 0.016  # Muon warms up with AdamW
    assert not [names[id(p)] for p in trainer.model.parameters() if id(p) in muon and torch.equal(p, before[id(p)])]
    assert all(p.grad is None for p in trainer.model.parameters())


def test_overflow_in_one_of_muons_kernels_stops_adamw_too():
    trainer = small_trainer()
    trainer.train_step(pictures())
    trainer.update.set_precision(torch.float16)  # the scaler looks at each optimizer's gradients by themselves
    before, scale = weights(trainer), trainer.update.scaler.get_scale()
    handle = trainer.model.bottleneck[0].mix.project.weight.register_hook(lambda grad: grad * float("inf"))
    trainer.train_step(pictures(seed=1))
    handle.remove()
    assert torch.equal(weights(trainer), before)
    assert trainer.update.scaler.get_scale() == scale / 2
    trainer.update.settle()
    assert trainer.update.skipped == 1


def test_a_given_rate_or_zero_leaves_muon_out():
    for options in (dict(lr=1e-3), dict(muon=0)):
        assert [type(o) for o in small_trainer(**options).update.optimizers] == [torch.optim.AdamW]
    both = small_trainer(lr=1e-3, muon=3).update
    assert [type(o) for o in both.optimizers] == [torch.optim.AdamW, Muon] and set(both.peak_lrs) == {1e-3}


def test_rate_warms_up_linearly_and_falls_to_zero_as_a_cosine():
    assert lr_factor(0, 0.0, 10) == pytest.approx(0.1)
    assert lr_factor(9, 0.0, 10) == lr_factor(500, 0.0, 10) == 1
    assert lr_factor(500, 0.5, 10) == pytest.approx(0.5)
    assert lr_factor(500, 0.25, 10) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(500, 1.0, 10) == lr_factor(500, 1.5, 10) == pytest.approx(0)


def test_total_steps_drive_the_decay():
    trainer = small_trainer(total_steps=4, warmup_steps=1, lr=1.0)
    rates = [trainer.train_step(pictures())["lr"] for _ in range(4)]
    assert rates == pytest.approx([lr_factor(i, i / 4, 1) for i in range(4)])


# ---- the average of the weights --------------------------------------------------------------------------------------


def test_average_is_the_power_weighted_mean_of_all_steps():
    """With exponent gamma, step i counts as i ** gamma - nearly; here against the exact recursion's closed product."""
    values = torch.randn(12, dtype=torch.float64)
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema = PowerEMA(model, gamma=3.0)
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(value)
        ema.update(model, step)
    keep = [(1 - 1 / i) ** 4 for i in range(1, 13)]
    shares = torch.tensor([(1 - keep[i]) * math.prod(keep[i + 1 :]) for i in range(12)], dtype=torch.float64)
    assert shares.sum() == pytest.approx(1)
    assert ema.model.weight.item() == pytest.approx((shares * values).sum().item())


def test_average_forgets_all_but_the_last_share_of_the_run():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = PowerEMA(model, gamma=16.0)
    for step in range(1, 1001):
        model.weight.data.fill_(float(step > 700))
        ema.update(model, step)
    assert ema.model.weight.item() == pytest.approx(1 - 0.7**17, abs=0.002)


def test_samples_come_from_the_average_unless_asked_otherwise():
    trainer = small_trainer(warmup_steps=1)
    for _ in range(5):
        trainer.train_step(pictures())
    averaged, newest = (trainer.sample(2, 8, 3, seed=0, ema=ema) for ema in (True, False))
    assert not torch.equal(averaged, newest)
    trainer.update.ema.model.load_state_dict(trainer.model.state_dict())
    assert torch.equal(trainer.sample(2, 8, 3, seed=0), newest)


# ---- one step -------------------------------------------------------------------------------------------------------


def test_sampling_leaves_training_untouched():
    plain, sampled = small_trainer(), small_trainer()
    for trainer in (plain, sampled):
        for step in range(3):
            trainer.train_step(pictures(seed=step))
            if trainer is sampled:
                trainer.sample(2, 8, 2)
    assert torch.equal(weights(plain), weights(sampled))


def test_same_seed_same_pictures_and_other_noise_without_one():
    trainer = small_trainer()
    assert torch.equal(trainer.sample(2, 8, 2, seed=1), trainer.sample(2, 8, 2, seed=1))
    assert not torch.equal(trainer.sample(2, 8, 2), trainer.sample(2, 8, 2))


def test_accumulated_micro_batches_are_the_same_step():
    # AdamW's first step is as long for a tiny gradient, rounding and all, as for a large one; at full size there are few tiny ones.
    network = dict(branch_scale=1.0)
    whole, parts = small_trainer(network, lr=1e-3), small_trainer(network, lr=1e-3, micro_batch=3)
    for trainer in (whole, parts):
        trainer.metrics = trainer.train_step(pictures(8))
    torch.testing.assert_close(parts.metrics, whole.metrics, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)


def test_gradient_is_clipped_to_the_norm():
    trainer = small_trainer(clip_norm=1e-3)
    norms = []
    trainer.update.optimizers[0].register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm())
    )
    assert trainer.train_step(pictures())["grad_norm"] > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted():
    trainer = small_trainer(warmup_steps=10)
    trainer.train_step(pictures())
    trainer.update.settle()
    before, average = weights(trainer), weights_of(trainer.update.ema.model)
    kept = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in trainer.update.optimizers])
    assert len(kept) == 2  # AdamW's and Muon's
    handle = trainer.model.stem[0].weight.register_hook(lambda grad: grad * float("nan"))
    trainer.train_step(pictures(seed=1))
    handle.remove()
    trainer.update.settle()
    assert torch.equal(weights(trainer), before)
    assert torch.equal(weights_of(trainer.update.ema.model), average)
    torch.testing.assert_close(
        [optimizer.state_dict()["state"] for optimizer in trainer.update.optimizers], kept, rtol=0, atol=0
    )
    assert (trainer.update.steps, trainer.update.skipped) == (1, 1)
    assert trainer.train_step(pictures(seed=2))["lr"] == pytest.approx(0.016 * 2 / 10)  # the second real step
    trainer.update.settle()
    assert not torch.equal(weights(trainer), before)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_plain_recipe_noise_and_times_repeat_with_the_seed():
    losses = [small_trainer(seed=seed).train_step(pictures())["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_state_goes_on_bit_by_bit():
    straight, first = small_trainer(), small_trainer()
    for step in range(6):
        straight.train_step(pictures(seed=step))
        if step < 3:
            first.train_step(pictures(seed=step))
    second = small_trainer(seed=7)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second.train_step(pictures(seed=step))
    assert torch.equal(weights(straight), weights(second))
    straight.update.settle(), second.update.settle()
    assert torch.equal(weights_of(straight.update.ema.model), weights_of(second.update.ema.model))
    assert torch.equal(straight.sample(1, 8, 2), second.sample(1, 8, 2))


# ---- precision and device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_precision_goes_by_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # what a T4 claims
    assert ld.choose_precision(torch.device("cuda")) == dtype
    assert ld.choose_precision(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_float32_weights(dtype):
    trainer = small_trainer(precision=dtype, warmup_steps=1)
    losses = [trainer.train_step(pictures(16, seed=step))["loss"].item() for step in range(30)]
    trainer.update.settle()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.update.steps >= 20
    assert sum(losses[-5:]) < sum(losses[:5])
    assert trainer.sample(1, 8, 2).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_a_sentence():
    with pytest.raises(RuntimeError, match="needs a GPU that PyTorch can use"):
        ld.RectifiedFlow(LiquidDiffusion(channels=(8,), blocks=(1,)), device="cuda")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\[B, 3, H, W\]"),
        (torch.zeros(2, 1, 8, 8), r"\[B, 3, H, W\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.rand(2, 3, 8, 8), r"scale them to \[-1, 1\]"),
        (torch.rand(2, 3, 8, 8) * 255, r"scale them to \[-1, 1\]"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN or infinity"),
        (pictures(size=9), "9x9; both sides must be a multiple of 2"),
    ],
)
def test_bad_batches_are_refused_with_the_reason(images, message):
    trainer = small_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.train_step(images)


def test_sampling_refuses_zero_steps_and_odd_sizes():
    with pytest.raises(ValueError, match="at least one step"):
        small_trainer().sample(1, 8, num_steps=0)
    with pytest.raises(ValueError, match="multiple of 2"):
        small_trainer().sample(1, 7, num_steps=1)


def test_trajectory_holds_every_state_and_sizes_may_differ():
    film = small_trainer().sample(2, (8, 12), num_steps=3, trajectory=True, seed=0)
    assert film.shape == (4, 2, 3, 8, 12)
    assert torch.equal(film[0], torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)))
