"""The networks that benchmarks compare: ours in its forms, and diffusers' U-Nets and DiT of the same size, all as model(x, t)."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import liquid_diffusion as ld  # noqa: E402


class PlainModulation(ld.TimeModulation):
    def forward(self, x, t_emb):
        scale, shift = self.linear(t_emb)[:, :, None, None].chunk(2, dim=1)  # 2 x [B, C, 1, 1]
        return x * (1 + scale) + shift


class PlainAdaLN(PlainModulation):
    def forward(self, x, t_emb):
        return super().forward(F.group_norm(x, ld.GROUPS), t_emb)


class PlainCfC(ld.ParallelCfC):
    def forward(self, x, t_emb):
        z = self.backbone(self.spatial(x))
        gate, g, h = self.gate(z, t_emb), self.g(z), self.h(z)
        return gate * g + (1 - gate) * h


class PlainRelaxation(ld.LiquidRelaxation):
    def forward(self, x, normed, cfc, t):
        return x + (1 - self.alpha(t)) * cfc


class PlainMix(ld.MultiScaleSpatialMix):
    def forward(self, x, t_emb):
        x = self.norm(x)
        pooled = self.pool_weight[:, None, None] * x.mean(dim=(2, 3), keepdim=True)
        return self.project(F.silu(self.modulation(self.dw3(x) + self.dw5(x) + self.dw7(x) + pooled, t_emb)))


PLAIN = {
    ld.TimeModulation: PlainModulation,
    ld.AdaLN: PlainAdaLN,
    ld.ParallelCfC: PlainCfC,
    ld.LiquidRelaxation: PlainRelaxation,
    ld.MultiScaleSpatialMix: PlainMix,
}


def plain(preset="tiny", **overrides):
    """Every formula written out: three depthwise convolutions, no lerp or addcmul, PyTorch's default layout; relaxation "delta"."""
    model = ld.liquid_diffusion(preset, relaxation="delta", lean=False, **overrides)
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


def compiled(preset="tiny", **overrides):
    """The lean network, each block compiled by itself; PyTorch would compile the same code for eight widths and modes only."""
    torch._dynamo.config.recompile_limit = 64
    model = ld.liquid_diffusion(preset, **overrides)
    for module in model.modules():
        if isinstance(module, ld.LiquidDiffusionBlock):
            module.compile()
    return model


class UNet(nn.Module):
    """diffusers' UNet2DModel; attention, if any, in the two coarser of three stages and in the middle, heads `head` wide."""

    in_channels = 3

    def __init__(self, channels, attention, groups, head=32):
        super().__init__()
        from diffusers import UNet2DModel

        down, up = ["DownBlock2D"] * 3, ["UpBlock2D"] * 3
        if attention:
            down[1:], up[:2] = ["AttnDownBlock2D"] * 2, ["AttnUpBlock2D"] * 2
        options = dict(down_block_types=down, up_block_types=up, add_attention=attention, norm_num_groups=groups)
        self.net = UNet2DModel(block_out_channels=channels, layers_per_block=2, attention_head_dim=head, **options)

    def forward(self, x, t):
        return self.net(x, 1000 * t).sample


class PixelLinear(nn.Linear):
    """A linear layer whose weight has the shape of a 1x1 kernel, [A, C, 1, 1], so that our Muon takes it."""

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


class DiT(nn.Module):
    """diffusers' DiTTransformer2DModel of four heads of width `head`, with one class."""

    in_channels = 3

    def __init__(self, patch, size, head=64, layers=7):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        shape = dict(num_attention_heads=4, attention_head_dim=head, num_layers=layers, patch_size=patch)
        shape["sample_size"] = size
        self.net = DiTTransformer2DModel(**shape, in_channels=3, out_channels=3, num_embeds_ada_norm=1)
        for block in self.net.transformer_blocks:
            for layer in [*block.attn1.modules(), *block.ff.modules()]:
                if isinstance(layer, nn.Linear):
                    layer.__class__, layer.weight = PixelLinear, nn.Parameter(layer.weight.data[:, :, None, None])

    def forward(self, x, t):
        label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.net(x, timestep=1000 * t, class_labels=label).sample


