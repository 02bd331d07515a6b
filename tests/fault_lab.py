"""Small training runs in processes of their own, so that real signals, limits and damage can be done to them."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ld_checkpoint
from ld_data import open_images
from ld_train import Run, train
from ld_utils import Settings
from liquid_diffusion import LiquidDiffusion, RectifiedFlowTrainer, liquid_diffusion_nano

STEPS = 40


def small_trainer(seed=0, network=None, **options):
    torch.set_num_threads(1)  # such small layers gain nothing from two
    torch.manual_seed(seed)
    model = LiquidDiffusion(channels=(8, 16), blocks=(1, 1), **network or {})
    return RectifiedFlowTrainer(model, device="cpu", seed=seed, **options)


def nano_trainer():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return RectifiedFlowTrainer(liquid_diffusion_nano(), device="cpu")


def settings_for(run_dir, **changes):
    """Settings of a run of STEPS steps; `every` in `child` says when it saves."""
    small = dict(source="lab", preset="lab", image_size=8, minutes=5.0, batch_size=4, seed=0, smoke=False)
    extra = dict(rows_to_start=8, max_steps=STEPS, samples=4, steps=2, save_every=math.inf)
    return Settings(**{**small, **extra, "run_dir": Path(run_dir), **changes})


def open_pictures(folder, image_size):
    """A cache of 32 random pictures; the first call fills it, later ones find it complete."""
    numbers = np.random.default_rng(0)
    pictures = [numbers.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(32)]
    return open_images(pictures, image_size, cache_dir=folder)


def digest(state):
    """sha256 of all tensors in nested dicts and lists, in order."""
    total = hashlib.sha256()

    def take(value):
        if isinstance(value, torch.Tensor):
            total.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                take(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                take(item)

    take(state)
    return total.hexdigest()


@dataclass
class Outcome:
    """What a process left: exit status, printed sentences, steps done, step of the last save, and the end if it got there."""

    status: int
    said: str
    done: int
    saved: int
    digest: str = ""
    losses: tuple = ()
    counts: dict = None


class Lab:
    """A folder with pictures; `run` trains in a process forked from a server that has everything imported."""

    def __init__(self, folder):
        self.folder = Path(folder)
        root = Path(__file__).resolve().parent
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fault_lab", "faults"])
        for size in (8, 16):
            open_pictures(self.folder / "pictures", size).wait().close()
        self.straight = self.run(self.folder / "straight")
        assert self.straight.status == 0, self.straight.said

    def run(self, run_dir, fault=None, *arguments, every=5, deadline=300, **changes):
        """Train in a process that saves every few steps; fault(trainer, *arguments) is called in it first.

        deadline: seconds until it counts as hung; it takes one or two. changes: of the settings.
        """
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        logs = {name: run_dir / f"lab-{name}" for name in ("said", "steps", "saves", "end", "error")}
        for path in logs.values():
            path.unlink(missing_ok=True)
        job = (run_dir, self.folder / "pictures", logs, every, fault, arguments, changes)
        process = self.context.Process(target=child, args=job)
        process.start()
        process.join(deadline)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{run_dir} was not done after {deadline} s: {read(logs['said'])}")
        end = json.loads(read(logs["end"]) or "{}")
        steps, saves = (read(logs[name]).split() for name in ("steps", "saves"))
        said = read(logs["said"]) + read(logs["error"])
        return Outcome(process.exitcode, said, int((steps or [0])[-1]), int((saves or [0])[-1]), **end)


def read(path):
    return path.read_text() if path.exists() else ""


def child(run_dir, pictures, logs, every, fault, arguments, changes):
    """One training run, start to end, telling its steps and saves as they happen."""
    Run.keep = lambda run: run.seen % every or run.save()  # by steps, not by the clock
    settings = settings_for(run_dir, **changes)
    trainer = small_trainer() if settings.preset == "lab" else nano_trainer()
    cache = open_pictures(pictures, settings.stages[0].image_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(logs["said"], "w", buffering=1))))
        stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        log_saves(logs["saves"])
        if fault:
            fault(trainer, *arguments)
        log_steps(trainer, logs["steps"])
        try:
            train(trainer, cache, settings, lambda size: open_pictures(pictures, size))
        except RuntimeError as error:
            logs["error"].write_text(f"{type(error).__name__}: {error}\n")
    if not (run_dir / "checkpoint.pt").exists():
        return
    state = trainer.state_dict()
    saved = ld_checkpoint.load_checkpoint(run_dir / "checkpoint.pt")["run"]
    end = dict(digest=digest([state, saved["data"]]), losses=saved["losses"].tolist(), counts=state["counts"])
    logs["end"].write_text(json.dumps(end))


def log_steps(trainer, path):
    """Append the number of every step that is done; steps start from where a resumed run does."""
    step = trainer.train_step

    def logged(images):
        metrics = step(images)
        with open(path, "a") as file:
            file.write(f"{trainer.update.steps + trainer.update.skipped + (trainer.update.flag is not None)}\n")
        return metrics

    trainer.train_step = logged


def log_saves(path):
    """Append the step of every checkpoint of the run's own folder once it is in place."""
    save = ld_checkpoint.save_checkpoint

    def logged(state, target, previous=None):
        save(state, target, previous)
        with open(path, "a") as file:
            file.write(f"{state['run']['seen']}\n")

    ld_checkpoint.save_checkpoint = logged


