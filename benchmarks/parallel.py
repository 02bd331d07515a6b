"""What several GPUs gain: arithmetic and a small simulation, checked against two processes on this machine.

    python benchmarks/parallel.py --measure     # two processes over gloo, a minute or two; then the tables
    python benchmarks/parallel.py               # the tables again, from results/parallel.json

A step of P processes takes as long as the slowest one's gradients, plus one all-reduce of all gradients (nothing overlaps),
plus what each does alone. The all-reduce is a ring: 2 (P - 1) messages of bytes / P each, one after another.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from counting import MiB
from networks import ld
from scaling import counts
from vram import fake_check

import ld_parallel

STORED = Path(__file__).parent / "results" / "parallel.json"
LINKS = {  # bytes per second that a ring reaches on each link, and seconds per message: round figures, not measured here
    "PCIe 3.0": (8e9, 20e-6),
    "NVLink": (200e9, 10e-6),
    "Ethernet, 100 Gbit/s": (11e9, 40e-6),
    "Ethernet, 10 Gbit/s": (1.1e9, 40e-6),
}
GPUS = {
    "T4": 6.5e12,
    "A100": 31e12,
}  # FLOP per second that training reaches: a tenth of the peak in half precision, assumed
SPREAD = 0.03  # of one process's time from step to step, as a share; assumed
COUNTS = (2, 8, 64)
PICTURES, SIDE = 64, 64  # per GPU and step; pixels


# ---- the model ------------------------------------------------------------------------------------------------------


def ring_seconds(size, processes, bandwidth, latency):
    """Time of an all-reduce of `size` bytes."""
    return 2 * (processes - 1) * (size / processes / bandwidth + latency)


def slowest(times, processes, draws=20_000):
    """Mean of the largest of `processes` times, drawn at random from each process's own list."""
    numbers = np.random.default_rng(0)
    lists = [times[i % len(times)] for i in range(processes)]
    return np.stack([numbers.choice(each, draws) for each in lists]).max(0).mean()


def efficiency(work, size, processes, link):
    """Speed-up over one process, divided by their number, for a step of `work` seconds and a fixed number of pictures per GPU."""
    spread = work * np.random.default_rng(1).normal(1, SPREAD, 100_000)
    return work / (slowest([spread], processes) + ring_seconds(size, processes, *LINKS[link]))


def presets():
    """Per preset: parameters, and training FLOP per picture at SIDE (forward and backward are three forwards)."""
    ld.check_input = fake_check
    return {
        name: dict(
            parameters=sum(p.numel() for p in on_meta(name).parameters()),
            flop=6 * 1e9 * counts(lambda name=name: ld.liquid_diffusion(name), SIDE)["GMAC"],
        )
        for name in ld.PRESETS
    }


def on_meta(name):
    with torch.device("meta"):
        return ld.liquid_diffusion(name)


# ---- the check ------------------------------------------------------------------------------------------------------


class TimedTrainer(ld_parallel.SharedGradients, ld.RectifiedFlowTrainer):
    """Notes seconds of the own gradients and of the averaging, in `times`."""

    def gradients(self, images, noise, t):
        start, mine = time.perf_counter(), ld_parallel.part(len(images))
        loss = super(ld_parallel.SharedGradients, self).gradients(images[mine], noise[mine], t[mine])
        done = time.perf_counter()
        ld_parallel.average([loss] + [p.grad for p in self.model.parameters()])
        self.times.append((done - start, time.perf_counter() - done))
        return loss


def measured_worker(folder, steps, batch, side):
    ld_parallel.join()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = TimedTrainer(ld.liquid_diffusion_nano(), device="cpu")
    trainer.times, steps_taken = [], []
    images = torch.rand(batch, 3, side, side) * 2 - 1
    for _ in range(steps):
        start = time.perf_counter()
        trainer.train_step(images)
        steps_taken.append(time.perf_counter() - start)
    own, averaging = zip(*trainer.times)
    reduces = {size: reduce_seconds(size) for size in (10_000, 100_000, 1_000_000, 4_000_000)}
    result = dict(own=own, averaging=averaging, step=steps_taken, reduces=reduces)
    (Path(folder) / f"{ld_parallel.dist.get_rank()}.json").write_text(json.dumps(result))


