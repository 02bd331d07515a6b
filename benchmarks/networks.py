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
    """diffusers' UNet2DModel; attention, if any, in the two coarser of three stages and in the middle, heads 32 wide."""

    def __init__(self, channels, attention):
        super().__init__()
        from diffusers import UNet2DModel

        down, up = ["DownBlock2D"] * 3, ["UpBlock2D"] * 3
        if attention:
            down[1:], up[:2] = ["AttnDownBlock2D"] * 2, ["AttnUpBlock2D"] * 2
        groups = 32 if attention else 16  # 176 channels do not divide into 32
        options = dict(down_block_types=down, up_block_types=up, add_attention=attention, norm_num_groups=groups)
        self.net = UNet2DModel(block_out_channels=channels, layers_per_block=2, attention_head_dim=32, **options)

    def forward(self, x, t):
        return self.net(x, 1000 * t).sample


class DiT(nn.Module):
    """diffusers' DiTTransformer2DModel of width 256 and 7 layers, with one class."""

    def __init__(self, patch, size):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        shape = dict(num_attention_heads=4, attention_head_dim=64, num_layers=7, patch_size=patch, sample_size=size)
        self.net = DiTTransformer2DModel(**shape, in_channels=3, out_channels=3, num_embeds_ada_norm=1)

    def forward(self, x, t):
        label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.net(x, timestep=1000 * t, class_labels=label).sample


def networks(size, preset="tiny"):
    """Name -> function that builds the network, for pictures of size x size."""
    return {
        "plain": partial(plain, preset),
        "formulas": partial(ld.liquid_diffusion, preset, lean=False),
        "lean": partial(ld.liquid_diffusion, preset),
        "compiled": partial(compiled, preset),
        "unet-attention": partial(UNet, (64, 128, 160), True),
        "unet": partial(UNet, (64, 128, 176), False),
        "dit-2": partial(DiT, 2, size),
        "dit-4": partial(DiT, 4, size),
    }