class ResBlock(nn.Module):
    """The plain block in place of ours, x [B, C, H, W], t, t_emb -> x's shape: norm, SiLU, 3x3, twice, narrower inside."""

    def __init__(self, channels, t_dim):
        super().__init__()
        hidden = ld.GROUPS * round(0.62 * channels / ld.GROUPS)  # so that it has our block's number of weights
        self.norm1, self.norm2 = ld.AdaLN(channels, t_dim), ld.AdaLN(hidden, t_dim)
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x, t, t_emb):
        hidden = self.conv1(F.silu(self.norm1(x, t_emb)))
        return x + self.conv2(F.silu(self.norm2(hidden, t_emb)))


def replaced(block_of, preset="tiny", **overrides):
    """Our encoder and decoder with block_of(channels, t_dim) in place of every liquid block."""
    model = ld.liquid_diffusion(preset, **overrides)
    for stage in [module for module in model.modules() if isinstance(module, ld.Stage)]:
        for i, block in enumerate(stage):
            stage[i] = block_of(block.ff[0].in_channels, model.config["t_dim"])
    return model


def small_resblock(channels, t_dim):
    """A ResBlock whose last kernel starts at a tenth."""
    block = ResBlock(channels, t_dim)
    ld.start_small(0.1, block.conv2)
    return block


# ---- the liquid part, changed -----------------------------------------------------------------------------------------


class HalfGate(ld.ParallelCfC):
    """The gate is 1/2: the mean of the two heads."""

    def gate(self, z, t_emb):
        return z.new_full((), 0.5)


class InputGate(ld.ParallelCfC):
    """The gate sees the picture and not the time: slope and shift are learned constants."""

    def gate(self, z, t_emb):
        a, b = self.time_a.bias[:, None, None], self.time_b.bias[:, None, None]  # [C, 1, 1]
        return torch.sigmoid(a * self.f(z) - b)


class TimeGate(ld.ParallelCfC):
    """The gate sees the time and not the picture: one value per channel."""

    def gate(self, z, t_emb):
        return torch.sigmoid(-self.time_b(t_emb))[:, :, None, None].expand(-1, -1, *z.shape[2:])  # [B, C, H, W]


class FeatureShift(ld.ParallelCfC):
    """The shift depends on the picture too, as in ncps: gate = sigmoid(a(t) f(z) - b(t) - s(z)), one 1x1 kernel more."""

    def gate(self, z, t_emb):
        a, b = self.time_a(t_emb)[:, :, None, None], self.time_b(t_emb)[:, :, None, None]  # [B, C, 1, 1]
        return torch.sigmoid(a * self.f(z) - b - self.s(z))


class OneHead(ld.ParallelCfC):
    """No gate and no second head: h alone."""

    def forward(self, x, t_emb):
        return self.h(self.backbone(self.spatial(x)))


class NoCell(ld.ParallelCfC):
    """No cell: mix and feed-forward are left."""

    def forward(self, x, t_emb):
        return torch.zeros_like(x)


class PaperGate(ld.ParallelCfC):
    """gate = sigmoid(-f(z) t) with t itself and not its embedding, as the paper has it (arXiv 2106.13898, eq. 10)."""

    t = None  # [B], set by with_cell before each forward pass

    def gate(self, z, t_emb):
        return torch.sigmoid(-self.f(z) * self.t[:, None, None, None])


class NcpsGate(PaperGate):
    """gate = sigmoid(a(z) t + s(z)) as in ncps: a time constant and a shift from every pixel, t itself."""

    def gate(self, z, t_emb):
        return torch.sigmoid(self.f(z) * self.t[:, None, None, None] + self.s(z))


