"""Laws of the network: counts, formulas, limits, equality with ncps, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liquid_diffusion as ld
from liquid_diffusion import (
    AdaLN,
    LiquidDiffusion,
    LiquidDiffusionBlock,
    LiquidRelaxation,
    MultiScaleSpatialMix,
    ParallelCfC,
)

# exact counts, and the table of the specification in millions (nano is ours)
COUNTS = {
    "nano": (922_547, 1),
    "tiny": (8_786_179, 8),
    "small": (26_452_611, 25),
    "base": (58_997_251, 65),
    "large": (115_023_363, 120),
}


def small(**options):
    torch.manual_seed(0)
    return LiquidDiffusion(**{**dict(channels=(8, 16), blocks=(1, 1)), **options})


def randomise(module):
    """Give every weight a value of its own, the zero-initialised too, so that nothing passes by being zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return module


@pytest.mark.parametrize("preset", ld.PRESETS)
def test_parameter_counts_are_pinned_and_near_the_table(preset):
    with torch.device("meta"):
        model = getattr(ld, f"liquid_diffusion_{preset}")()
    count = sum(p.numel() for p in model.parameters())
    exact, table = COUNTS[preset]
    assert count == exact
    assert count == pytest.approx(table * 1e6, rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (14, 6)])
def test_velocity_has_the_shape_of_the_input(height, width):
    x = torch.randn(2, 3, height, width)
    velocity = small()(x, torch.tensor([0.0, 1.0]))
    assert velocity.shape == x.shape
    assert velocity.isfinite().all()


def test_large_preset_keeps_the_four_stage_layout():
    model = ld.liquid_diffusion_large(channels=(8, 8, 16, 16), blocks=(1, 1, 1, 1))
    assert model(torch.randn(1, 3, 16, 24), torch.tensor([0.5])).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="multiple of 8"):
        model(torch.randn(1, 3, 12, 16), torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(1, 3, 9, 8), torch.zeros(1), "9x8; both sides must be a multiple of 2"),
        (torch.zeros(1, 3, 8, 9), torch.zeros(1), "8x9; both sides must be a multiple of 2"),
        (torch.zeros(1, 3, 0, 8), torch.zeros(1), "multiple of 2"),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1), r"\[B, 3, H, W\]"),
        (torch.zeros(3, 8, 8), torch.zeros(1), r"\[B, 3, H, W\]"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(1), "one time per picture"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([1.5]), r"\[0, 1\]"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([float("nan")]), r"\[0, 1\]"),
    ],
)
def test_bad_input_is_refused_with_the_reason(x, t, message):
    with pytest.raises(ValueError, match=message):
        small()(x, t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=(10, 16)), "multiple of 8"),
        (dict(channels=(8, 2**20)), "between 8 and 4096"),
        (dict(blocks=(1,)), "same number of stages"),
        (dict(blocks=(0, 1)), "1 to 64 per stage"),
        (dict(t_dim=3), "even number"),
        (dict(in_channels=0), "in_channels"),
        (dict(relaxation="other"), "delta, spec, only, off"),
    ],
)
def test_networks_that_cannot_be_meant_are_refused(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="nano, tiny, small, base, large"):
        ld.liquid_diffusion("huge")


def test_keyword_overrides_and_config_round_trip():
    model = ld.liquid_diffusion_nano(in_channels=1, relaxation="spec", channels=(8, 16), blocks=(1, 1))
    again = LiquidDiffusion(**model.config)
    assert again.config == model.config
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    assert model(torch.randn(1, 1, 8, 8), torch.tensor([0.3])).shape == (1, 1, 8, 8)


def test_gradient_checkpointing_changes_no_gradient():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    gradients = []
    for on in (False, True):
        model = randomise(small(gradient_checkpointing=on))
        model(x, t).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_no_module_attends():
    with torch.device("meta"):
        names = {type(module).__name__ for module in ld.liquid_diffusion_tiny().modules()}
    assert not [name for name in names if "attention" in name.lower()]


# ---- the liquid cell ------------------------------------------------------------------------------------------------


def test_cell_is_the_formula_of_the_specification():
    cell = randomise(ParallelCfC(8, 6)).double()
    x, t_emb = torch.randn(2, 8, 5, 7).double(), torch.randn(2, 6).double()
    z = F.silu(cell.backbone[0](cell.spatial(x)))
    a, b = cell.time_a(t_emb)[..., None, None], cell.time_b(t_emb)[..., None, None]
    gate = 1 / (1 + torch.exp(-(a * cell.f(z) - b)))
    g, h = (head[2](F.silu(head[0](z))) for head in (cell.g, cell.h))
    torch.testing.assert_close(cell(x, t_emb), gate * g + (1 - gate) * h)


def ncps_pair(mode, time_b_weight=0.0):
    """ncps' cell with hx = 0 and ours in reference mode, set to the same weights; float64."""
    from ncps.torch import CfCCell

    torch.manual_seed(0)
    channels, hidden = 6, 3
    theirs = CfCCell(
        channels, channels, mode=mode, backbone_activation="silu", backbone_units=hidden, backbone_layers=1
    )
    ours = ParallelCfC(channels, t_dim=1, gated=mode == "default", reference=True).double()
    theirs = theirs.double()
    with torch.no_grad():
        theirs.time_b.weight.mul_(time_b_weight)
        ours.backbone[0].weight.copy_(theirs.backbone[0].weight[:, :channels, None, None])
        ours.backbone[0].bias.copy_(theirs.backbone[0].bias)
        for conv, linear in ((ours.f, theirs.time_a), (ours.g[0], theirs.ff2), (ours.h[0], theirs.ff1)):
            conv.weight.copy_(linear.weight[:, :, None, None])
            conv.bias.copy_(linear.bias)
        ours.time_a.weight.fill_(1)
        ours.time_a.bias.zero_()
        ours.time_b.weight.zero_()
        ours.time_b.bias.copy_(-theirs.time_b.bias)
    return theirs, ours


