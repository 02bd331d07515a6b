"""How good few Euler steps are before and after one reflow, on the network's own pairs of noise and picture.

    python benchmarks/few_steps.py [--weights FILE] [--pairs 4096] [--steps 1500] [--pictures 128]
    python benchmarks/few_steps.py --table

Writes benchmarks/results/few_steps.json: straightness, and for each number of steps the distance to the original network's
50-step pictures of the same noise, and the Frechet and sliced Wasserstein distances to the training pictures. Lower is better.
The noise is not among the pairs; the range is over four quarters of it.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ld_reflow  # noqa: E402
from ld_checkpoint import code_version, open_weights  # noqa: E402
from ld_data import open_images, to_model_range  # noqa: E402
from ld_eval import RandomFeatures, features, frechet, sliced_wasserstein  # noqa: E402
from liquid_diffusion import WeightUpdate, integrate, model_from, time_grid  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "few_steps.json"
EXTRACTOR = RandomFeatures()
COUNTS = (1, 2, 4, 8, 16, 25, 50)
KINDS = {  # name -> times and loss of the reflow
    "improved": (ld_reflow.u_shaped_times, ld_reflow.pseudo_huber),
    "plain": (ld_reflow.uniform_times, ld_reflow.squared_error),
}


@torch.no_grad()
def follow(model, noise, steps, bar=None, solver="euler"):
    """States [steps + 1, B, C, H, W] on the way from noise to pictures, 64 of them at a time."""
    parts = tqdm(noise.split(64), desc=bar, disable=bar is None)
    return torch.cat([torch.stack(list(integrate(model, part, time_grid(steps), solver))) for part in parts], dim=1)


def distances(real, generated):
    """Frechet distance of fixed random features, and sliced Wasserstein distance of the pixels, of pictures [N, C, H, W]."""
    return dict(
        frechet=frechet(features(real, EXTRACTOR), features(generated, EXTRACTOR)),
        wasserstein=sliced_wasserstein(real.flatten(1), generated.flatten(1)),
    )


def chance(real, n, draws=10):
    """Lowest and highest of both distances of n of the real pictures, drawn at random, to the rest: what a perfect model would get."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(real), generator=generator) for _ in range(draws)]
    found = [distances(real[order[n:]], real[order[:n]]) for order in orders]
    return {name: [min(d[name] for d in found), max(d[name] for d in found)] for name in found[0]}


def measure(name, model, noise, target, real, solver="euler"):
    """Record of one model: S of its paths, and both distances for each number of steps."""
    record, made = dict(counts={}), {}
    for n in COUNTS:
        states = follow(model, noise, n, f"{name}, {n} steps", solver)
        made[n] = states[-1].clamp(-1, 1)
        if n == COUNTS[-1]:
            record["S"] = ld_reflow.curvature(states, time_grid(n)).mean().item()
    target = made[COUNTS[-1]] if target is None else target
    for n, pictures in made.items():
        errors = (pictures - target).square().flatten(1).mean(1)  # [N]
        quarters = [part.mean().sqrt().item() for part in errors.chunk(4)]
        record["counts"][n] = dict(rmse=errors.mean().sqrt().item(), quarters=quarters, **distances(real, pictures))
    return record, target


def straighten(name, model, images, noise, steps, batch_size, lr):
    """The averaged weights after reflow, as a model."""
    model = copy.deepcopy(model).train()
    update = WeightUpdate(model, torch.float32, lr=lr, by_fan_in=True, muon=1, warmup_steps=20)
    losses = ld_reflow.reflow(model, update, images, noise, steps, batch_size, *KINDS[name])
    for _ in tqdm(losses, total=steps, desc=f"reflow, {name}"):
        pass
    return update.ema.model


def table(path):
    """The result as markdown."""
    result = json.loads(path.read_text())
    names = list(result["models"])
    print("| Euler steps | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for n in COUNTS:
        cells = [result["models"][name]["counts"][str(n)] for name in names]
        spreads = [f"({min(c['quarters']):.3f} to {max(c['quarters']):.3f})" for c in cells]
        texts = [f"{c['rmse']:.3f} {x} / {c['frechet']:.2f} / {c['wasserstein']:.3f}" for c, x in zip(cells, spreads)]
        print(f"| {n} | " + " | ".join(texts) + " |")
    print("| S | " + " | ".join(f"{result['models'][name]['S']:.4f}" for name in names) + " |")
    ranges = [f"{low:.3f} to {high:.3f}" for low, high in result["chance"].values()]
    print(
        "\nrmse to 50 steps before (range of quarters) / Frechet / sliced Wasserstein distance to the training pictures; ",
        end="",
    )
    print("as many of those at random: " + " / ".join(ranges))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a run's weights.safetensors or checkpoint.pt; without, the shipped network")
    parser.add_argument(
        "--data", default="samples", help="its training pictures: folder, zip, parquet folder or Hub id"
    )
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--pair-steps", type=int, default=10, help="steps of a pair's picture")
    parser.add_argument("--pair-solver", default="heun", help="and their method: euler, heun or midpoint")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of a reflow")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-3, help="Muon's, and AdamW's by fan-in")
    parser.add_argument("--pictures", type=int, default=128, help="made for each figure")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the run in --out")
    arguments = parser.parse_args()
    if arguments.table:
        return table(arguments.out)
    torch.set_num_threads(1)
    start = time.process_time()
    config, weights, metadata = open_weights(arguments.weights)
    model, size = model_from(config, weights), int(metadata.get("image_size", 32))
    with open_images(arguments.data, image_size=size) as cache:
        cache.wait()
        real = to_model_range(torch.from_numpy(cache.images.copy()), "cpu", flip=False)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(arguments.pairs, model.in_channels, size, size, generator=generator)
    test = torch.randn(arguments.pictures, *noise.shape[1:], generator=generator)
    before, target = measure("before", model, test, None, real)
    by_heun, _ = measure("heun", model, test, target, real, "heun")
    result = dict(
        **{name: value for name, value in vars(arguments).items() if name not in ("table", "weights", "out", "data")},
        weights=Path(arguments.weights).name if arguments.weights else "shipped", data=Path(arguments.data).name,
        config=config, image_size=size, training_pictures=len(real), chance=chance(real, arguments.pictures),
        models=dict(before=before, heun=by_heun), threads=1, torch=torch.__version__, code=code_version(),
    )  # fmt: skip
    parts = tqdm(noise.split(64), desc="pairs")
    images = torch.cat([follow(model, part, arguments.pair_steps, solver=arguments.pair_solver)[-1] for part in parts])
    for name in KINDS:
        after = straighten(name, model, images, noise, arguments.steps, arguments.batch, arguments.lr)
        for solver, key in (("euler", name), ("heun", f"{name}, heun")):
            result["models"][key], _ = measure(key, after, test, target, real, solver)
        result["cpu_seconds"] = round(time.process_time() - start)
        arguments.out.write_text(
            json.dumps(result, indent=1) + "\n"
        )  # after each, so that an end in between leaves something
    table(arguments.out)


if __name__ == "__main__":
    main()