class GatedHead(ld.ParallelCfC):
    """gate h: the gate lets one head through, as a gated linear unit does, in place of choosing between two."""

    def forward(self, x, t_emb):
        z = self.backbone(self.spatial(x))
        return self.gate(z, t_emb) * self.h(z)


class TanhHeads(ld.ParallelCfC):
    """Both heads end in tanh, as in ncps."""

    def forward(self, x, t_emb):
        z = self.backbone(self.spatial(x))
        return torch.lerp(self.h(z).tanh(), self.g(z).tanh(), self.gate(z, t_emb))


class LiquidFusion(nn.Module):
    """SkipFusion as a CfC: gate g(skip) + (1 - gate) h(x), times two, so that a gate of 1/2 is our fusion; f sees their sum."""

    t_emb = None  # [B, D], set by gated_skips before each forward pass

    def __init__(self, fusion, t_dim):
        super().__init__()
        channels = fusion.out_channels
        self.heads, self.f = fusion, nn.Conv2d(channels, channels, 1)
        self.time_a, self.time_b = nn.Linear(t_dim, channels), nn.Linear(t_dim, channels)

    def forward(self, x, skip):
        weight, bias = self.heads.weight.chunk(2, dim=1), self.heads.bias[:, None, None]
        h, g = F.conv2d(x, weight[0]), F.conv2d(skip, weight[1])
        return 2 * torch.lerp(h, g, ld.ParallelCfC.gate(self, h + g, self.t_emb)) + bias


def gated_skips(preset="tiny", **overrides):
    """Ours with a liquid gate between each skip and what comes from below."""
    model = ld.liquid_diffusion(preset, **overrides)
    model.decoder.fuse = nn.ModuleList(LiquidFusion(fusion, model.config["t_dim"]) for fusion in model.decoder.fuse)
    model.register_forward_pre_hook(tell_embedding)
    return model


def tell_embedding(model, inputs):
    """Forward pre-hook: every LiquidFusion of the model learns the embedding of the t that the model is called with."""
    for fusion in model.decoder.fuse:
        fusion.t_emb = model.time(inputs[1])


def with_cell(cell, preset="tiny", **overrides):
    """Ours, by the formulas, with every ParallelCfC turned into `cell`."""
    model = ld.liquid_diffusion(preset, lean=False, **overrides)
    for module in list(model.modules()):
        if isinstance(module, ld.ParallelCfC):
            module.__class__ = cell
            if cell in (FeatureShift, NcpsGate):
                module.s = nn.Conv2d(module.f.in_channels, module.f.out_channels, 1)
    if issubclass(cell, PaperGate):
        model.register_forward_pre_hook(tell_time)
    return model


def tell_time(model, inputs):
    """Forward pre-hook: every PaperGate of the model learns the t that the model is called with."""
    for module in model.modules():
        if isinstance(module, PaperGate):
            module.t = inputs[1]


# ---- the block, changed ----------------------------------------------------------------------------------------------


class NoMixBlock(ld.LiquidDiffusionBlock):
    """Cell and feed-forward."""

    def formulas(self, x, t, t_emb):
        normed = self.norm_cfc(x, t_emb)
        x = self.relaxation(x, normed, self.cfc(normed, t_emb), t)
        return x + self.ff(self.norm_ff(x, t_emb))


class NoFeedForwardBlock(ld.LiquidDiffusionBlock):
    """Cell and mix."""

    def formulas(self, x, t, t_emb):
        normed = self.norm_cfc(x, t_emb)
        x = self.relaxation(x, normed, self.cfc(normed, t_emb), t)
        return x + self.mix(x, t_emb)


class NoCellBlock(ld.LiquidDiffusionBlock):
    """Mix and feed-forward."""

    def formulas(self, x, t, t_emb):
        x = x + self.mix(x, t_emb)
        return x + self.ff(self.norm_ff(x, t_emb))


