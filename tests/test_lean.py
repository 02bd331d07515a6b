"""The lean path is the same function as the formulas: answers, gradients and weights; it only keeps and computes less."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.counting import kept_bytes
from liquid_diffusion import (
    RELAXATIONS,
    LeanCell,
    LeanFeedForward,
    LeanMix,
    LiquidDiffusion,
    LiquidDiffusionBlock,
    affine,
    by_columns,
    conv_gradients,
    liquid_diffusion_nano,
    normalisation,
    set_gradient_checkpointing,
    set_lean,
)

DOUBLE = torch.float64


def random_(model, seed=0):
    """Fill every weight, so that no modulation, pool weight or rate hides behind its start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return model


def network(relaxation="delta", dtype=DOUBLE, **options):
    torch.manual_seed(0)
    return random_(LiquidDiffusion((16, 24), (1, 1), t_dim=8, relaxation=relaxation, **options).to(dtype))


def batch(model, height=8, width=12, n=2):
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    return torch.randn(n, 3, height, width, dtype=dtype), torch.tensor([0.0, 0.7] * (n // 2), dtype=dtype)


def answer_and_gradients(model, x, t):
    x = x.clone().requires_grad_()
    out = model(x, t)
    gradients = torch.autograd.grad(out.square().mean(), [x, *model.parameters()], allow_unused=True)
    return [out, *gradients]


def relative_errors(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            yield ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_answers_and_all_gradients_equal_the_formulas(relaxation, checkpointing, layout):
    model = network(relaxation, gradient_checkpointing=checkpointing).to(memory_format=layout)
    x, t = batch(model)
    lean = answer_and_gradients(model, x.contiguous(memory_format=layout), t)
    set_lean(model, False)
    assert max(relative_errors(lean, answer_and_gradients(model, x, t))) < 1e-9


def test_the_check_would_see_an_error():
    model = network()
    x, t = batch(model)
    lean = answer_and_gradients(model, x, t)
    set_lean(model, False)
    with torch.no_grad():
        model.bottleneck[0].mix.pool_weight[0] += 1e-4
    assert max(relative_errors(lean, answer_and_gradients(model, x, t))) > 1e-7


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (16, 6)])
def test_float32_agrees_to_rounding_at_any_size(size):
    model = network(dtype=torch.float32)
    x, t = batch(model, *size)
    lean = answer_and_gradients(model, x, t)
    set_lean(model, False)
    assert max(relative_errors(lean, answer_and_gradients(model, x, t))) < 1e-3


def small(*shape):
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("stay, extra", [(False, False), (False, True), (True, False), (True, True)])
def test_gradcheck_of_the_cell(stay, extra, keep):
    torch.manual_seed(2)
    c, half, n = 8, 4, 2
    factors = [small(n, c, 1, 1) for _ in range(5)] + [small(n, c, 1, 1) if on else None for on in (stay, extra)]
    shapes = [(c, 1, 7, 7), (half, c, 1, 1), (half, 1, 3, 3), (half, 1, 3, 3)] + [(c, half, 1, 1)] * 3
    weights = [v for shape in shapes for v in (small(*shape), small(shape[0]))]
    assert torch.autograd.gradcheck(LeanCell.apply, (keep, small(n, c, 2, 3), *factors, *weights), fast_mode=True)


@pytest.mark.parametrize("keep", [True, False])
def test_gradcheck_of_mix_and_feed_forward(keep):
    torch.manual_seed(3)
    c, n = 8, 2
    mix = [small(c, 1, 1) for _ in range(3)] + [small(n, c, 1, 1) for _ in range(2)]
    weights = (small(c, 1, 7, 7), small(c), small(c, c, 1, 1), small(c))
    assert torch.autograd.gradcheck(LeanMix.apply, (keep, small(n, c, 2, 3), *mix, *weights), fast_mode=True)
    weights = (small(12, c, 1, 1), small(12), small(c, 12, 1, 1), small(c))
    args = (keep, small(n, c, 2, 3), small(n, c, 1, 1), small(n, c, 1, 1), *weights)
    assert torch.autograd.gradcheck(LeanFeedForward.apply, args, fast_mode=True)


def test_normalisation_is_group_norm_also_far_from_zero():
    x = 5 + torch.randn(2, 16, 8, 8)
    ones = torch.ones(2, 16, 1, 1)
    _, _, _, slope, offset = normalisation(x, ones, 0 * ones)
    torch.testing.assert_close(affine(x, slope, offset), F.group_norm(x, 8), atol=2e-5, rtol=0)
    even = torch.ones(2, 16, 4, 4) * 1e3  # no variance at all
    assert all(v.isfinite().all() for v in normalisation(even, ones, ones))


@pytest.mark.parametrize("size", [5, 7, 9])
def test_weight_gradient_by_columns_is_the_gradient(size):
    torch.manual_seed(4)
    weight = torch.randn(6, 1, size, size, dtype=DOUBLE)
    x, grad = torch.randn(2, 6, 5, 4, dtype=DOUBLE), torch.randn(2, 6, 5, 4, dtype=DOUBLE)
    whole = conv_gradients(grad, x, weight, (size // 2, size // 2), (False, True))[1]
    torch.testing.assert_close(by_columns(grad, x, weight), whole)


def test_autocast_stays_near_float32_and_in_half_precision():
    model = network(dtype=torch.float32)
    x, t = batch(model, 16, 16)
    exact = answer_and_gradients(model, x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = answer_and_gradients(model, x, t)
        assert model.bottleneck[0](torch.randn(2, 24, 4, 4), t, torch.randn(2, 8)).dtype == torch.bfloat16
    for a, b in zip(exact, half):
        if a is not None and a.ndim > 1:  # sums over few numbers may round to anything
            assert torch.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.98


def test_a_block_keeps_eight_maps_and_three_with_checkpointing():
    block, map_bytes = LiquidDiffusionBlock(64, t_dim=16), 4 * 64 * 32 * 32

    def maps_per_picture(lean, checkpointing=False):
        set_lean(block, lean)
        set_gradient_checkpointing(block, checkpointing)
        few, more = (kept_bytes(block, torch.randn(n, 64, 32, 32), torch.rand(n), torch.randn(n, 16)) for n in (2, 3))
        return (more - few) / map_bytes

    assert maps_per_picture(lean=True) < 8.1
    assert maps_per_picture(lean=True, checkpointing=True) < 3.1
    assert maps_per_picture(lean=False) > 24


def test_nothing_is_kept_without_gradients_and_the_weights_stay_current():
    model = network()
    x, t = batch(model)
    with torch.no_grad():
        before = model(x, t)
        model.encoder.stages[0][0].mix.dw3.weight += 0.5
        after = model(x, t)
    set_lean(model, False)
    assert not before.requires_grad
    torch.testing.assert_close(after, model(x, t))
    assert not torch.allclose(before, after)


def test_same_weights_and_config_either_way():
    lean, plain = liquid_diffusion_nano(), liquid_diffusion_nano(lean=False)
    assert [(n, p.shape) for n, p in lean.state_dict().items()] == [(n, p.shape) for n, p in plain.state_dict().items()]
    assert lean.config == plain.config
    switches = {m.lean for m in copy.deepcopy(lean).modules() if isinstance(m, LiquidDiffusionBlock)}
    assert switches == {True} and sum(p.numel() for p in lean.parameters()) == 922_547
