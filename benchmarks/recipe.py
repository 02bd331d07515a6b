"""Which start, relaxation, learning rate and time distribution train best at equal steps: one short run each, resumable.

    python benchmarks/recipe.py --data FOLDER_OR_HUB_ID [--seeds 0 1 2] [--steps 300]
    python benchmarks/recipe.py --table

Each run trains `liquid_diffusion_nano` at 16 px on nine tenths of the pictures and writes one JSON: the velocity MSE of the
averaged weights on the last tenth, over ten fixed times, with fixed noise. Lower is better; the table gives the mean of the
seeds and their range, and the difference to the default of the same seed.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from quality import fit, held_out
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from ld_data import open_images  # noqa: E402
from ld_eval import velocity_mse  # noqa: E402
from liquid_diffusion import RectifiedFlowTrainer, liquid_diffusion_nano  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "recipe"


def zero_output(model):
    nn.init.zeros_(model.out[-1].weight)
    nn.init.zeros_(model.out[-1].bias)


def random_modulations(model):
    for module in model.modules():
        if hasattr(module, "linear"):
            module.linear.reset_parameters()


# name -> (arguments of the network, arguments of the trainer, change of the start)
VARIANTS = {
    "default": ({}, {}, None),
    "relaxation spec": (dict(relaxation="spec"), {}, None),
    "relaxation only": (dict(relaxation="only"), {}, None),
    "relaxation off": (dict(relaxation="off"), {}, None),
    "output convolution starts at zero": ({}, {}, zero_output),
    "modulations start at random": ({}, {}, random_modulations),
    "learning rate 8e-3 by fan-in": ({}, dict(lr=8e-3, by_fan_in=True), None),
    "learning rate 32e-3 by fan-in": ({}, dict(lr=32e-3, by_fan_in=True), None),
    "learning rate 1e-4 for all (Quick Start)": ({}, dict(lr=1e-4), None),
    "learning rate 1e-3 for all": ({}, dict(lr=1e-3), None),
    "learning rate 4e-3 for all": ({}, dict(lr=4e-3), None),
    "times uniform": ({}, dict(time_distribution="uniform"), None),
}


def run(images, variant, seed, steps, batch_size=32):
    """Train one variant and return its record."""
    network, options, change = VARIANTS[variant]
    training, validation = held_out(images)
    torch.manual_seed(seed)
    model = liquid_diffusion_nano(**network)
    if change:
        change(model)
    trainer = RectifiedFlowTrainer(model, device="cpu", seed=seed, total_steps=steps, warmup_steps=50, **options)
    start = time.perf_counter()
    fit(trainer, training, seed, steps, f"{variant}, seed {seed}", batch_size)
    losses = velocity_mse(trainer.update.ema.model, validation).tolist()
    return dict(
        variant=variant, seed=seed, steps=steps, batch_size=batch_size, mse=mean(losses), mse_per_time=losses,
        validation_pictures=len(validation), seconds=time.perf_counter() - start, skipped=trainer.update.skipped,
        machine=platform.processor() or platform.machine(), torch=torch.__version__,
    )  # fmt: skip


def table():
    """The JSONs as a markdown table."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    by_seed = {record["seed"]: record["mse"] for record in records if record["variant"] == "default"}
    print("| variant | velocity MSE, mean (range) | difference to the default, per seed | seeds |\n|---|---|---|---|")
    for variant in VARIANTS:
        runs = [record for record in records if record["variant"] == variant and record["seed"] in by_seed]
        if runs:
            values = [record["mse"] for record in runs]
            differences = ", ".join(f"{record['mse'] - by_seed[record['seed']]:+.4f}" for record in runs)
            spread = f"{min(values):.4f} to {max(values):.4f}"
            print(f"| {variant} | {mean(values):.4f} ({spread}) | {differences} | {len(runs)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="samples", help="folder, zip, parquet folder or Hub id")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--table", action="store_true", help="print the table of what was run so far")
    arguments = parser.parse_args()
    if arguments.table:
        return table()
    with open_images(arguments.data, image_size=16) as cache:
        cache.wait()
        images = torch.from_numpy(cache.images.copy())  # uint8 [N, 3, 16, 16]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for variant in VARIANTS:
            path = RESULTS / f"{variant.split(' (')[0].replace(' ', '-')}-{seed}.json"
            if not path.exists():
                record = run(images, variant, seed, arguments.steps) | dict(data=Path(arguments.data).name)
                path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
