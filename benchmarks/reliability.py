"""What a run survives: the fault table, a soak under random kills, and what checkpoints cost.

    python benchmarks/reliability.py            # about twenty minutes on two cores
    python benchmarks/reliability.py --soak 200 --cost 60 --out /tmp/results

Writes reliability.md (the README's table) and reliability.json to benchmarks/results. Each row of the table is a test too
(tests/test_reliability.py); a row whose checks fail stops the command.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import torch  # noqa: E402
from fault_lab import Lab, kill_after, nano_trainer, open_pictures, settings_for  # noqa: E402
from faults import FAULTS  # noqa: E402

import ld_checkpoint  # noqa: E402
import ld_train  # noqa: E402


def fault_rows(folder):
    """Do every fault to a run; [(fault, what is lost, what the user reads)]."""
    lab = Lab(folder / "lab")
    rows = []
    for index, (name, fault) in enumerate(FAULTS.items()):
        row = fault(lab, folder / f"fault-{index}")
        said = row.said.replace(f"{folder}/fault-{index}", "runs/mine").replace(f"/fault-{index}", "/mine")
        rows.append((name, row.lost, said))
        print(f"ok  {name}", flush=True)
    return lab, rows


def soak(lab, folder, steps, seed=0):
    """Train nano for `steps` steps, killed at random moments a few seconds apart, and compare with an undisturbed run."""
    options = dict(every=20, deadline=3600, preset="nano", max_steps=steps, batch_size=2)
    straight = lab.run(folder / "straight", **options)
    dice, kills, status = random.Random(seed), 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        outcome = lab.run(folder / "killed", kill_after, dice.uniform(2, 8), **options)
        status, kills = outcome.status, kills + (outcome.status == -signal.SIGKILL)
        assert kills < steps, "the run does not get anywhere between the kills"
    assert (outcome.status, straight.status) == (0, 0), outcome.said
    same = (outcome.digest, outcome.losses) == (straight.digest, straight.losses)
    assert same, "the killed run ended in other weights"
    return dict(steps=steps, kills=kills, bitwise_the_same=same)


def cost(folder, seconds):
    """Share of a run's time that one checkpoint a minute takes, measured within one run of nano at 8 px, batch 256.

    In the loop: the copy of the state, by the clock around it. Beside the loop: how much longer steps take while the
    thread writes, against those of the same run that nothing is written during.
    """
    trainer = nano_trainer()
    settings = settings_for(folder, image_size=8, preset="nano", max_steps=0, minutes=seconds / 60, batch_size=256)
    settings.save_every = 10.0  # more often than in a real run, for more of them to measure
    saves, quiet, busy = [], [], []
    run_step, run_save = ld_train.Run.step, ld_train.Run.save

    def step(run):
        writing, start = run.keeper.busy, time.perf_counter()
        run_step(run)
        (busy if writing else quiet).append(time.perf_counter() - start)

    def save(run):
        start = time.perf_counter()
        run_save(run)
        saves.append(time.perf_counter() - start)

    ld_train.Run.step, ld_train.Run.save = step, save
    try:
        ld_train.train(trainer, open_pictures(folder, 8).wait(), settings)
    finally:
        ld_train.Run.step, ld_train.Run.save = run_step, run_save
    saves = saves[1:]  # the first lies before the first step
    slower = max(0.0, sum(busy) - len(busy) * sum(quiet) / len(quiet))
    per_save = (sum(saves) + slower) / len(saves)
    return dict(
        saves=len(saves),
        steps=len(quiet) + len(busy),
        copy_seconds=sum(saves) / len(saves),
        steps_beside_a_write=len(busy),
        slower_seconds_per_save=slower / len(saves),
        megabytes=(folder / "checkpoint.pt").stat().st_size / 1e6,
        share_at_one_a_minute=per_save / 60,
    )


def markdown(results):
    soak, cost = results["soak"], results["cost"]
    lines = ["| fault | lost | what the user reads |", "|---|---|---|"]
    lines += [f"| {name} | {lost} | {said.replace('|', '/')} |" for name, lost, said in results["faults"]]
    lines += [
        "",
        f"Soak: {soak['steps']:,} steps of `nano` under {soak['kills']} kills (kill -9) at random moments ended in the same "
        "weights, averages and losses, bit by bit, as an undisturbed run.",
        "",
        f"Cost of a checkpoint a minute (`nano`, {cost['megabytes']:.0f} MB): {100 * cost['share_at_one_a_minute']:.2f} % of "
        f"the time, {1000 * cost['copy_seconds']:.0f} ms for the copy and {1000 * cost['slower_seconds_per_save']:.0f} ms for "
        "steps that run slower beside the writing thread, measured within one run.",
        "",
        "Made by `python benchmarks/reliability.py`.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", type=int, default=2000, help="steps of the soak")
    parser.add_argument("--cost", type=float, default=200, help="seconds of the run that measures the cost")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lab, rows = fault_rows(folder)
        results = dict(
            faults=rows, soak=soak(lab, folder / "soak", options.soak), cost=cost(folder / "cost", options.cost)
        )
    results |= dict(torch=torch.__version__, code=ld_checkpoint.code_version())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reliability.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "reliability.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