# ---- where a process can be killed ----------------------------------------------------------------------------------


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(trainer, seconds):
    """Kill the process some seconds from now, wherever it is then."""
    threading.Thread(target=lambda: (time.sleep(seconds), kill()), daemon=True).start()


class DeadlyFile:
    """A file that kills the process when `limit` bytes are in it."""

    def __init__(self, path, mode, limit):
        self.file, self.left = open(path, mode), limit

    def write(self, data):
        if len(data) > self.left:
            self.file.write(bytes(data)[: self.left])
            self.file.flush()
            kill()
        self.left -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


PLACES = ("step", "write", "before fsync", "after fsync", "before rename", "between renames", "after rename")


def kill_at(trainer, place, count, share):
    """Kill the process at the count-th time that it comes to the place; share: of the file's bytes, for "write"."""
    if place == "step":
        before(trainer, "train_step", count, kill)
    elif place == "write":
        before(ld_checkpoint, "write_whole", count, lambda: deadly_open(share))
    elif place == "before fsync":
        before(os, "fsync", count, kill)
    elif place == "after fsync":
        after(os, "fsync", count, kill)
    elif place == "before rename":
        before(os, "replace", count, kill, to="checkpoint.pt")
    elif place == "between renames":  # the newest has become the previous, and nothing is the newest
        after(os, "replace", count, kill, to="checkpoint-previous.pt")
    else:
        after(os, "replace", count, kill, to="checkpoint.pt")


def deadly_open(share, size=800_000):
    """Let files opened by ld_checkpoint kill the process when this share of a checkpoint's bytes is written."""
    ld_checkpoint.open = lambda path, mode: DeadlyFile(path, mode, int(share * size))


def before(owner, name, count, act, to=""):
    """Call act() just before the count-th call of owner.name (whose last argument is a path that ends so)."""
    wrap(owner, name, count, lambda call: (act(), call())[1], to)


def after(owner, name, count, act, to=""):
    """Call act() just after the count-th call of owner.name (whose last argument is a path that ends so)."""
    wrap(owner, name, count, lambda call: (call(), act())[0], to)


def wrap(owner, name, count, around, to=""):
    original, left = getattr(owner, name), [count]

    def wrapped(*arguments, **options):
        left[0] -= str(arguments[-1]).endswith(to)
        if left[0] == 0 and str(arguments[-1]).endswith(to):
            return around(lambda: original(*arguments, **options))
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def kill_points(n, seed=0):
    """n places to kill a run at, spread over all kinds: (place, count, share)."""
    dice = random.Random(seed)
    return [(PLACES[i % len(PLACES)], dice.randint(1, 2), dice.random()) for i in range(n)]