class ChannelAttention(ld.MultiScaleSpatialMix):
    """The global mean scales each channel, by a 1x1 kernel and a sigmoid, in place of being added (arXiv 2505.11196, sec. 3.2)."""

    def forward(self, x, t_emb):
        x = self.norm(x)
        weight, bias = self.merged_kernel()
        mixed = F.conv2d(x, weight, bias, padding=3, groups=x.shape[1])
        mixed = mixed * torch.sigmoid(self.attend(mixed.mean(dim=(2, 3), keepdim=True)))
        return self.project(F.silu(self.modulation(mixed, t_emb)))


class MixedContext(nn.Module):
    """The cell's view of its surroundings by the mix's kernels: depthwise 3x3 + 5x5 + 7x7 + weighted global mean."""

    def __init__(self, mix):
        super().__init__()
        self.dw3, self.dw5, self.dw7, self.pool_weight = mix.dw3, mix.dw5, mix.dw7, mix.pool_weight

    def forward(self, x):
        weight, bias = ld.MultiScaleSpatialMix.merged_kernel(self)
        mean = self.pool_weight[:, None, None] * x.mean(dim=(2, 3), keepdim=True)
        return F.conv2d(x, weight, bias, padding=3, groups=x.shape[1]) + mean


def changed_blocks(change, preset="tiny", **overrides):
    """Ours, by the formulas, after change(block) on every block."""
    model = ld.liquid_diffusion(preset, lean=False, **overrides)
    for module in list(model.modules()):
        if isinstance(module, ld.LiquidDiffusionBlock):
            change(module)
    return model


def without_mix(block):
    block.__class__ = NoMixBlock
    del block.mix


def without_feed_forward(block):
    block.__class__ = NoFeedForwardBlock
    del block.norm_ff, block.ff


def without_cell(block):
    block.__class__ = NoCellBlock
    del block.norm_cfc, block.cfc, block.relaxation


def mix_in_cell(block):
    block.cfc.spatial = MixedContext(block.mix)
    without_mix(block)


def channel_attention(block):
    block.mix.__class__ = ChannelAttention
    block.mix.attend = nn.Conv2d(block.mix.project.in_channels, block.mix.project.in_channels, 1)


def no_gate(preset="tiny", **overrides):
    """h + gate g, ncps' "no_gate"."""
    model = ld.liquid_diffusion(preset, lean=False, **overrides)
    for module in model.modules():
        if isinstance(module, ld.ParallelCfC):
            module.gated = False
    return model


def with_rho(start, preset="tiny", **overrides):
    """Ours with rho started at start(channels) [C] instead of 0."""
    model = ld.liquid_diffusion(preset, **overrides)
    for module in model.modules():
        if isinstance(module, ld.LiquidRelaxation):
            module.rho.data.copy_(start(len(module.rho)))
    return model


def started(change, preset="tiny", **overrides):
    """Ours after change(model)."""
    model = ld.liquid_diffusion(preset, **overrides)
    change(model)
    return model


def zero_output(model):
    nn.init.zeros_(model.out[-1].weight)
    nn.init.zeros_(model.out[-1].bias)


def random_modulations(model):
    for module in model.modules():
        if isinstance(module, ld.TimeModulation):
            module.linear.reset_parameters()


