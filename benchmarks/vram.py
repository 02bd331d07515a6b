"""The largest batch of a training step that fits a GPU, per preset at the resolution of the project's table.

    python benchmarks/vram.py [--presets tiny small] [--device cuda]

Counted without memory or a GPU: a step on fake tensors in half precision, every storage followed from its making to its end.
To that come 20 bytes per weight (the weight, its gradient, two moments as AdamW keeps them, though Muon keeps one, the average)
and 0.6 GiB for the CUDA context and the allocator's gaps. With --device cuda the counted batch of the budgets that the GPU has
is also run and its peak is measured; this path has not been run yet.
"""

import argparse
import json
from pathlib import Path

import torch
from counting import LiveBytes, MiB
from networks import ld
from torch._subclasses import FakeTensorMode

RESULTS = Path(__file__).parent / "results" / "vram.json"
SIZES = {"nano": 64, "tiny": 256, "small": 256, "base": 512, "large": 512}
BUDGETS = (4, 8, 14, 24)  # GiB
RESERVE = 0.6 * 1024 * MiB
BYTES_PER_WEIGHT = 20


def step(model, x, t, device="cpu", dtype=torch.bfloat16):
    with torch.autocast(device, dtype):
        loss = model(x, t).float().square().mean()
    loss.backward()


def step_peak(preset, size, batch, **options):
    """Most bytes alive in a step beyond the weights, counted; the gradients are among them."""
    with FakeTensorMode():
        model = ld.liquid_diffusion(preset, **options)
        x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        t = torch.full((batch,), 0.5)
        with LiveBytes() as live:
            step(model, x, t)
    return live.peak


def fake_check(*_):
    """Stands in for check_input: fake tensors have no values to check."""


def counted(preset, size, **options):
    """Bytes of a training step: those of an empty batch, and those per picture."""
    one, two = (step_peak(preset, size, n, **options) for n in (1, 2))
    with torch.device("meta"):
        weights = sum(p.numel() for p in ld.liquid_diffusion(preset).parameters())
    return 2 * one - two + (BYTES_PER_WEIGHT - 4) * weights + RESERVE, two - one


def largest_batch(budget, fixed, per_picture):
    return max(0, int((budget * 1024 * MiB - fixed) // per_picture))


def measured(preset, size, batch, **options):
    """Peak bytes of a training step on this GPU, the average's weights added."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = ld.RectifiedFlowTrainer(ld.liquid_diffusion(preset, **options), device="cuda")
    images = torch.rand(batch, 3, size, size) * 2 - 1
    for _ in range(2):  # the second with the moments there
        trainer.train_step(images)
    return torch.cuda.max_memory_allocated()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    check, ld.check_input = ld.check_input, fake_check
    rows = {}
    for preset in args.presets:
        for lean in (True, False):
            for checkpointing in (False, True):
                options = dict(lean=lean, gradient_checkpointing=checkpointing)
                fixed, each = counted(preset, SIZES[preset], **options)
                name = (
                    f"{preset}, {SIZES[preset]} px, {'lean' if lean else 'formulas'}{', checkpointing' * checkpointing}"
                )
                batches = {f"{budget} GiB": largest_batch(budget, fixed, each) for budget in BUDGETS}
                rows[name] = {"fixed MiB": round(fixed / MiB), "MiB per picture": round(each / MiB, 1), **batches}
                print(name, rows[name])
    ld.check_input = check
    if args.device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory / (1024 * MiB)
        for name, row in rows.items():
            options = dict(lean="lean" in name, gradient_checkpointing="checkpointing" in name)
            for budget in (b for b in BUDGETS if b < room and row[f"{b} GiB"]):
                preset = name.split(",")[0]
                peak = measured(preset, SIZES[preset], row[f"{budget} GiB"], **options)
                row[f"{budget} GiB, measured MiB"] = round(peak / MiB)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
