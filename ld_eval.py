"""How good generated pictures are: distances between two sets of pictures, the loss on held-out ones, and a search for copies.

    print(compare(real, generated))                   # Frechet distance, KID, sliced Wasserstein, density, coverage
    print(velocity_mse(trainer.update.ema.model, held_out))
    show_nearest(generated, training, held_out)

Pictures are [N, 3, H, W], uint8 or float in [-1, 1]. No figure here can be set beside a published FID unless the extractor
is `inception()` and the numbers of pictures are the published ones: each distance is made for comparing runs with runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd
from tqdm.auto import tqdm

from ld_utils import draw_grid, from_uint8, show, to_uint8

# ---- features -------------------------------------------------------------------------------------------------------


class RandomFeatures(nn.Module):
    """A fixed random network in place of a trained one, so nothing is downloaded: uint8 [B, 3, H, W] -> [B, 144], H and W at least 4.

    4 x 4 mean colours, and the strength of random edges of edges in each quarter at three scales; each is brought to mean 0
    and deviation 1 on random clouds with the 1/f spectrum of photographs, and long tails are drawn in by asinh. Random
    networks tell sets of pictures apart much as trained ones do (arXiv 2208.09218; 2002.09797 uses one where ImageNet is
    no guide). These see blur, noise, colour, layout and lost variety, and nothing of meaning. The name stands for the
    weights, so figures may be compared only under one name, and at one size of pictures.
    """

    name, num_features = "random-conv-1", 3 * 16 + 3 * 8 * 4

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        edges = torch.randn(16, 3, 5, 5, generator=generator)
        edges -= edges.mean(dim=(2, 3), keepdim=True)  # blind to flat colour
        self.register_buffer("edges", edges / edges.flatten(1).norm(dim=1)[:, None, None, None])
        again = torch.randn(8, 16, 3, 3, generator=generator)
        self.register_buffer("again", again / again.flatten(1).norm(dim=1)[:, None, None, None])
        self.scales = {}  # (H, W) -> mean and deviation [144] on clouds

    def raw(self, x):
        """Features [B, 144] of x [B, 3, H, W] in [-1, 1], each in its own unit."""
        out = [F.adaptive_avg_pool2d(x, 4)]
        for scale in range(3):
            x = F.avg_pool2d(x, 2, ceil_mode=True) if scale else x
            strength = F.conv2d(F.pad(x, [2] * 4, "replicate"), self.edges).abs()  # [B, 16, H, W]
            strength = F.conv2d(F.pad(strength, [1] * 4, "replicate"), self.again).abs()  # [B, 8, H, W]
            out.append(F.adaptive_avg_pool2d(strength, 2))
        return torch.cat([part.flatten(1) for part in out], dim=1)

    def forward(self, images):
        size = tuple(images.shape[2:])
        if size not in self.scales:
            raw = self.raw(clouds(512, *size).to(self.edges.device))
            self.scales[size] = raw.mean(0), raw.std(0)
        mean, deviation = self.scales[size]
        return torch.asinh((self.raw(from_uint8(images)) - mean) / deviation)  # tails of real sets are long


def clouds(n, height, width):
    """n random pictures [n, 3, H, W] in [-1, 1] whose amplitude falls as 1 / frequency, mostly grey; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft2(torch.randn(n, 3, height, width, generator=generator))
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
    pictures = torch.fft.irfft2(spectrum / frequency.clamp_min(1 / max(height, width)), s=(height, width))
    pictures = pictures + 3 * pictures.mean(1, keepdim=True)
    return (0.5 * pictures / pictures.std()).clamp(-1, 1)


def inception():
    """The extractor of published FIDs: 2048 features of InceptionV3. Downloads 91 MB once and needs `pip install torch-fidelity`."""
    return FrechetInceptionDistance(feature=2048).inception


@torch.no_grad()
def features(images, extractor=None, batch_size=256, device="cpu"):
    """[N, D] on the CPU from pictures, by any module that takes uint8 [B, 3, H, W]; RandomFeatures if None."""
    extractor = (extractor or RandomFeatures()).to(device)
    parts = tqdm(images.split(batch_size), desc="features", leave=False, disable=len(images) <= 10 * batch_size)
    return torch.cat([extractor(to_uint8(part).to(device).expand(-1, 3, -1, -1)).float().cpu() for part in parts])


# ---- distances between features [N, D] ------------------------------------------------------------------------------


class Ready(nn.Identity):
    """The "extractor" of features that are there already, as torchmetrics wants one."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features


def frechet(real, generated):
    """Frechet distance of the normal distributions fitted to both (arXiv 1706.08500, eq. 6); above 0 even for equal ones, less so the more pictures."""
    metric = FrechetInceptionDistance(feature=Ready(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kid(real, generated, blocks=10):
    """Squared MMD with a cubic kernel and its standard error (arXiv 1801.01401, sec. 4), on equal numbers of both.

    The mean over separate blocks: 0 on average for equal distributions, so it may be negative.
    """
    few = min(len(real), len(generated))  # poly_mmd is right for equal numbers only
    blocks = min(blocks, few // 2)
    pairs = zip(*(shuffled(x)[:few].double().tensor_split(blocks) for x in (real, generated)))
    values = torch.stack([poly_mmd(a, b) for a, b in pairs])  # [blocks]
    return values.mean().item(), (values.std() / blocks**0.5).item()


def shuffled(x):
    """The rows of x in an order that is random and always the same; data sets are often sorted by class."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def sliced_wasserstein(real, generated, directions=256):
    """Wasserstein-2 distance along fixed random directions, root of the mean square (Rabin et al., SSVM 2011, sec. 3)."""
    axes = F.normalize(torch.randn(real.shape[1], directions, generator=torch.Generator().manual_seed(0)), dim=0)
    levels = (torch.arange(200) + 0.5) / 200
    a, b = ((x @ axes).sort(0).values[(levels * len(x)).long()] for x in (real, generated))  # [200, directions]
    return (a - b).square().mean().sqrt().item()