def reduce_seconds(numbers, repeats=15):
    """Median time of averaging that many float32 numbers, both processes starting together."""
    vector, seconds = torch.zeros(numbers), []
    for _ in range(repeats):
        ld_parallel.dist.barrier()
        start = time.perf_counter()
        ld_parallel.average([vector])
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def measure(folder, steps=40, batch=16, side=32, skip=5):
    """Measured and simulated seconds of a step of two processes. The first steps, which warm up, do not count."""
    ld_parallel.launch(measured_worker, folder, steps, batch, side, processes=2)
    both = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    own = [np.array(one["own"][skip:]) for one in both]
    rest = [np.array(one["step"][skip:]) - own[i] - one["averaging"][skip:] for i, one in enumerate(both)]
    sizes, seconds = zip(*((4 * int(size), value) for size, value in both[0]["reduces"].items()))
    slope, offset = np.polyfit(sizes, seconds, 1)
    size = 4 * sum(p.numel() for p in on_meta("nano").parameters())
    simulated = slowest(own, 2) + offset + slope * size + np.mean(rest)
    return dict(
        own=float(np.mean(own)),
        slowest=float(slowest(own, 2)),
        averaging=float(offset + slope * size),
        rest=float(np.mean(rest)),
        simulated=float(simulated),
        measured=float(np.mean([one["step"][skip:] for one in both])),
        bytes_per_second=float(1 / slope),
        load=os.getloadavg()[0],
    )


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(result):
    """The Markdown of docs/scaling.md's tables."""
    check, rows = result["check"], result["presets"]
    yield "| one step of `nano`, two processes, 8 pictures of 32 px each | ms |\n|---|---|"
    labels = {
        "own": "gradients of one process, mean",
        "slowest": "the slower of two, simulated",
        "averaging": "averaging 3.7 MB, fitted",
        "rest": "the rest, mean",
        "simulated": "**step, simulated**",
        "measured": "**step, measured**",
    }
    for key, label in labels.items():
        yield f"| {label} | {1e3 * check[key]:.1f} |"
    yield (
        "\n| preset | gradients, MB | GFLOP a picture | T4: ms a step, "
        + f"{PICTURES} pictures | A100: ms a step |\n|---|---|---|---|---|"
    )
    for name, row in rows.items():
        times = " | ".join(f"{1e3 * PICTURES * row['flop'] / speed:.0f}" for speed in GPUS.values())
        yield f"| {name} | {4e-6 * row['parameters']:.1f} | {row['flop'] / 1e9:.1f} | {times} |"
    for gpu, speed in GPUS.items():
        head = " | ".join(f"{link}" for link in LINKS)
        yield f"\n| {gpu}, efficiency at {', '.join(map(str, COUNTS))} GPUs | {head} |\n|---|" + "---|" * len(LINKS)
        for name, row in rows.items():
            work = PICTURES * row["flop"] / speed
            cells = (
                ", ".join(f"{100 * efficiency(work, 4 * row['parameters'], n, link):.0f}" for n in COUNTS)
                for link in LINKS
            )
            yield f"| {name} | " + " | ".join(f"{cell} %" for cell in cells) + " |"
    parameters = rows["large"]["parameters"]
    yield "\n| `large` at P GPUs | each GPU keeps | bytes each sends per step |\n|---|---|---|"
    state = 4 * parameters / MiB
    yield f"| as here: weights, gradients, average, at most two moments | {5 * state:,.0f} MiB, and {state:,.0f} during the message | 2 (P - 1) / P x {state:,.0f} MiB |"
    yield f"| FSDP: all of it cut into P | {5 * state:,.0f} / P MiB, and one block's weights | 3 (P - 1) / P x {state:,.0f} MiB |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time two processes first")
    if parser.parse_args().measure:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            check = measure(folder)
        STORED.write_text(json.dumps(dict(check=check, presets=presets()), indent=1) + "\n")
    print("\n".join(tables(json.loads(STORED.read_text()))))


if __name__ == "__main__":
    main()
