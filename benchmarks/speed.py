"""Speed and memory of a training step and of sampling, ours beside a U-Net and a DiT of the same size.

    python benchmarks/speed.py [--size 64] [--batch 4] [--rounds 7] [--device cuda]
    python benchmarks/speed.py --table

Counted: parameters, multiply-adds, bytes kept for the backward pass per picture (float32, and half precision by CPU autocast).
Timed: forward + backward, and forward alone, in rounds that run every network once after another, so that a slow spell of the
machine meets all of them; a ratio is the median of the ratios within the rounds, with its quartiles. Each round is written to
results/speed.json at once, and a second call adds rounds. With --device cuda: float16 autocast, peak memory, and the share of
the matrix rate measured on that GPU; this path has not been run yet.
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from counting import MiB, forward_macs, kept_bytes, per_picture
from networks import networks
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULTS = Path(__file__).parent / "results" / "speed.json"
REFERENCES = ("plain", "lean", "unet-attention", "unet")


def half(device):
    return torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16)


def inputs(batch, size, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, 3, size, size, generator=generator), torch.rand(batch, generator=generator)
    return x.to(device), t.to(device)


def prepared(name, build, device):
    """The network on its device; all but "plain" in channels_last, which is faster for each of them."""
    torch.manual_seed(0)
    layout = torch.contiguous_format if name == "plain" else torch.channels_last
    return build().to(device, memory_format=layout), layout


def counts(build, size):
    """Parameters, GMAC and MiB kept per picture; the last also with checkpointing where there are blocks."""
    model = build()
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention is not counted by torch
        macs = forward_macs(model, *inputs(1, size))
    row = {"parameters": sum(p.numel() for p in model.parameters()), "GMAC": macs / 1e9}
    row["kept MiB"] = per_picture(lambda n: kept_bytes(model, *inputs(n, size))) / MiB
    with half("cpu"):
        row["kept MiB, half"] = per_picture(lambda n: kept_bytes(model, *inputs(n, size))) / MiB
    return row


def train_step(model, x, t):
    model.zero_grad(set_to_none=True)
    model(x, t).float().square().mean().backward()


@torch.no_grad()
def sample_step(model, x, t):
    model(x, t)


def seconds(step, device):
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed_rounds(models, size, batch, device, rounds):
    """Yield {step: {network: seconds}} per round, after a first call of each that is not counted."""
    steps = {}
    for name, (model, layout) in models.items():
        x, t = inputs(batch, size, device)
        x = x.contiguous(memory_format=layout)
        for label, step in (("train", train_step), ("sample", sample_step)):
            steps.setdefault(label, {})[name] = partial(step, model, x, t)
    precision = half(device) if device == "cuda" else torch.autocast(device, enabled=False)
    with precision:
        first = {name: seconds(steps["train"][name], device) for name in models}
        print("first step, seconds:", {name: round(s, 1) for name, s in first.items()})
        for name in models:
            steps["sample"][name]()
        for _ in range(rounds):
            yield {label: {name: seconds(step, device) for name, step in row.items()} for label, row in steps.items()}


def peak_memory(model, x, t):
    """MiB that a training step takes at most on a GPU, the weights included."""
    torch.cuda.reset_peak_memory_stats()
    with half("cuda"):
        train_step(model, x, t)
    return torch.cuda.max_memory_allocated() / MiB


def matrix_rate(n=4096, repeats=20):
    """Multiply-adds per second of a float16 matrix product on this GPU."""
    a = torch.randn(n, n, device="cuda", dtype=torch.float16)
    seconds(lambda: a @ a, "cuda")
    return n**3 * repeats / seconds(lambda: [a @ a for _ in range(repeats)], "cuda")


def spread(values):
    """Median and quartiles as text."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{median(values):.2f} ({low:.2f}-{high:.2f})"


def table(result):
    """The result as Markdown, one line per network."""
    rounds, batch = result["rounds"], result["batch"]
    references = [name for name in REFERENCES if name in result["networks"]]
    columns = ["parameters", "GMAC", "kept MiB", "kept MiB, half", "train img/s", "sample img/s"]
    columns += [f"{step} vs {name}" for step in ("train", "sample") for name in references]
    lines = [f"| {' | '.join(['network', *columns])} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in result["networks"].items():
        cells = [name, f"{row['parameters'] / 1e6:.2f}M", *(f"{row[c]:.3g}" for c in columns[1:4])]
        for step in ("train", "sample"):
            cells.append(f"{batch / median(r[step][name] for r in rounds):.1f}")
        for step in ("train", "sample"):
            cells += [spread([r[step][other] / r[step][name] for r in rounds]) for other in references]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--networks", nargs="+", default=None, help="names, instead of all")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.table:
        for key, result in stored.items():
            print(f"{key}; {result['machine']}; {len(result['rounds'])} rounds\n{table(result)}\n")
        return

    builds = {name: b for name, b in networks(args.size).items() if name in (args.networks or networks(args.size))}
    key = f"{args.device}, {args.size} px, batch {args.batch}"
    fresh = {"networks": {}, "rounds": []}
    result = stored.get(key, fresh)
    if set(result["networks"]) != set(builds):
        result = stored[key] = {
            "batch": args.batch,
            "networks": {n: counts(b, args.size) for n, b in builds.items()},
            "rounds": [],
        }
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    result["machine"] = f"torch {torch.__version__}, {device}"
    models = {name: prepared(name, build, args.device) for name, build in builds.items()}
    if args.device == "cuda":
        rate = matrix_rate()
        for name, (model, _) in models.items():
            result["networks"][name]["peak MiB"] = peak_memory(model, *inputs(args.batch, args.size, "cuda"))
            result["networks"][name]["matrix MAC/s"] = rate
    for one in timed_rounds(models, args.size, args.batch, args.device, args.rounds):
        result["rounds"].append({**one, "load": os.getloadavg()[0]})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1))
    print(table(result))


if __name__ == "__main__":
    main()