def density_coverage(real, generated, k=5):
    """In how many real neighbourhoods a generated picture lies, over k; and the share of these that hold one (arXiv 2002.09797).

    A neighbourhood reaches from a real picture to its k-th nearest. Equal distributions and equal numbers of pictures give 1
    and 1 - 2 ** -k. Few or blurred modes raise the density and lower the coverage.
    """
    k = min(k, len(real) - 1)
    radius = torch.cdist(real, real).kthvalue(k + 1).values  # [N]; the nearest is the picture itself
    inside = torch.cdist(real, generated) < radius[:, None]  # [N, M]
    return inside.float().sum(0).mean().item() / k, inside.any(1).float().mean().item()


def compare(real, generated, extractor=None, device="cpu"):
    """Every distance between two sets of pictures of one size, as a dict; ValueError if they differ in it.

    Either may also be features [N, D] that are there already. frechet, kid (with kid_error) and sliced_wasserstein: small is
    good. density and coverage: near 1 is good; they are taken on equal numbers. As the Frechet distance depends on the numbers
    of pictures, compare runs at the same ones.
    """
    if real.ndim == generated.ndim == 4 and real.shape[2:] != generated.shape[2:]:
        raise ValueError(
            f"Pictures are {[*real.shape[2:]]} and {[*generated.shape[2:]]}; bring both to one size first."
        )
    extractor = extractor or RandomFeatures()
    a, b = (x if x.ndim == 2 else features(x, extractor, device=device) for x in (real, generated))
    (mean, error), few = kid(a, b), min(len(a), len(b))
    density, coverage = density_coverage(shuffled(a)[:few], shuffled(b)[:few])
    return dict(
        frechet=frechet(a, b), kid=mean, kid_error=error, sliced_wasserstein=sliced_wasserstein(a, b), density=density,
        coverage=coverage, pictures=[len(a), len(b)],
    )  # fmt: skip


# ---- the loss on held-out pictures ----------------------------------------------------------------------------------


@torch.no_grad()
def velocity_mse(model, images, times=10, batch_size=256):
    """Mean squared error of the velocity at evenly spaced times 1/20, 3/20, ... (for ten), with fixed noise: [times].

    model(x, t) -> velocity; images [N, 3, H, W], uint8 or in [-1, 1]. Does not depend on how times were drawn in training.
    """
    device = next(model.parameters()).device
    images = from_uint8(images) if images.dtype == torch.uint8 else images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(times, dtype=torch.float64)
    for x, e in zip(images.split(batch_size), noise.split(batch_size)):
        x, e = x.to(device), e.to(device)
        for i in range(times):
            t = torch.full((len(x),), (i + 0.5) / times, device=device)
            velocity = model((1 - t[0]) * x + t[0] * e, t).float()
            sums[i] += F.mse_loss(velocity, e - x).item() * len(x)
    return sums / len(images)


# ---- copies of training pictures ------------------------------------------------------------------------------------


def nearest(images, pool, batch_size=64):
    """For each picture the nearest of pool, mirrored or not: index [N], and distance [N], the root mean square over pixels.

    Both [., 3, H, W]; values run from -1 to 1, so two random photographs are about 0.7 apart. Larger pictures are compared at 32 px.
    """
    pool = small(pool)
    index, distance = [], []
    for part in tqdm(images.split(batch_size), desc="nearest", leave=False, disable=len(images) <= 4 * batch_size):
        x = small(part)
        both = torch.minimum(*(torch.cdist(y.flatten(1), pool.flatten(1)) for y in (x, x.flip(-1))))  # [B, M]
        closest = both.min(1)
        index.append(closest.indices)
        distance.append(closest.values / pool[0].numel() ** 0.5)
    return torch.cat(index), torch.cat(distance)


def small(images):
    """Pictures as floats in [-1, 1], at most 32 px wide."""
    images = from_uint8(to_uint8(images))
    return F.interpolate(images, size=(32, 32), mode="area") if max(images.shape[2:]) > 32 else images


def copies(generated, training, held_out):
    """Share of generated pictures nearer to a training picture than 99 % of the held-out ones are: about 0.01 without copying.

    Returns a dict: share, and for the panel `index` and `distance` of each nearest, and `usual`, the held-out distances.
    """
    index, distance = nearest(generated, training)
    usual = nearest(held_out, training)[1]
    return dict(
        share=(distance < usual.quantile(0.01)).float().mean().item(), index=index, distance=distance, usual=usual
    )


def show_nearest(generated, training, held_out, columns=10):
    """Display the generated pictures that are nearest to training pictures, these below them, and the distances; returns the share of `copies`."""
    found = copies(generated, training, held_out)
    first = found["distance"].argsort()[:columns]
    figure = Figure(figsize=(11, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    rows = [to_uint8(generated[first]), to_uint8(training[found["index"][first]])]
    draw_grid(left, torch.cat(rows), columns=len(first))
    left.set_title("generated, the nearest ones first; below, the training picture", fontsize=9)
    for name, label in (("usual", "held out"), ("distance", "generated")):
        right.hist(found[name].numpy(), bins=30, density=True, histtype="step", label=label)
    right.set(xlabel="distance to the nearest training picture", yticks=[])
    right.legend(fontsize=8)
    show(figure)
    return found["share"]
