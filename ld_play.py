"""What can be done with a trained flow: vary, fill in, blend and guide pictures, look inside the network, write films.

Everywhere velocity(x, t) is a model or a function like one: x [B, C, H, W] and t [B] in [0, 1] give dx/dt, the shape of x.
Time convention: t = 0 is data, t = 1 is noise; images are float [B, C, H, W] in [-1, 1].
"""

from __future__ import annotations

import math
import shutil
import subprocess
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from ld_utils import draw_grid, from_uint8, grid_image, png

# ---- noise and velocities -------------------------------------------------------------------------------------------


def slerp(start, end, weight):
    """Points on the arc from start to end, [C, H, W] each; weight [N] in [0, 1] -> [N, C, H, W] (Shoemake 1985).

    A straight mixture of two noises has too small a spread, so the network would see noise of a kind it never learned.
    """
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine).clamp(1e-4, math.pi - 1e-4)  # so that equal noises give themselves
    weight = weight.view(-1, 1, 1, 1).to(start)
    return (
        torch.sin((1 - weight) * angle) / torch.sin(angle) * start + torch.sin(weight * angle) / torch.sin(angle) * end
    )


def autoguide(velocity, weaker, weight):
    """A velocity that goes on from the weaker one's answer through the better one's: weight 1 is `velocity`, more overshoots.

    weaker: the same task learned worse, by a smaller network or in less time (arXiv 2406.02507, eq. 3, there for denoisers).
    """
    return lambda x, t: torch.lerp(weaker(x, t).float(), velocity(x, t).float(), weight)


def euler(velocity, x, t, s):
    """One Euler step from time t to s, numbers in [0, 1]."""
    return x + (s - t) * velocity(x, torch.full(x.shape[:1], t, device=x.device)).float()


def times_from(t, num_steps):
    """num_steps + 1 times, evenly spaced from t to exactly 0."""
    return [t * (1 - i / num_steps) for i in range(num_steps + 1)]


# ---- editing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vary(velocity, images, noise, t, num_steps=25):
    """Bring images to time t on the straight line to `noise`, and let the flow carry them back: [B, C, H, W] (arXiv 2108.01073).

    t = 0 gives the images back, t = 1 forgets them. num_steps: of Euler, from t to 0.
    """
    x = (1 - t) * images + t * noise
    for now, then in pairwise(times_from(t, num_steps)):
        x = euler(velocity, x, now, then)
    return x


def renoise(x, s, t, generator=None):
    """From time s back to a later t with fresh noise: x distributed as at s becomes distributed as at t.

    If x = (1 - s) data + s noise, the result is (1 - t) data + t other noise, as independent normal parts add in squares.
    """
    keep = (1 - t) / (1 - s)
    fresh = torch.randn(x.shape, generator=generator).to(x)
    return keep * x + (t**2 - (keep * s) ** 2) ** 0.5 * fresh


@torch.no_grad()
def inpaint(velocity, images, known, noise, num_steps=25, repeats=5, generator=None):
    """Fill images [B, C, H, W] in where `known` (bool, broadcast to them) is False; the known pixels come back unchanged.

    After every Euler step the known pixels are set to where the straight path has them. Each step is done `repeats` times with
    fresh noise in between, so that the new part can come to agree with the old: RePaint (arXiv 2201.09865, alg. 1) for a flow.
    """
    x = noise
    for t, s in pairwise(times_from(1.0, num_steps)):
        for repeat in range(repeats if s > 0 else 1):
            x = renoise(x, s, t, generator) if repeat else x
            path = (1 - s) * images + s * torch.randn(x.shape, generator=generator).to(x)
            x = torch.where(known, path, euler(velocity, x, t, s))
    return x


def outside_box(size, x, y, width, height):
    """bool [size, size]: False inside the box whose top left corner is column x, row y, all in pixels."""
    known = torch.ones(size, size, dtype=torch.bool)
    known[y : y + height, x : x + width] = False
    return known


# ---- beside the training pictures -----------------------------------------------------------------------------------


@torch.no_grad()
def nearest(pictures, pool, count=1):
    """Distances and rows, [N, count] each, of the pictures of pool that are nearest to each of `pictures`, mirrored or not.

    pictures: float [N, C, H, W] in [-1, 1]; pool: uint8 [M, C, H, W]. A distance is the root mean square over all values;
    pictures of more than 32 px are shrunk to that first.
    """

    def flat(x):
        return (F.interpolate(x, (32, 32), mode="area") if max(x.shape[2:]) > 32 else x).flatten(1)

    x, mirrored = flat(pictures), flat(pictures.flip(-1))
    distances = []
    for part in pool.split(500):
        y = flat(from_uint8(part))
        distances.append(torch.minimum(torch.cdist(x, y), torch.cdist(mirrored, y)))
    return torch.cat(distances, dim=1).div_(x.shape[1] ** 0.5).topk(count, largest=False)


# ---- inside the network ---------------------------------------------------------------------------------------------


