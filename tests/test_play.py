"""Laws of editing, guidance, blending and of the liquid maps; films are read back."""

import io
import math
import shutil
import subprocess

import pytest
import torch
from PIL import Image

import ld_play
from ld_utils import from_uint8
from liquid_diffusion import LiquidDiffusion, integrate, interpolate, set_lean, time_grid


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    """Small, with weights of ordinary size everywhere, so that time and place matter."""
    net = LiquidDiffusion((16, 24), (1, 2), t_dim=16).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


# ---- slerp ----------------------------------------------------------------------------------------------------------


def test_slerp_starts_and_ends_exactly_and_keeps_the_norm():
    a, b = rand(3, 8, 8, seed=1), rand(3, 8, 8, seed=2)
    b = b * (a.norm() / b.norm())
    arc = ld_play.slerp(a, b, torch.linspace(0, 1, 9))
    assert torch.equal(arc[0], a) and torch.equal(arc[-1], b)
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), a.norm().expand(9))
    steps = arc.diff(dim=0).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-4, atol=0)  # and its pace
    straight = torch.lerp(a, b, 0.5)
    assert straight.norm() < 0.8 * a.norm()  # what slerp is for


def test_slerp_between_equal_noises_is_that_noise():
    a = rand(3, 8, 8)
    torch.testing.assert_close(ld_play.slerp(a, a, torch.linspace(0, 1, 3)), a.expand(3, -1, -1, -1))


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_of_weight_one_is_the_plain_model_and_zero_the_weaker(model):
    weaker = LiquidDiffusion((8,), (1,), t_dim=8).eval().requires_grad_(False)
    x, t = rand(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    good, bad = model(x, t), weaker(x, t)
    assert torch.equal(ld_play.autoguide(model, weaker, 1.0)(x, t), good)
    assert torch.equal(ld_play.autoguide(model, weaker, 0.0)(x, t), bad)
    torch.testing.assert_close(ld_play.autoguide(model, weaker, 3.0)(x, t), bad + 3 * (good - bad))


def test_guidance_corrects_an_error_that_the_weaker_model_has_twice():
    """The hope behind it: where both err alike, the weaker more, weight 2 lands on the truth."""
    truth, x, t = rand(1, 3, 8, 8, seed=3), rand(1, 3, 8, 8), torch.ones(1)
    error = rand(1, 3, 8, 8, seed=4)
    guided = ld_play.autoguide(lambda x, t: truth + error, lambda x, t: truth + 2 * error, 2.0)
    torch.testing.assert_close(guided(x, t), truth)


# ---- variation ------------------------------------------------------------------------------------------------------


def test_variation_returns_the_picture_at_zero_and_forgets_it_at_one(model):
    first, second, noise = rand(2, 3, 8, 8, seed=5).tanh(), rand(2, 3, 8, 8, seed=6).tanh(), rand(2, 3, 8, 8)
    assert torch.equal(ld_play.vary(model, first, noise, 0.0, num_steps=4), first)
    assert torch.equal(ld_play.vary(model, first, noise, 1.0, 4), ld_play.vary(model, second, noise, 1.0, 4))
    halfway = [ld_play.vary(model, images, noise, 0.5, 4) for images in (first, second)]
    assert (halfway[0] - halfway[1]).norm() > 1e-2


def test_variation_from_one_is_what_the_sampler_gives(model):
    noise = rand(2, 3, 8, 8)
    *_, sampled = integrate(model, noise, time_grid(5))
    torch.testing.assert_close(ld_play.vary(model, torch.zeros(2, 3, 8, 8), noise, 1.0, 5), sampled)


def test_variation_follows_a_straight_path_back_exactly():
    """The right velocity of one picture is known, and constant along its path: any number of steps returns the picture."""
    picture, noise = rand(1, 3, 8, 8).tanh(), rand(1, 3, 8, 8, seed=1)
    back = ld_play.vary(lambda x, t: noise - picture, picture, noise, 0.7, num_steps=3)
    torch.testing.assert_close(back, picture, rtol=0, atol=1e-6)
    start = interpolate(picture, noise, torch.tensor([0.7]))
    forgotten = ld_play.vary(lambda x, t: torch.zeros_like(x), picture, noise, 0.7, 3)
    assert torch.equal(forgotten, start)  # and it set out where the convention says


# ---- inpainting -----------------------------------------------------------------------------------------------------


def test_inpainting_keeps_known_pixels_exactly_and_fills_the_others(model):
    images, noise = rand(2, 3, 8, 8, seed=7).tanh(), rand(2, 3, 8, 8)
    known = ld_play.outside_box(8, x=2, y=1, width=3, height=4)
    filled = ld_play.inpaint(model, images, known, noise, num_steps=4, repeats=2)
    assert torch.equal(filled[..., known], images[..., known])
    other = ld_play.inpaint(model, images, known, rand(2, 3, 8, 8, seed=9), num_steps=4, repeats=2)
    assert (filled != other)[..., ~known].float().mean() > 0.9
    assert torch.equal(ld_play.inpaint(model, images, torch.tensor(True), noise, 4), images)


def test_the_box_lies_where_its_corner_says():
    known = ld_play.outside_box(8, x=2, y=1, width=3, height=4)
    assert (~known).sum() == 12
    assert not known[1, 2] and not known[4, 4] and known[0, 2] and known[5, 4] and known[1, 5]


def test_renoised_states_have_the_spread_of_their_time():
    data, noise = 0.5 * rand(200_000, seed=1), rand(200_000, seed=2)
    later = ld_play.renoise(0.8 * data + 0.2 * noise, s=0.2, t=0.6, generator=torch.Generator().manual_seed(3))
    assert later.var().item() == pytest.approx((0.4 * 0.5) ** 2 + 0.6**2, rel=0.02)
    assert (later * data).mean().item() == pytest.approx(0.4 * 0.5**2, rel=0.02)  # as much of the data as at t


def pair_velocity(correlation):
    """The exact velocity for data of two normal pixels with that correlation; states [B, 1, 1, 2]."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])

    def velocity(x, t):
        t = t[0]
        state = (1 - t) ** 2 * covariance + t**2 * torch.eye(2)
        return x @ (torch.linalg.inv(state) @ (t * torch.eye(2) - (1 - t) * covariance))

    return velocity


def test_repeats_make_the_new_pixel_agree_with_the_known_one():
    """Known pixel 1, correlation 0.9: the other one's conditional mean is 0.9 and its spread sqrt(1 - 0.81) = 0.436."""
    count, known = 20_000, torch.tensor([True, False])
    means, spreads = [], []
    for repeats in (1, 10):
        generator = torch.Generator().manual_seed(repeats)
        noise = torch.randn(count, 1, 1, 2, generator=generator)
        filled = ld_play.inpaint(pair_velocity(0.9), torch.ones(count, 1, 1, 2), known, noise, 50, repeats, generator)
        means.append(filled[..., 1].mean().item())
        spreads.append(filled[..., 1].std().item())
    assert abs(means[1] - 0.9) < 0.05 < abs(means[0] - 0.9)
    assert abs(spreads[1] - 0.436) < 0.05 < abs(spreads[0] - 0.436)


# ---- beside the training pictures -----------------------------------------------------------------------------------


def test_nearest_finds_each_picture_and_its_mirror_image_in_order():
    pool = torch.randint(0, 256, (2500, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    asked = from_uint8(pool[[2400, 7]])
    asked[1] = asked[1].flip(-1)
    distance, row = ld_play.nearest(asked, pool, 3)
    assert row[:, 0].tolist() == [2400, 7]
    assert distance[:, 0].max() < 1e-3 and (distance.diff(dim=1) >= 0).all()
    by_hand = [(from_uint8(pool) - from_uint8(pool[[2400]]).flip(dims)).square().mean((1, 2, 3)) for dims in ([], [-1])]
    big = pool[:3].repeat_interleave(32, 2).repeat_interleave(32, 3)  # 128 px, but flat within 32 px
    assert ld_play.nearest(from_uint8(big), pool[:3].repeat_interleave(8, 2).repeat_interleave(8, 3))[0].max() < 1e-3
    torch.testing.assert_close(distance[0], torch.minimum(*by_hand).sqrt().sort().values[:3], rtol=1e-3, atol=1e-3)


# ---- liquid maps ----------------------------------------------------------------------------------------------------


def test_watched_gates_are_those_the_cells_use_in_both_forms_of_the_block(model):
    x, t = rand(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    used = {}
    for name, block in ld_play.stage_ends(model).items():
        original = block.cfc.gate

        def spy(z, t_emb, name=name, original=original):
            used[name] = original(z, t_emb)
            return used[name]

        block.cfc.gate = spy
    set_lean(model, False)
    plain = model(x, t)
    formulas = dict(used)
    for lean in (False, True):
        set_lean(model, lean)
        with ld_play.watch_gates(model) as gates:
            watched = model(x, t)
        torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
        assert list(gates) == ["encoder 1", "encoder 2", "bottleneck", "decoder 1", "decoder 2"]
        for name, gate in gates.items():
            torch.testing.assert_close(gate, formulas[name], rtol=1e-4, atol=1e-5)
        gates.clear()
        model(x, t)
        assert not gates  # outside nobody watches


def test_time_constant_is_that_of_the_decay_which_the_gate_stands_for():
    t = torch.tensor([0.25, 1.0])
    tau = torch.tensor([0.1, 3.0])
    gate = torch.exp(-t / tau)[:, None, None, None].expand(2, 5, 4, 4)
    torch.testing.assert_close(ld_play.time_constant(gate, t), tau[:, None, None].expand(2, 4, 4))
    mixed = torch.exp(-1 / torch.tensor([0.5, 2.0]))[None, :, None, None]  # rates 2 and 0.5: mean 1.25
    assert ld_play.time_constant(mixed, torch.ones(1)).item() == pytest.approx(1 / 1.25)
    extremes = torch.tensor([0.0, 1.0])[:, None, None, None]
    low, high = ld_play.time_constant(extremes, torch.ones(2)).flatten().tolist()
    assert 0 < low < 0.1 and 1e5 < high < math.inf


def test_maps_film_draws_each_time_once(model):
    t = torch.tensor([0.9, 0.5, 0.1])
    states = rand(3, 3, 8, 8)
    velocity, gates, taus = ld_play.liquid_maps(model, states, t)
    torch.testing.assert_close(velocity, model(states, t))
    assert {stage: tuple(gate.shape) for stage, gate in gates.items()} == {
        stage: tuple(x.shape) for stage, x in taus.items()
    }
    assert gates["encoder 1"].shape == (3, 8, 8) and gates["bottleneck"].shape == (3, 4, 4)
    frames = ld_play.maps_film(states, velocity, gates, taus, t)
    pictures = [Image.open(io.BytesIO(frame)) for frame in frames]
    assert len(set(frames)) == 3 and len({picture.size for picture in pictures}) == 1


# ---- films ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def frames():
    film = torch.linspace(-1, 1, 6)[:, None, None, None, None].expand(6, 2, 3, 8, 8)
    return ld_play.film_frames(film, columns=2, scale=3)


def test_gif_holds_every_frame_at_its_pace(frames, tmp_path):
    with Image.open(ld_play.save_gif(frames, tmp_path / "film.gif", seconds=0.1)) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (6, frames[0].size, 100, 0)
        gif.seek(5)
        assert gif.convert("L").getpixel((9, 9)) == 255


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="there is no ffmpeg here to write or read an MP4")
def test_mp4_holds_every_frame_at_its_pace(frames, tmp_path):
    path = ld_play.save_mp4(frames, tmp_path / "film.mp4", seconds=0.1)
    told = subprocess.run(["ffmpeg", "-i", path], capture_output=True, text=True).stderr  # ends for want of an output
    assert "10 fps" in told and "Duration: 00:00:00.60" in told
    command = ["ffmpeg", "-loglevel", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    width, height = (side + side % 2 for side in frames[0].size)
    pixels = torch.frombuffer(
        bytearray(subprocess.run(command, capture_output=True, check=True).stdout), dtype=torch.uint8
    )
    centres = pixels.view(6, height, width)[:, 9, 9].tolist()
    assert centres == pytest.approx([0, 51, 102, 153, 204, 255], abs=4)


def test_without_ffmpeg_a_sentence_says_so(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(ld_play.shutil, "which", lambda name: None)
    monkeypatch.setattr(ld_play, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="There is no ffmpeg here"):
        ld_play.save_mp4(frames, tmp_path / "film.mp4")
