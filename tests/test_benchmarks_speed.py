"""The benchmarks' own arithmetic: what they count is what there is, and the networks are the sizes that they are said to be."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from counting import LiveBytes, forward_macs, kept_bytes  # noqa: E402
from networks import ld, networks, plain  # noqa: E402
from scaling import exponent  # noqa: E402
from speed import spread, table  # noqa: E402
from vram import largest_batch  # noqa: E402

SIZES = {"lean": 8_786_179, "plain": 8_786_179, "unet-attention": 8_597_827, "unet": 8_538_211, "dit-2": 9_347_084}


def test_kept_bytes_counts_each_storage_once_and_no_weights():
    model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())
    assert kept_bytes(model, torch.randn(10, 8)) == 10 * 8 * 4 + 10 * 4 * 4  # Linear's input, Sigmoid's output
    shared = nn.Sequential(nn.Identity(), nn.Linear(8, 8))
    x = torch.randn(10, 8)
    assert kept_bytes(lambda_module(lambda x: shared(x) + shared(x), shared), x) == x.numel() * 4


def lambda_module(function, inner):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return function(x)

    return Module()


def test_live_bytes_falls_when_tensors_go():
    with LiveBytes() as live:
        x = torch.ones(1000)
        y = x[::2] + 0
        assert live.now == 4 * 1500
        del x
        assert live.now == 4 * 500 and live.peak == 4 * 1500
    assert y.numel() == 500


def test_macs_of_a_convolution():
    assert forward_macs(nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8)) == 2 * 64 * 3 * 5 * 9


def test_the_written_out_formulas_are_the_model():
    torch.manual_seed(0)
    model = plain("nano").double()
    again = ld.liquid_diffusion_nano().double()
    again.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    torch.testing.assert_close(model(x, t), again(x, t), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_compared_networks(name):
    with torch.device("meta"):
        model = networks(64)[name]()
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


def test_ratios_are_taken_within_rounds():
    row = {"parameters": 1e6, "GMAC": 1.0, "kept MiB": 1.0, "kept MiB, half": 1.0}
    names = ("plain", "unet-attention", "unet", "lean")
    rounds = [{s: {n: load * (1 + (n != "lean")) for n in names} for s in ("train", "sample")} for load in (1, 5, 9)]
    lean = table({"networks": dict.fromkeys(names, row), "rounds": rounds, "batch": 1}).splitlines()[-1]
    assert lean.startswith("| lean ") and lean.count("2.00 (2.00-2.00)") == 6
    assert spread([1, 2, 3, 4, 100]).startswith("3.00 (")


def test_exponent_and_largest_batch():
    assert exponent([10, 20, 40], [3 * n**1.5 for n in (10, 20, 40)]) == pytest.approx(1.5)
    assert largest_batch(4, 2**30, 2**30) == 3 and largest_batch(4, 2**33, 1) == 0