def small_networks(size):
    """Name -> function that builds a network of about 0.9M parameters, for pictures of size x size.

    All of ours start by PyTorch's own rule, as "ours" does, but those named "small"; "branches start small" is the network as users get it.
    """
    start = dict(preset="nano", branch_scale=1.0)
    nano = partial(ld.liquid_diffusion, **start)
    return {
        "ours": nano,
        "formulas": partial(nano, lean=False),
        "unet": partial(UNet, (24, 40, 56), False, 8),
        "unet-attention": partial(UNet, (24, 32, 56), True, 8, 8),
        "dit-2": partial(DiT, 2, size, 26, 4),
        "resblocks": partial(replaced, ResBlock, **start),
        "gate 1-2": partial(with_cell, HalfGate, **start),
        "gate of the picture": partial(with_cell, InputGate, **start),
        "gate of the time": partial(with_cell, TimeGate, **start),
        "one head, no gate": partial(with_cell, OneHead, **start),
        "no cell": partial(with_cell, NoCell, **start),
        "relaxation off": partial(nano, relaxation="off"),
        "relaxation spec": partial(nano, relaxation="spec"),
        "relaxation only": partial(nano, relaxation="only"),
        "rho from 3": partial(with_rho, lambda n: torch.full((n,), 3.0), **start),
        "rho spread, -3 to 3": partial(with_rho, lambda n: torch.linspace(-3, 3, n), **start),
        "shift of picture and time": partial(with_cell, FeatureShift, **start),
        "h + gate g": partial(no_gate, **start),
        "gate of the paper": partial(with_cell, PaperGate, **start),
        "gate of ncps": partial(with_cell, NcpsGate, **start),
        "gate times h": partial(with_cell, GatedHead, **start),
        "tanh heads": partial(with_cell, TanhHeads, **start),
        "no mix": partial(changed_blocks, without_mix, **start, channels=(32, 64, 112)),
        "no cell, wider": partial(changed_blocks, without_cell, **start, channels=(40, 72, 112)),
        "mix in the cell": partial(changed_blocks, mix_in_cell, **start, channels=(32, 72, 104)),
        "no feed-forward": partial(changed_blocks, without_feed_forward, **start, channels=(40, 80, 136)),
        "channel attention": partial(changed_blocks, channel_attention, **start, channels=(32, 64, 88)),
        "branches start small": partial(ld.liquid_diffusion, "nano"),
        "small start, gate 1-2": partial(with_cell, HalfGate, "nano"),
        "small start, relaxation off": partial(ld.liquid_diffusion, "nano", relaxation="off"),
        "small start, relaxation spec": partial(ld.liquid_diffusion, "nano", relaxation="spec"),
        "small start, no cell, wider": partial(changed_blocks, without_cell, "nano", channels=(40, 80, 112)),
        "small start, relaxation only": partial(ld.liquid_diffusion, "nano", relaxation="only"),
        "small start, gate on the skips": partial(gated_skips, "nano"),
        "small start, output starts at zero": partial(started, zero_output, "nano"),
        "small start, time embedding of 8": partial(ld.liquid_diffusion, "nano", t_dim=8, channels=(32, 64, 104)),
        "small start, time embedding of 48": partial(ld.liquid_diffusion, "nano", t_dim=48, channels=(32, 56, 88)),
        "small start, time embedding of 64": partial(ld.liquid_diffusion, "nano", t_dim=64, channels=(32, 56, 80)),
        "small start, resblocks": partial(replaced, small_resblock, "nano"),
        "cell on a dense 3x3": partial(ld.liquid_diffusion, "nano", "dense"),
        "cell on a dense 3x3, gate 1-2": partial(with_cell, HalfGate, "nano", recipe="dense"),
        "output starts at zero": partial(started, zero_output, **start),
        "modulations start at random": partial(started, random_modulations, **start),
    }


def networks(size, preset="tiny"):
    """Name -> function that builds the network, for pictures of size x size."""
    return {
        "plain": partial(plain, preset),
        "formulas": partial(ld.liquid_diffusion, preset, lean=False),
        "lean": partial(ld.liquid_diffusion, preset),
        "checkpointing": partial(ld.liquid_diffusion, preset, gradient_checkpointing=True),
        "compiled": partial(compiled, preset),
        "unet-attention": partial(UNet, (64, 128, 160), True, 32),
        "unet": partial(UNet, (64, 128, 176), False, 16),
        "dit-2": partial(DiT, 2, size),
        "dit-4": partial(DiT, 4, size),
    }