def time_constant(gate, t):
    """tau of each place, in units of t, from gate [B, C, H, W] at t [B]: [B, H, W], all channels joined.

    The cell answers gate * g + (1 - gate) * h. A state that decays from g to h with time constant tau has exp(-t / tau) of g
    left at time t, so gate = exp(-t / tau) and tau = -t / ln(gate). Channels are joined by the mean of their rates 1 / tau.
    """
    return -t[:, None, None] / gate.clamp(1e-6, 1 - 1e-6).log().mean(1)


def stage_ends(model):
    """The last block of each stage by its name, in the order in which a picture passes them: "encoder 1", ..., "decoder 3"."""
    stages = {f"encoder {i}": stage for i, stage in enumerate(model.encoder.stages, 1)}
    stages |= {"bottleneck": model.bottleneck}
    stages |= {f"decoder {i}": stage for i, stage in enumerate(model.decoder.stages, 1)}
    return {name: stage[-1] for name, stage in stages.items()}


@contextmanager
def watch_gates(model):
    """Within it each call of model leaves {stage: gate [B, C, H', W']} of that call in the dict it yields.

    A hook on each stage's last block computes the gate from what the block was given, whichever form the block runs in.
    """
    gates, hooks = {}, []
    for name, block in stage_ends(model).items():

        def note(block, inputs, output, name=name):
            x, t, t_emb = inputs
            cell, normed = block.cfc, block.norm_cfc(x, t_emb)
            gates[name] = cell.gate(cell.backbone(cell.spatial(normed)), t_emb).float()

        hooks.append(block.register_forward_hook(note))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def liquid_maps(model, states, t):
    """What the network answers to states [T, C, H, W] at t [T], and what its cells did: velocity, gates, taus.

    gates and taus: {stage: [T, H', W']}, the mean gate over the channels and the time constant of each place.
    """
    with watch_gates(model) as seen:
        velocity = model(states, t).float()
    return velocity, {k: v.mean(1) for k, v in seen.items()}, {k: time_constant(v, t) for k, v in seen.items()}


def maps_film(states, velocity, gates, taus, t):
    """liquid_maps as figures, one PNG (bytes) per time: a row of gates and one of time constants beside state and guess.

    Scales are the same in all of them, lighter is more, and above each map stands its median. t [T], states [T, C, H, W].
    """
    guesses = states - t[:, None, None, None] * velocity  # where a straight line would end
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(2, 1 + len(gates))
    spread = torch.cat([gate.flatten() for gate in gates.values()]).cpu().quantile(torch.tensor([0.002, 0.998]))
    longest = max(tau.max().item() for tau in taus.values())
    scales = Normalize(*spread.tolist()), LogNorm(longest / 100, longest)
    labels = "gate (share of g)", "time constant\n(units of t)"
    for row, maps, scale, label in zip(axes, (gates, taus), scales, labels):
        images = [ax.imshow(values[0].cpu().numpy(), norm=scale) for ax, values in zip(row[1:], maps.values())]
        figure.colorbar(images[0], ax=list(row), label=label, extend="both")
    pngs = []
    for i, time in enumerate(tqdm(t.tolist(), desc="drawing maps")):
        figure.suptitle(f"t = {time:.2f}", fontsize=10)
        for row, picture, name, maps in zip(axes, (states, guesses), ("state", "guess of the end"), (gates, taus)):
            row[0].clear()
            draw_grid(row[0], picture[i : i + 1], 1)
            row[0].set_title(name, fontsize=9)
            for ax, (stage, values) in zip(row[1:], maps.items()):
                ax.images[0].set_data(values[i].cpu().numpy())
                ax.set_title(f"{stage}\n{values[i].median():.2f}", fontsize=8)
                ax.set_axis_off()
        pngs.append(png(figure))
        figure.set_layout_engine("none")  # the first one's layout holds for all
    return pngs


# ---- films ----------------------------------------------------------------------------------------------------------


def film_frames(film, columns=4, scale=4):
    """film [T, N, C, H, W] in [-1, 1] -> T PIL pictures, every pixel `scale` wide."""
    grids = [grid_image(frame, columns) for frame in film]
    return [grid.resize((grid.width * scale, grid.height * scale), Image.NEAREST) for grid in grids]


def save_gif(frames, path, seconds=0.08):
    """Write PIL pictures as an endless GIF, `seconds` each, and return the path."""
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0)
    return path


def save_mp4(frames, path, seconds=0.08):
    """Write PIL pictures of one size as H.264, `seconds` each, and return the path; RuntimeError where there is no ffmpeg."""
    program = shutil.which("ffmpeg")
    if program is None and find_spec("imageio_ffmpeg"):
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    if program is None:
        raise RuntimeError("There is no ffmpeg here, so no MP4 is written; install it (pip install imageio-ffmpeg).")
    width, height = frames[0].size
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{1 / seconds}", "-i", "-"]
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]  # what every player can show
    command = [program, "-y", "-loglevel", "error", *raw, *even, str(path)]
    subprocess.run(command, input=b"".join(frame.convert("RGB").tobytes() for frame in frames), check=True)
    return path
