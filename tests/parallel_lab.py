"""Runs of two, three and four processes on one cache: `python parallel_lab.py FOLDER` leaves what test_parallel.py looks at."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from fault_lab import log_saves, open_pictures, settings_for

import ld_data
import ld_parallel
from liquid_diffusion import LiquidDiffusion, RectifiedFlowTrainer

BATCH, STEPS = 12, 10  # of 32 pictures, so an epoch is two steps and leaves eight pictures out


class SharedTrainer(ld_parallel.SharedGradients, RectifiedFlowTrainer):
    def say(self, sentence):
        pass


def work(folder, name, fault=None, precision=None):
    """One process of a run; notes which pictures it reads and its last weights, and suffers the fault if it is the second."""
    ld_parallel.join(timeout=300)
    rank, run_dir = ld_parallel.dist.get_rank(), folder / name
    torch.manual_seed(0 if rank == 0 else 99)  # the first process's weights count
    trainer = SharedTrainer(
        LiquidDiffusion(channels=(16, 32), blocks=(1, 1)), device="cpu", lr=1e-3, precision=precision
    )
    cache = open_pictures(folder / "pictures", 8)
    reads = note_reads(cache)
    run_dir.mkdir(exist_ok=True)
    log_saves(run_dir / "saves")
    if fault and rank == 1:
        fault(trainer)
    history = ld_parallel.train(trainer, cache, settings_for(run_dir, batch_size=BATCH, max_steps=STEPS))
    trainer.update.settle()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    counts = {name: getattr(trainer.update, name) for name in ("steps", "skipped")} | trainer.update.scaler.state_dict()
    first = trainer.update.ema.model.state_dict() if rank == 0 else None
    torch.save(
        dict(weights=weights, ema=first, reads=reads, counts=counts, history=history),
        run_dir / f"end-{rank}-of-{ld_parallel.dist.get_world_size()}.pt",
    )


def note_reads(cache):
    """The list that will hold the rows of every read of cache.images[rows]."""
    reads = []

    class Noting:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, rows):
            reads.append(rows.tolist())
            return self.images[rows]

    images = ld_data.ImageCache.images.fget
    cache.__class__ = type(
        "NotingCache", (ld_data.ImageCache,), {"images": property(lambda self: Noting(images(self)))}
    )
    return reads


def die(trainer):
    """Kill the process in its fourth step."""
    on_step(trainer, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail(trainer):
    on_step(trainer, 4, lambda: {}["a name that is not there"])


def stop(trainer):
    on_step(trainer, 4, lambda: os.kill(os.getpid(), signal.SIGINT))


def bad_number(trainer):
    """An infinity in the gradients of this process's part, in the fourth step."""
    on_step(trainer, 4, lambda: trainer.model.stem[0].bias.register_hook(once(lambda grad: grad + float("inf"))))


def once(change):
    times = iter([change])
    return lambda grad: next(times, lambda same: same)(grad)


def on_step(trainer, number, act):
    step, done = trainer.train_step, []

    def changed(images):
        done.append(None)
        if len(done) == number:
            act()
        return step(images)

    trainer.train_step = changed


def outcome(*job, processes):
    """What launch said: nothing, or the sentence of WorkerLost."""
    try:
        ld_parallel.launch(work, *job, processes=processes)
    except ld_parallel.WorkerLost as error:
        return str(error)
    return None


def main(folder):
    open_pictures(folder / "pictures", 8).wait().close()
    said = {
        "two": outcome(folder, "two", processes=2),
        "four": outcome(folder, "four", processes=4),
        "stopped": outcome(folder, "resumed", stop, processes=2),
        "resumed": outcome(folder, "resumed", processes=3),
        "killed": outcome(folder, "killed", die, processes=2),
        "after the kill": outcome(folder, "killed", processes=2),
        "failed": outcome(folder, "failed", fail, processes=2),
        "bad number": outcome(folder, "bad", bad_number, torch.float16, processes=2),
        "uneven": outcome(folder, "uneven", processes=5),
    }
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
