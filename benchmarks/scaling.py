"""How cost grows with the picture and with the width: ours, the U-Net with attention, and DiT with patch 2.

    python benchmarks/scaling.py [--timed 32 48 64 96]
    python benchmarks/scaling.py --plot

Counted: multiply-adds of the forward pass and bytes kept for the backward pass, both per picture (fake tensors, so 256 px costs
nothing). Timed: one training step of one picture, the fastest of three. An exponent is the slope of log cost over log pixels.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from counting import MiB, forward_macs, kept_bytes
from networks import ld, networks
from speed import inputs, prepared, seconds, train_step
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from vram import fake_check

FOLDER = Path(__file__).parent / "results"
NAMES = {"lean": "liquid, lean", "unet-attention": "U-Net with attention", "dit-2": "DiT, patch 2"}
SIZES = (32, 64, 128, 256)
WIDTHS = (32, 64, 128, 256)  # channels of the first stage; the others are 2 and 4 times as wide


def counts(build, size):
    with FakeTensorMode():
        model = build()
        x, t = torch.randn(1, 3, size, size), torch.full((1,), 0.5)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention is not counted by torch
            macs = forward_macs(model, x, t)
        return {"GMAC": macs / 1e9, "kept MiB": kept_bytes(model, x, t) / MiB}


def step_time(name, build, size):
    model, layout = prepared(name, build, "cpu")
    x, t = inputs(1, size)
    x = x.contiguous(memory_format=layout)
    train_step(model, x, t)
    return min(seconds(lambda: train_step(model, x, t), "cpu") for _ in range(3))


def exponent(sizes, costs):
    """Least-squares slope of log cost over log size."""
    logs = [(math.log(s), math.log(c)) for s, c in zip(sizes, costs)]
    x_mean, y_mean = (sum(values) / len(logs) for values in zip(*logs))
    return sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)


def liquid_of_width(width):
    return ld.LiquidDiffusion((width, 2 * width, 4 * width), (2, 2, 4))


def measure(timed):
    ld.check_input = fake_check
    result = {"pixels": {}, "width": {}}
    for name in NAMES:
        rows = {}
        for size in sorted({*SIZES, *timed}):
            build = networks(size)[name]
            rows[size] = counts(build, size)
            if size in timed:
                rows[size]["step s"] = step_time(name, build, size)
            print(name, size, rows[size], flush=True)
        result["pixels"][name] = rows
    for width in WIDTHS:
        result["width"][width] = counts(lambda width=width: liquid_of_width(width), 64)
    return result


def plot(result):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for axis, title in zip(axes, ("GMAC", "kept MiB", "step s")):
        for name, label in NAMES.items():
            points = [(int(size), row[title]) for size, row in result["pixels"][name].items() if title in row]
            sizes, costs = zip(*points)
            slope = exponent([size**2 for size in sizes], costs)
            axis.loglog(sizes, costs, "o-", label=f"{label}: pixels^{slope:.2f}")
        axis.set(title=f"{title} per picture", xlabel="height = width, pixels")
        axis.set_xticks(sizes, sizes, minor=False)
        axis.set_xticks([], minor=True)
        axis.legend()
    widths = [int(width) for width in result["width"]]
    for key in ("GMAC", "kept MiB"):
        costs = [row[key] for row in result["width"].values()]
        axes[3].loglog(widths, costs, "o-", label=f"{key}: width^{exponent(widths, costs):.2f}")
    axes[3].set(title="liquid at 64 px", xlabel="channels of the first stage")
    axes[3].set_xticks(widths, widths, minor=False)
    axes[3].set_xticks([], minor=True)
    axes[3].legend()
    figure.savefig(FOLDER / "scaling.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", type=int, nargs="*", default=[32, 48, 64, 96], help="sizes to time")
    parser.add_argument("--plot", action="store_true", help="only draw results/scaling.json again")
    args = parser.parse_args()
    stored = FOLDER / "scaling.json"
    if not args.plot:
        FOLDER.mkdir(exist_ok=True)
        stored.write_text(json.dumps(measure(args.timed), indent=1) + "\n")
    plot(json.loads(stored.read_text()))


if __name__ == "__main__":
    main()
