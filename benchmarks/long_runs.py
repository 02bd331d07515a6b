"""Longer runs: what the short ones of benchmarks/quality.py compare, seven times as long, and scored on the way.

    python benchmarks/long_runs.py --root FOLDER [--network NAME] [--seed 0]     # started again it goes on

Cats at 32 px, a tenth of them held out. Each network has the rate and the optimizer that were best for it in 300 steps, and as many
steps as fit into the CPU time of 2,000 of ours with AdamW; the plain recipe is run at the specification's rate too. Scores are those
of quality.py, quality_tables.py makes the table. Each run leaves one JSON in benchmarks/results/quality/long, with a point for
each part of the run that was scored, and in --keep its state and its last samples.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import quality
import torch
from quality import DEFAULT, DENSE, MUONS, Run, Study, write

sys.path.insert(0, str(Path(__file__).parent.parent))

import ld_eval  # noqa: E402

RESULTS = quality.RESULTS / "long"
HELD_OUT = quality.RESULTS / "held-out-32.json"  # what real pictures would score
STUDY, SHORT = Study("cats at 32 px", 2000), quality.STUDIES["larger"][0]
PARTS, SCORED = 8, (1, 2, 4, 8)  # of each run, and after which of them it is scored
RECIPES = {network: MUONS[network] for network in (DEFAULT, DENSE, "resblocks", "unet", "unet-attention")}
RECIPES |= {"relaxation spec": "plain"}


def runs(networks=tuple(RECIPES), seed=0):
    """A run for each network, at its own rate and in equal time; the plain recipe at 1e-4 too, as it is specified."""
    known = quality.records()
    for network in networks:
        recipe = RECIPES[network]
        rate = quality.best_rate(known, SHORT, network, recipe)
        steps = quality.steps_in_equal_time(STUDY, network, recipe)
        run = Run(STUDY.data, network, rate, seed, PARTS * round(steps / PARTS), recipe)
        yield run
        if recipe == "plain":
            yield replace(run, lr=1e-4)


def point(trainer, run, few, real):
    """Scores of the averaged weights, and the samples."""
    mse = ld_eval.velocity_mse(trainer.update.ema.model, few, times=5).mean().item()
    samples = quality.sample(trainer, run.size)
    return dict(mse=mse, **ld_eval.compare(real, ld_eval.features(samples))), samples


def go(run, images, real, keep):
    """Train and score a run from where it was; writes its state and its record after every part."""
    path, file = RESULTS / f"{run.name}.json", keep / f"{run.name}.pt"
    if path.exists() and json.loads(path.read_text())["done"] == PARTS:
        return
    trainer, (training, validation) = quality.trainer_of(run), quality.held_out(images)
    size = sum(p.numel() for p in trainer.model.parameters())
    about = dict(parameters=size, batch_size=quality.BATCH, machine=quality.machine())
    record = dict(asdict(run), **about, cpu_seconds=0.0, done=0, points={})
    if file.exists():
        saved = torch.load(file, weights_only=True)
        record = saved["record"]
        trainer.load_state_dict(saved["state"])
    for part in range(record["done"], PARTS):
        start = time.process_time()
        quality.fit(trainer, training, 1000 * part + run.seed, run.steps // PARTS, f"{run.name}, {part + 1}/{PARTS}")
        record["cpu_seconds"] += time.process_time() - start
        record["done"], samples = part + 1, None
        if part + 1 in SCORED:
            record["points"][str(part + 1)], samples = point(trainer, run, validation[:256], real)
        torch.save(dict(record=record, state=trainer.state_dict(), samples=samples), file)
        write(path, record)


def records():
    """The records of all runs that have a score, from the lowest last distance to the highest."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return sorted((r for r in found if r["points"]), key=lambda r: last(r)["frechet"])


def last(record):
    """The last scores of a run."""
    return record["points"][max(record["points"], key=int)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="folder of the sets")
    parser.add_argument("--network", choices=RECIPES, action="append", help="one network, or several; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/long"), help="folder for states and samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.keep.mkdir(parents=True, exist_ok=True)
    images = quality.pictures(arguments.root, STUDY.data)
    training, validation = quality.held_out(images)
    real = ld_eval.features(training)
    write(HELD_OUT, ld_eval.compare(real, ld_eval.features(validation[:320])))
    for run in runs(arguments.network or tuple(RECIPES), arguments.seed):
        go(run, images, real, arguments.keep)


if __name__ == "__main__":
    main()
