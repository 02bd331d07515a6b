"""Laws of reflow: its distribution of times, its loss, its measure of straightness, and that it straightens."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ld_reflow
from liquid_diffusion import WeightUpdate, integrate, time_grid

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from few_steps import chance, sliced_wasserstein  # noqa: E402


def test_times_have_the_density_of_the_formula():
    """0.005 is five standard errors of a bin's share."""
    times = ld_reflow.u_shaped_times(200_000, torch.Generator().manual_seed(0))
    assert 0 <= times.min() and times.max() <= 1
    shares = torch.histogram(times, bins=10, range=(0, 1)).hist.double() / len(times)
    fine = torch.linspace(0, 1, 10_001).double()
    density = ld_reflow.u_shaped_density(fine)
    expected = [torch.trapezoid(density[i * 1000 : (i + 1) * 1000 + 1], dx=1e-4) for i in range(10)]
    torch.testing.assert_close(shares, torch.stack(expected), atol=0.005, rtol=0)
    assert torch.trapezoid(density, fine) == pytest.approx(1)
    assert density[0] / density[5000] == pytest.approx(math.cosh(2))


def test_pseudo_huber_is_quadratic_below_c_and_linear_above():
    direction = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    direction /= direction.norm()
    zero, d, c = torch.zeros_like(direction), 48, 0.00054 * 48
    for length in (1e-4 * c, 1e-3 * c):
        assert ld_reflow.pseudo_huber(length * direction, zero) == pytest.approx(length**2 / (2 * c) / d, rel=1e-3)
    for length in (1e4 * c, 1e5 * c):
        assert ld_reflow.pseudo_huber(length * direction, zero) == pytest.approx(length / d, rel=1e-3)
    one, two = (ld_reflow.pseudo_huber(x, 0 * x, c=1.0) for x in (direction, 2 * direction))
    both = torch.cat([direction, 2 * direction])
    assert ld_reflow.pseudo_huber(both, 0 * both, c=1.0) == pytest.approx((one + two).item() / 2)


def test_curvature_is_zero_on_straight_lines_and_known_on_a_parabola():
    start = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    times = [1.0, 0.7, 0.4, 0.1, 0.0]
    straight = torch.stack([start * (3 - 2 * t) for t in times])
    torch.testing.assert_close(ld_reflow.curvature(straight, times), torch.zeros(4).double())
    times = time_grid(1000)
    parabola = torch.stack([start * t**2 for t in times])  # v = 2 t start and the chord is start: the integral is 1/3
    mean = ld_reflow.curvature(parabola, times).mean()
    assert mean == pytest.approx(start.square().mean().item() / 3, rel=1e-4)
    assert ld_reflow.curvature(
        torch.stack([start * t**0.5 for t in (1.0, 0.25, 0.0)]), [1.0, 0.25, 0.0]
    ) == pytest.approx([start.square().mean().item() * (2 / 3 - 1) ** 2, start.square().mean().item()])


CENTRES, WIDTH = torch.tensor([-1.0, 0.2, 1.5]), 0.3  # data: a mixture of three Gaussians on a line, equally often


def mixture_velocity(x, t):
    """E[noise - data | x_t = x], exact for that data and independent noise: x [B, 1], t [B] -> [B, 1]."""
    t = t[:, None]
    variance = ((1 - t) * WIDTH) ** 2 + t**2  # of x_t given the Gaussian
    off = x - (1 - t) * CENTRES  # [B, 3]
    belongs = (-(off**2) / (2 * variance)).softmax(1)
    noise, data = t * off / variance, CENTRES + (1 - t) * WIDTH**2 * off / variance
    return (belongs * (noise - data)).sum(1, keepdim=True)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def path(model, noise, steps):
    with torch.no_grad():
        return torch.stack(list(integrate(model, noise, time_grid(steps))))


@pytest.mark.parametrize("loss", [ld_reflow.squared_error, ld_reflow.pseudo_huber])
def test_reflow_straightens_a_flow_on_a_line(loss):
    """On a line the flow keeps the order of points, so straight paths between its pairs cannot cross: reflow can be exact."""
    torch.manual_seed(0)
    noise, fresh = torch.randn(2, 2000, 1)
    images = path(mixture_velocity, noise, 100)[-1]
    model = Small()
    update = WeightUpdate(model, torch.float32, lr=2e-2, total_steps=1200)
    losses = list(ld_reflow.reflow(model, update, images, noise, 1200, 256, loss=loss))
    assert len(losses) == update.steps == 1200
    before, after = (path(velocity, fresh, 100) for velocity in (mixture_velocity, update.ema.model))
    bent = ld_reflow.curvature(before, time_grid(100)).mean()
    assert ld_reflow.curvature(after, time_grid(100)).mean() < bent / 100
    one_step = [
        (path(velocity, fresh, 1)[-1] - before[-1]).square().mean() for velocity in (mixture_velocity, update.ema.model)
    ]
    assert one_step[1] < one_step[0] / 100


def test_distance_of_sets_is_zero_for_a_reordering_and_known_for_a_shift():
    """A shift moves every projection by its own: the mean square over directions is |shift|^2 / d, 9 % its standard error."""
    generator = torch.Generator().manual_seed(0)
    real, shift = torch.randn(300, 3, 8, 8, generator=generator), torch.randn(3, 8, 8, generator=generator)
    assert sliced_wasserstein(real, real.flip(0)) < 1e-6
    expected = (shift.norm() / shift.numel() ** 0.5).item()
    assert sliced_wasserstein(real, real + shift) == pytest.approx(expected, rel=0.15)
    low, high = chance(real, 100)
    assert 0 < low < high < sliced_wasserstein(real[100:], real[:100] + shift)