def ncps_difference(mode, **options):
    theirs, ours = ncps_pair(mode, **options)
    x, ts = torch.randn(4, 6, 3, 2).double(), torch.rand(4, 1).double()
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 6)
    with torch.no_grad():
        expected, _ = theirs(pixels, torch.zeros_like(pixels), ts.repeat_interleave(6, dim=0))
        return (ours(x, ts).permute(0, 2, 3, 1).reshape(-1, 6) - expected).abs().max()


@pytest.mark.parametrize("mode", ["default", "no_gate"])
def test_reference_cell_equals_ncps(mode):
    assert ncps_difference(mode) < 1e-14


@pytest.mark.parametrize("mode", ["default", "no_gate"])
def test_a_shift_that_depends_on_features_is_not_ours(mode):
    """The negative control: ncps' time_b sees the features, ours the time alone."""
    assert ncps_difference(mode, time_b_weight=1.0) > 0.01


# ---- relaxation, modulation, mix -------------------------------------------------------------------------------------


def test_relaxation_forms_are_their_formulas():
    x, normed, cfc = torch.randn(3, 2, 8, 4, 4).double()
    t = torch.tensor([0.1, 0.9]).double()
    rho = torch.linspace(-3, 3, 8).double()
    alpha = torch.exp(-torch.log1p(torch.exp(rho)) * t[:, None])[..., None, None]
    expected = {
        "spec": x + alpha * normed + (1 - alpha) * cfc,
        "delta": x + (1 - alpha) * cfc,
        "only": alpha * x + (1 - alpha) * cfc,
        "off": x + cfc,
    }
    assert set(expected) == set(ld.RELAXATIONS)
    for form, value in expected.items():
        relaxation = LiquidRelaxation(8, form).double()
        relaxation.rho.data = rho
        torch.testing.assert_close(relaxation(x, normed, cfc, t), value)


def test_alpha_is_one_on_clean_data_and_a_half_on_noise_at_the_start():
    alpha = LiquidRelaxation(4).alpha(torch.tensor([0.0, 1.0]))
    assert (alpha[0] == 1).all()
    torch.testing.assert_close(alpha[1], torch.full_like(alpha[1], 0.5))


def test_a_block_of_the_specification_passes_clean_features_with_their_normalised_copy():
    """At t = 0 alpha is 1, so the cell has no say: what the specification's own algebra gives."""
    block = randomise(LiquidDiffusionBlock(8, 6, relaxation="spec"))
    x, normed = torch.randn(2, 1, 8, 4, 4)
    out = block.relaxation(x, normed, torch.full_like(x, 1e6), torch.zeros(1))
    torch.testing.assert_close(out, x + normed)


def test_branches_start_at_a_tenth_so_that_a_fresh_block_passes_x_on():
    blocks = []
    for branch_scale in ({}, dict(branch_scale=1.0)):
        torch.manual_seed(0)
        blocks.append(LiquidDiffusionBlock(16, 6, **branch_scale))
    small, full = ({name: p.detach() for name, p in block.named_parameters()} for block in blocks)
    last = ("cfc.g.2", "cfc.h.2", "mix.project", "ff.2")
    for name in full:
        share = 0.1 if name.rpartition(".")[0] in last else 1.0
        torch.testing.assert_close(small[name], share * full[name])
    x, t, t_emb = torch.randn(4, 16, 8, 8), torch.rand(4), torch.randn(4, 6)
    moved = [(block(x, t, t_emb) - x).square().mean().item() for block in blocks]
    assert moved[0] < 0.02 * moved[1]


def test_adaln_starts_as_plain_normalisation_per_group():
    x = torch.randn(2, 16, 5, 5) * 4 + 3
    normed = AdaLN(16, 6)(x, torch.randn(2, 6)).view(2, 8, -1)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1, unbiased=False), torch.ones(2, 8), atol=1e-4, rtol=0)


def test_merged_kernel_equals_the_three_convolutions():
    mix = randomise(MultiScaleSpatialMix(8, 6)).double()
    x, t_emb = torch.randn(2, 8, 9, 6).double(), torch.randn(2, 6).double()
    n = mix.norm(x)
    three = mix.dw3(n) + mix.dw5(n) + mix.dw7(n) + mix.pool_weight[:, None, None] * n.mean((2, 3), keepdim=True)
    scale, shift = mix.modulation.linear(t_emb)[..., None, None].chunk(2, 1)
    torch.testing.assert_close(mix(x, t_emb), mix.project(F.silu(three * (1 + scale) + shift)))


def test_every_parameter_learns():
    """After the zero-initialised modulations have moved, a gradient reaches every weight."""
    model = randomise(small())
    model(torch.randn(2, 3, 8, 8), torch.tensor([0.4, 0.9])).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_skips_join_twins():
    """Cutting one skip's channels in its SkipFusion changes the output: every stage's skip is in use."""
    model = small()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.5])
    before = model(x, t)
    for fuse in model.decoder.fuse:
        kept = fuse.weight.data.clone()
        nn.init.zeros_(fuse.weight[:, fuse.out_channels :])
        assert not torch.allclose(model(x, t), before)
        fuse.weight.data = kept
