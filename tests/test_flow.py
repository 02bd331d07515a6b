"""Laws of path, loss and samplers: formulas, order of convergence, equality with diffusers and torchdiffeq."""

import math

import pytest
import torch

import liquid_diffusion as ld
from liquid_diffusion import integrate, interpolate, sample_times, shift_times, time_grid, velocity_loss


def last(states):
    *_, state = states
    return state


def small_model():
    torch.manual_seed(0)
    return ld.LiquidDiffusion(channels=(8, 16), blocks=(1, 1))


def test_path_runs_from_data_to_noise_and_its_slope_is_the_velocity():
    data, noise = torch.randn(2, 4, 3, 5, 5).double()
    torch.testing.assert_close(interpolate(data, noise, torch.zeros(4)), data)
    torch.testing.assert_close(interpolate(data, noise, torch.ones(4)), noise)
    t = torch.rand(4).double()
    slope = (interpolate(data, noise, t + 1e-3) - interpolate(data, noise, t - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, noise - data)


def test_loss_is_the_mean_square_of_the_velocity_error_in_float32():
    data, noise = torch.randn(2, 4, 3, 6, 6)
    t = torch.rand(4)

    def model(x, t):
        return (2 * x + t[:, None, None, None]).half()

    expected = (
        ((2 * interpolate(data, noise, t) + t[:, None, None, None]).half().float() - (noise - data)).square().mean()
    )
    loss = velocity_loss(model, data, noise, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


# ---- solvers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence_on_a_linear_equation(solver, order):
    """dx/dt = A x from t = 1 to 0 has the solution exp(-A) x(1); the error falls as N ** -order."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, 5, generator=generator).double() / 3
    start = torch.randn(2, 5, 1, 1, generator=generator).double()
    exact = (torch.matrix_exp(-A) @ start.flatten(1).T).T

    def model(x, t):
        return (A @ x.flatten(1).T).T.reshape(x.shape)

    errors = [(last(integrate(model, start, time_grid(n), solver)).flatten(1) - exact).norm() for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence_where_the_velocity_depends_on_time(solver, order):
    """dx/dt = -2 t x from t = 1 to 0 has the solution e x(1): a slope taken at the wrong time costs an order."""
    start = torch.ones(1, 1, 1, 1).double()
    errors = [
        (last(integrate(lambda x, t: -2 * t[:, None, None, None] * x, start, time_grid(n), solver)) - math.e).abs()
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ld.SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_constant_velocity_is_followed_exactly(solver, steps):
    velocity, start = torch.randn(2, 2, 3, 4, 4)
    end = last(integrate(lambda x, t: velocity, start, time_grid(steps), solver))
    torch.testing.assert_close(end, start - velocity, atol=1e-5, rtol=1e-5)


def test_euler_is_the_loop_of_the_specification():
    model, z, n = small_model(), torch.randn(2, 3, 8, 8), 7
    with torch.no_grad():
        ours = last(integrate(model, z, time_grid(n)))
        for i in range(n, 0, -1):
            z = z - model(z, torch.full((2,), i / n)) / n
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_the_scheduler_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, z, times = small_model(), torch.randn(2, 3, 8, 8), time_grid(9, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=times[:-1])
    with torch.no_grad():
        ours = last(integrate(model, z, times))
        for t in scheduler.timesteps:
            z = scheduler.step(model(z, (t / 1000).expand(2)), t, z).prev_sample
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_solvers_equal_torchdiffeq(solver):
    from torchdiffeq import odeint

    model, z, times = small_model(), torch.randn(2, 3, 8, 8), time_grid(6)
    with torch.no_grad():
        ours = list(integrate(model, z, times, solver))
        theirs = odeint(lambda t, x: model(x, t.clamp(0, 1).expand(2)), z, torch.tensor(times), method=solver)
    torch.testing.assert_close(torch.stack(ours), theirs, atol=1e-5, rtol=1e-5)


def test_state_stays_in_float32_around_a_half_precision_model():
    states = list(integrate(lambda x, t: x.bfloat16(), torch.randn(1, 3, 4, 4).bfloat16(), time_grid(3)))
    assert {state.dtype for state in states} == {torch.float32}


def test_slopes_of_a_half_precision_model_are_added_in_float32():
    """1 + 2**-8 needs more digits than bfloat16 has: Heun's mean of the two slopes keeps them."""
    slopes = iter([1.0, 2**-8])
    end = last(integrate(lambda x, t: torch.full_like(x, next(slopes)).bfloat16(), torch.zeros(1), [1.0, 0.0], "heun"))
    assert end.item() == -(1 + 2**-8) / 2


def test_grid_runs_from_noise_to_data_in_even_steps():
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="at least one step"):
        time_grid(0)
    with pytest.raises(ValueError, match="euler, heun, midpoint"):
        next(integrate(None, torch.zeros(1), [1, 0], "rk4"))


# ---- times of training ----------------------------------------------------------------------------------------------


def draw(n=40_000, **options):
    return sample_times(n, torch.Generator().manual_seed(0), **options).double()


def test_uniform_times_have_the_moments_of_the_uniform_distribution():
    t = draw(distribution="uniform")
    assert t.min() >= 0
    assert t.max() <= 1
    assert t.mean() == pytest.approx(1 / 2, abs=0.01)
    assert t.var() == pytest.approx(1 / 12, abs=0.002)


def test_logit_normal_times_are_normal_in_the_logit():
    logit = torch.logit(draw(uniform_share=0.0))
    assert logit.mean() == pytest.approx(0, abs=0.02)
    assert logit.std() == pytest.approx(1, abs=0.02)


def test_the_uniform_share_reaches_both_ends():
    """Below 0.01 lies 1 % of the uniform share and next to nothing of the logit-normal."""
    assert (draw(uniform_share=0.0) < 0.01).double().mean() < 1e-4
    assert (draw(uniform_share=0.5) < 0.01).double().mean() == pytest.approx(0.005, abs=0.0015)


def test_shift_moves_times_towards_noise_and_keeps_the_ends():
    t = torch.linspace(0, 1, 11).double()
    shifted = shift_times(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_times(shifted, 1 / 3), t)  # the inverse
    torch.testing.assert_close(draw(shift=3.0), shift_times(draw(), 3.0))


def test_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="'logit-normal' or 'uniform'"):
        draw(distribution="cosine")
