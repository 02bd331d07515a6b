"""Reflow: a flow trained on its own pairs of noise and picture, so that its paths straighten and few steps are enough.

Time convention as everywhere: t = 0 is data, t = 1 is noise, v = noise - data. Models are called as model(x, t).
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch


def curvature(states, times):
    """How far paths are from straight lines: S = integral over t of E ||v - (x_1 - x_0)||^2 (arXiv 2209.03003, sec. 2.2).

    states [T + 1, B, ...] along times (T + 1 numbers) -> the integrand in each of the T steps, per value of x, [T]. S is
    their mean if the steps are equal. Zero for straight paths, each at a constant speed.
    """
    steps = torch.as_tensor(times, dtype=states.dtype, device=states.device).diff()
    velocity = states.diff(dim=0) / steps.view(-1, *[1] * (states.ndim - 1))  # [T, B, ...]
    chord = (states[-1] - states[0]) / steps.sum()
    return (velocity - chord).square().flatten(1).mean(1)


def u_shaped_density(t, a=4.0):
    """Density of u_shaped_times at t in [0, 1]: the same near both ends, cosh(a / 2) times as high there as in the middle."""
    return a * torch.cosh(a * (t - 0.5)) / (2 * math.sinh(a / 2))


def u_shaped_times(n, generator, a=4.0):
    """n times in [0, 1], [n], most of them near the ends, where reflow errs most (arXiv 2405.20320, sec. 4.1, symmetric)."""
    uniform = torch.rand(n, generator=generator, device=generator.device)
    return 0.5 + torch.asinh((2 * uniform - 1) * math.sinh(a / 2)) / a  # the inverse of the distribution function


def uniform_times(n, generator):
    """n times in [0, 1], [n]."""
    return torch.rand(n, generator=generator, device=generator.device)


def squared_error(prediction, target):
    """mean ||prediction - target||^2 per value."""
    return (prediction - target).square().mean()


def pseudo_huber(prediction, target, c=None):
    """mean over the batch of sqrt(||prediction - target||^2 + c^2) - c, per value; c is 0.00054 d for d values (arXiv 2405.20320).

    Quadratic for errors far below c, proportional to their length far above: large errors count less than when squared.
    """
    error = (prediction - target).flatten(1)  # [B, d]
    c = 0.00054 * error.shape[1] if c is None else c
    return ((error.square().sum(1) + c * c).sqrt() - c).mean() / error.shape[1]


def reflow(
    model,
    update,
    images,
    noise,
    steps,
    batch_size,
    times=u_shaped_times,
    loss=pseudo_huber,
    seed=0,
    autocast=nullcontext,
):
    """Train model to go straight from noise [N, ...] to the images [N, ...] that a flow made of it; yields the loss of each step.

    update: the model's WeightUpdate, whose averaged weights are the result. times(n, generator) -> [n]; loss(v, target).
    autocast: a function that gives a context for the model's call.
    """
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        t = times(batch_size, generator).to(images.device)
        x_0, x_1 = images[chosen], noise[chosen]
        share = t.view(-1, *[1] * (x_0.ndim - 1))  # [B, 1, ...]
        with autocast():
            velocity = model((1 - share) * x_0 + share * x_1, t)
        value = loss(velocity.float(), x_1 - x_0)
        update.scaler.scale(value).backward()
        update.step(step / steps)
        yield value.detach()
    update.settle()
