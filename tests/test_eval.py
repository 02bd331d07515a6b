"""Laws of the distances: small between halves of one set, growing with blur, noise and lost modes, right where a formula is known."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.functional import gaussian_blur

import ld_eval
from ld_data import open_images
from ld_utils import from_uint8

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SETS = {"emoji": "samples", "fashion": SHARED / "fashion-mnist", "cats": SHARED / "afhq-cat-128"}


@pytest.fixture(scope="module", params=SETS)
def halves(request, tmp_path_factory):
    """Two halves of up to 1000 pictures, uint8 [N, 3, 16, 16], in random order."""
    source = SETS[request.param]
    if source != "samples" and not source.exists():
        pytest.skip(f"{source} is not here")
    with open_images(source, image_size=16, max_images=1000, cache_dir=tmp_path_factory.mktemp("cache")) as cache:
        cache.wait()
        pictures = ld_eval.shuffled(torch.from_numpy(cache.images.copy()))
    return pictures[: len(pictures) // 2], pictures[len(pictures) // 2 :]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    with open_images("samples", image_size=16, cache_dir=tmp_path_factory.mktemp("cache")) as cache:
        cache.wait()
        return ld_eval.shuffled(torch.from_numpy(cache.images.copy()))


def blurred(pictures, sigma):
    return gaussian_blur(pictures, 9, sigma)


def noisy(pictures, deviation):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return (pictures + deviation * noise).clamp(0, 255).round().byte()


def darkest(pictures, share):
    """As many pictures, all from the darkest share of them: the other modes are lost."""
    kept = pictures[pictures.float().mean((1, 2, 3)).argsort()[: int(share * len(pictures))]]
    return kept[torch.arange(len(pictures)) % len(kept)]


DISTANCES = ("frechet", "kid", "sliced_wasserstein")


def test_half_to_half_is_near_blur_is_far_and_noise_is_farther(halves):
    real, other = halves
    noise = torch.randint(0, 256, other.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    near, blur, noise = (ld_eval.compare(real, x) for x in (other, blurred(other, 1.0), noise))
    for name in DISTANCES:
        assert 4 * max(near[name], 0) < blur[name] < noise[name]
    assert abs(near["density"] - 1) < 0.15 and near["coverage"] > 0.9
    assert noise["density"] < 0.05 and noise["coverage"] < 0.05


@pytest.mark.parametrize("harm, levels", [(blurred, (0.4, 0.6, 1.0, 2.0)), (noisy, (10, 20, 40, 80))])
def test_distances_grow_with_blur_and_noise(halves, harm, levels):
    real, other = halves
    found = [ld_eval.compare(real, x) for x in (other, *(harm(other, level) for level in levels))]
    for name in DISTANCES:
        assert all(a[name] < b[name] for a, b in zip(found[1:], found[2:])), [f[name] for f in found]
    assert all(a["coverage"] > b["coverage"] for a, b in zip(found[1:], found[2:]))


def test_distances_grow_as_modes_are_lost(halves):
    real, other = halves
    found = [ld_eval.compare(real, darkest(other, share)) for share in (1, 0.75, 0.5, 0.25)]
    for name in ("frechet", "sliced_wasserstein"):
        assert all(a[name] < b[name] for a, b in zip(found, found[1:])), [f[name] for f in found]
    assert all(a["coverage"] > b["coverage"] + 0.05 for a, b in zip(found, found[1:]))


def test_kid_of_equal_distributions_is_0_on_average_with_the_error_it_says(emoji):
    features = ld_eval.features(emoji)
    found = []
    for seed in range(60):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        found.append(ld_eval.kid(features[order[:244]], features[order[244:]]))
    values, errors = torch.tensor(found).T
    assert abs(values.mean()) < 3 * values.std() / 60**0.5
    assert 0.7 < values.std() / errors.mean() < 1.4


@pytest.mark.parametrize("n", [20, 47, 200])
def test_kid_takes_unequal_numbers(n):
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    near, error = ld_eval.kid(x[n:], x[:n])
    assert abs(near) < 3 * error
    far, error = ld_eval.kid(x[n:], x[:n] + 1)
    assert abs(far - ld_eval.kid(x[500:], x[:500] + 1)[0]) < 3 * error


def test_kid_of_one_block_is_that_of_torchmetrics():
    a, b = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    metric = KernelInceptionDistance(feature=ld_eval.Ready(8), subsets=1, subset_size=50)
    metric.update(a.double(), real=True)
    metric.update(b.double() + 1, real=False)
    assert ld_eval.kid(a, b + 1, blocks=1)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_kid_does_not_mind_the_order_of_a_sorted_set():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0] + [1.0] * 7)
    a, b = x[:200], x[200:]
    value, error = ld_eval.kid(a[a[:, 0].argsort()], b)
    assert abs(value) < 3 * error
    assert error < 3 * ld_eval.kid(a, b)[1]  # blocks that are slices of the sorted set: six times


def test_frechet_of_a_stretched_and_shifted_set_by_the_formula():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    y = 3 * x + 2
    expected = (y.mean(0) - x.mean(0)).square().sum() + 4 * x.var(0).sum()  # |m - m'|^2 + tr (S + 9 S - 2 * 3 S)
    assert ld_eval.frechet(x, y) == pytest.approx(expected.item(), rel=1e-4)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    x, shift = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(16)
    shift[3] = 2.0
    assert ld_eval.sliced_wasserstein(x, x + shift) == pytest.approx(2 / 16**0.5, rel=0.15)
    assert ld_eval.sliced_wasserstein(x, x.flip(0)) == 0


def test_density_and_coverage_of_equal_distributions_by_the_formula():
    x, y = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0))
    density, coverage = ld_eval.density_coverage(x, y, k=5)
    assert density == pytest.approx(1, abs=0.06)
    missed = 1.0
    for i in range(5):  # arXiv 2002.09797, eq. 9
        missed *= (999 - i) / (1999 - i)
    assert coverage == pytest.approx(1 - missed, abs=0.015)
    assert ld_eval.density_coverage(x, y + 50) == (0, 0)


def test_random_features_are_what_their_name_stands_for():
    before = torch.random.get_rng_state()
    ramp = torch.arange(3 * 16 * 16).reshape(1, 3, 16, 16).remainder(251).byte()
    found = ld_eval.features(ramp)[0]
    assert found.shape == (ld_eval.RandomFeatures.num_features,)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [found[i].item() for i in (0, 47, 48, 143)] == pytest.approx(PINNED, abs=2e-3)


PINNED = [-1.6880, 1.0732, -2.7062, -0.7160]


def test_any_module_is_an_extractor_and_floats_and_grey_pictures_are_taken(emoji):
    small = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())

    class Means(nn.Module):
        def forward(self, images):
            return small(images.float())

    a, b = emoji[:200], emoji[200:400]
    found = ld_eval.compare(a, b, Means())
    assert found["pictures"] == [200, 200]
    assert ld_eval.compare(from_uint8(a), b, Means()) == found
    assert ld_eval.compare(ld_eval.features(a, Means()), b, Means()) == found
    assert torch.equal(ld_eval.features(a[:, :1]), ld_eval.features(a[:, :1].repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="bring both to one size"):
        ld_eval.compare(a, b[..., :8], Means())


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is here")
def test_inception_names_what_it_needs():
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        ld_eval.inception()


class Exact(nn.Module):
    """The velocity of pictures that are all one grey value: noise - grey = (x - grey) / t; wrong by `error` where t > 1/2."""

    def __init__(self, grey, error=0.0):
        super().__init__()
        self.grey, self.error = nn.Parameter(torch.tensor(grey)), error

    def forward(self, x, t):
        t = t[:, None, None, None]
        return (x - self.grey) / t + self.error * (t > 0.5)


def test_velocity_mse_per_time_and_whatever_the_batch():
    pictures = torch.full((6, 3, 8, 8), 0.25)
    assert ld_eval.velocity_mse(Exact(0.25), pictures).max() < 1e-9
    found = ld_eval.velocity_mse(Exact(0.25, error=0.5), pictures)
    torch.testing.assert_close(found, torch.tensor([0.0] * 5 + [0.25] * 5).double(), atol=1e-6, rtol=0)
    model, seen = nn.Conv2d(3, 3, 1), []
    model.forward = lambda x, t: seen.append(t[0].item()) or x * t[:, None, None, None]
    whole, parts = (ld_eval.velocity_mse(model, pictures, batch_size=n) for n in (6, 4))
    torch.testing.assert_close(whole, parts)
    assert seen[:10] == pytest.approx([0.05 + i / 10 for i in range(10)])


def test_copies_are_found_mirrored_or_noisy_and_others_are_not(emoji):
    training, usual, fresh = emoji[:200], emoji[200:340], emoji[340:]
    found = ld_eval.copies(training[:50].flip(-1), training, usual)
    assert found["share"] == 1 and found["distance"].max() < 1e-3
    assert torch.equal(found["index"], torch.arange(50))
    assert ld_eval.copies(noisy(training[:50], 3), training, usual)["share"] > 0.9
    assert ld_eval.copies(fresh, training, usual)["share"] < 0.06
    assert ld_eval.show_nearest(training[:20], training, usual) == 1


def test_distance_to_the_nearest_is_in_units_of_the_value_range():
    a = torch.zeros(1, 3, 64, 64)
    index, distance = ld_eval.nearest(a, torch.stack([a[0] + 0.8, a[0] + 0.4]))
    assert index.tolist() == [1] and distance.item() == pytest.approx(0.4, abs=0.01)
