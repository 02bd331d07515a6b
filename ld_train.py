"""The training loop around any trainer: budget, stages, live figure, and everything that keeps a run from being lost."""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
import time
from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from ld_checkpoint import Keeper, all_finite, code_version, random_state, set_random_state
from ld_data import open_images, to_model_range
from ld_utils import LiveFigure

SAME_RUN = ("source", "preset", "image_size", "plan", "recipe", "seed")  # settings that may not change within a run
PATIENCE = 20  # steps in a row without a finite gradient; float16 needs a few at the start to find its loss scale


class Diverged(RuntimeError):
    """Training met numbers that are not finite again and again; the message says what was seen."""


def train(trainer, cache, settings, open_cache=None):
    """Train until the budget is spent, going on with the run in settings.run_dir; returns the history, [(step, loss)].

    The budget is settings.max_steps, or if that is 0 settings.minutes, last preview, last checkpoint and the pictures of
    the notebook's next section included. trainer: a RectifiedFlowTrainer, or anything with its attributes. cache: pictures
    for the first stage; open_cache(image_size) opens those of later stages. SIGINT and SIGTERM end the loop after the
    current step and a checkpoint; SIGTERM is then obeyed. Raises Diverged, and ValueError for a run_dir of another run.
    """
    open_cache = open_cache or (lambda size: open_images(settings.source, size))
    run = Run(trainer, cache, settings, open_cache)
    return follow(run, Screen(run))


def follow(run, screen):
    """Train a Run to its end, or to the signal that ends it; returns its history."""
    with Signals() as signals, screen:
        run.say = run.trainer.say = screen.say
        run.resume()
        started = run.seen
        while not run.over(stop=signals.received):
            run.step()
            screen.refresh()
            run.keep()
        if run.seen > started:
            run.finish()
        if signals.received:
            screen.say(f"Stopped by {signals.name} after step {run.seen:,}; saved, and run again goes on from here.")
        if signals.received != signal.SIGTERM:
            screen.finish()
    signals.obey()
    return run.history


class Run:
    """A trainer on its way through the budget: what the loop knows beside the trainer, and how it is saved and restored."""

    def __init__(self, trainer, cache, settings, open_cache):
        self.trainer, self.settings, self.open_cache = trainer, settings, open_cache
        self.caches, self.say = {settings.stages[0].image_size: cache}, print
        self.stage = None  # side of the pictures, once there are any
        self.order = torch.Generator().manual_seed(settings.seed)  # of the pictures: the data position
        self.flips = torch.Generator().manual_seed(settings.seed + 1)
        self.seen, self.fresh = 0, []  # batches so far, and the losses that still lie on the device
        self.losses, self.history = [], []  # of every batch; (step, loss) of those that are finite
        self.rows = None  # in the cache at the checkpoint that this run goes on from
        self.best = math.inf  # lowest mean loss at a save
        self.halved = False  # whether the learning rate was, after bad numbers
        for stage in settings.stages:
            check_side(stage.image_size, getattr(trainer.model, "multiple", 1))
        self.clock = Clock(settings)
        self.keeper = Keeper(settings.run_dir, settings.backup)

    # ---- the budget

    def progress(self):
        """Share of the budget that is spent: of the steps if there is a number of them, else of the time."""
        steps = self.settings.max_steps
        return min(1.0, self.seen / steps if steps else self.clock.progress(self.keeper.seconds))

    def over(self, stop=False):
        return bool(stop) or self.progress() >= 1

    def step(self):
        """One batch."""
        self.trainer.progress = self.progress()
        self.enter_stage()
        metrics = self.trainer.train_step(self.pictures())
        self.seen += 1
        self.fresh.append(metrics["loss"])
        if self.trainer.update.skipped_in_a_row >= PATIENCE:
            self.recover()

    def pictures(self):
        """The next batch, [B, 3, H, W] in [-1, 1] on the trainer's device."""
        batch = self.caches[self.stage].batch(self.settings.batch_size, generator=self.order)
        return to_model_range(batch, self.trainer.device, generator=self.flips)

    def collect(self):
        """Read the losses that still lie on the device: one wait for all of them."""
        self.add(torch.stack(self.fresh).tolist() if self.fresh else [])
        self.fresh.clear()

    def add(self, losses):
        """Append losses, one per batch, to the record."""
        self.history += [(len(self.losses) + i, loss) for i, loss in enumerate(losses, 1) if math.isfinite(loss)]
        self.losses += losses

    def recent(self, n=100):
        """Mean of the last n finite losses."""
        losses = [loss for _, loss in self.history[-n:]]
        return sum(losses) / len(losses) if losses else math.inf

    # ---- growing resolution

    def enter_stage(self):
        """Open the pictures of the stage that the progress has reached, shift the noise for their size, fit the batch."""
        stages, progress = self.settings.stages, self.trainer.progress
        index = next((i for i, stage in enumerate(stages) if progress < stage.end), len(stages) - 1)
        size = stages[index].image_size
        if size == self.stage:
            if index + 1 < len(stages) and self.caches[size].complete:
                self.cache(stages[index + 1].image_size)  # filled while this stage trains
            return
        if self.stage:
            self.say(f"Step {self.seen:,}: the pictures grow from {self.stage} to {size} px.")
        self.check_rows(self.cache(size).wait(self.settings.rows_to_start))
        self.stage, self.trainer.shift = size, size / stages[0].image_size  # arXiv 2403.03206, eq. 23
        self.trainer.self_test(size)
        if self.trainer.device.type == "cuda":
            self.trainer.fit_micro_batch(self.settings.batch_size, size)

    def check_rows(self, cache):
        """Say it where the pictures are not those that a resumed run saw, as then it cannot be the same bit by bit."""
        if self.stage is None and self.rows not in (None, len(cache)):
            self.say(f"The cache held {self.rows:,} pictures and now holds {len(cache):,}, so their order is another.")

    def cache(self, size):
        """The pictures of one side."""
        if size not in self.caches:
            self.caches[size] = self.open_cache(size)
        return self.caches[size]

    # ---- checkpoints

    def state(self):
        """Everything that a later process needs to do the next step as this one would."""
        self.collect()
        loop = dict(
            seen=self.seen,
            losses=torch.tensor(self.losses),
            best=self.best,
            halved=self.halved,
            elapsed=self.clock.elapsed(),
            progress=self.progress(),
            data=[self.order.get_state(), self.flips.get_state()],
            rows=len(self.caches[self.stage]) if self.stage else None,
        )
        settings = {**asdict(self.settings), "run_dir": str(self.settings.run_dir)}
        return self.trainer.state_dict() | dict(run=loop, settings=settings, random=random_state(), code=code_version())

    def keep(self):
        """Save if a checkpoint is due and the last one is written."""
        if self.clock.save_due() and not self.keeper.busy:
            self.save()

    def save(self):
        """Hand a checkpoint to the keeper, unless the last step was a bad one or the weights are; best: by mean loss."""
        state = self.state()
        if state["counts"]["skipped_in_a_row"] == 0 and sound(state):
            self.hand_over(state)
        self.clock.saved()
        self.tell()

    def hand_over(self, state):
        """Let the keeper write a good state, as the best too if its mean loss is the lowest."""
        best = self.recent() < self.best
        self.best = state["run"]["best"] = min(self.best, self.recent())
        self.keeper.save(state, best)

    def finish(self):
        """The last checkpoint; weights that are not finite are not kept but replaced by those of the one before."""
        state = self.state()
        if sound(state):
            self.hand_over(state)
            self.keeper.wait()
        else:
            self.go_back()
            self.say(f"The last weights are not finite; those of step {self.seen:,} are back.")
        self.tell()

    def tell(self):
        """Say what the keeper has to report."""
        while self.keeper.news:
            self.say(self.keeper.news.pop(0))

    def resume(self):
        """Go on from the newest checkpoint, if there is one; without, save the start, so that there is always a way back."""
        if self.settings.resume == "never" or self.settings.smoke:
            self.keeper.set_aside(keep=not self.settings.smoke)
        state = self.keeper.load_newest()
        self.tell()
        if state is None:
            return self.save()
        check_same_run(state.get("settings", {}), self.settings)
        self.load(state)
        self.clock.go_on(state["run"], same=state["settings"]["minutes"] == self.settings.minutes)
        self.say(self.greeting(state))

    def load(self, state):
        """Take over a checkpoint, all but the time that was spent."""
        loop = state["run"]
        self.trainer.load_state_dict(state)
        set_random_state(state["random"])
        for generator, saved in zip((self.order, self.flips), loop["data"]):
            generator.set_state(saved)
        self.seen, self.best, self.halved = loop["seen"], loop["best"], loop["halved"]
        self.losses, self.history, self.fresh = [], [], []
        self.add(loop["losses"].tolist())
        self.rows = loop["rows"]

    def greeting(self, state):
        """What is said when a run goes on."""
        steps, minutes = f"{self.seen:,} steps", state["run"]["elapsed"] / 60
        if self.over():
            return (
                f"This run is finished ({steps}, {minutes:.1f} min): its weights are loaded. Raise the minutes to train on, "
                "or set resume to 'never' to start anew."
            )
        before, now = state["settings"], asdict(self.settings)
        changes = [name for name in ("minutes", "max_steps", "batch_size") if before[name] != now[name]]
        changes += ["the code"] * (state["code"] != code_version())
        note = f" Changed since: {', '.join(changes)}." if changes else ""
        return f"Going on after {steps} and {minutes:.1f} min.{note}"

    # ---- numbers that are not finite

    def recover(self):
        """Go back to the last good checkpoint with half the learning rate; the second time, go back and raise Diverged."""
        update, again = self.trainer.update, self.halved
        rate = update.lr_scale / 2
        what = f"{update.skipped_in_a_row} steps in a row, up to step {self.seen:,}, had a gradient that is not finite"
        self.go_back()
        if again:
            raise Diverged(
                f"{what}, a second time after the learning rate was halved; the weights of step {self.seen:,} are back. "
                "Lower the learning rate, or look for pictures that are out of range."
            )
        update.lr_scale, self.halved = rate, True
        self.say(f"{what}: back to step {self.seen:,} with half the learning rate.")

    def go_back(self):
        """Take over the last good checkpoint; Diverged if there is none."""
        self.keeper.wait()
        state = self.keeper.load_newest()
        self.tell()
        if state is None:
            raise Diverged(
                "The numbers are not finite and there is no checkpoint to go back to; lower the learning rate."
            )
        self.load(state)


def sound(state):
    """True if all weights in a checkpoint are finite, the newest and the averaged."""
    return all_finite([*state["model"].values(), *state["ema"].values()])


def check_same_run(saved, settings):
    """Raise a ValueError if the folder holds a run that is not this one."""
    for name in SAME_RUN:
        if saved.get(name, getattr(settings, name)) != getattr(settings, name):
            raise ValueError(
                f"{settings.run_dir} holds a run with {name} = {saved[name]!r}, and now it is {getattr(settings, name)!r}; "
                "set LD_RUN_DIR to another folder, or resume to 'never' to set that run aside."
            )


def check_side(size, multiple):
    """Raise a ValueError, before the first stage, for pictures that a later stage could not train on."""
    if size % multiple:
        raise ValueError(
            f"{size} px is not a multiple of {multiple}, as this network needs; change image_size or the plan."
        )


class Signals:
    """Within it SIGINT and SIGTERM are noted in `received`, not obeyed; a second SIGINT interrupts at once."""

    def __enter__(self):
        self.received, self.before = None, {}
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def name(self):
        return "hand" if self.received == signal.SIGINT else "the system (SIGTERM)"

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def obey(self):
        """End the process as SIGTERM asked, now that everything is saved."""
        if self.received == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)


class Clock:
    """Time that is spent, in training and beside it, and what is due."""

    def __init__(self, settings):
        self.budget, self.save_every = settings.minutes * 60, settings.save_every
        self.start = self.last_save = time.monotonic()
        self.previews, self.furthest = [], 0.0  # seconds of each preview; progress at its furthest
        # the notebook shows about 1.6 times the final grid's work; a preview is 24 pictures of 20 steps
        self.final_previews = 1 + 1.6 * settings.samples * settings.steps / (24 * 20)

    def go_on(self, saved, same):
        """Count the time that was spent before; same: the budget has not changed since, so neither has the progress."""
        self.start -= saved["elapsed"]
        self.furthest = saved["progress"] if same else 0.0

    def elapsed(self):
        return time.monotonic() - self.start

    def preview_seconds(self):
        """The median of the previews so far, so that one that met a stall of the machine does not end the run early."""
        return statistics.median_low(self.previews) if self.previews else 0.0

    def progress(self, save_seconds):
        """Share of the time, less what the end will take by the measure of previews and saves so far; it never falls."""
        reserve = self.preview_seconds() * self.final_previews + 2 * save_seconds
        usable = self.budget - min(reserve, self.budget / 3)
        self.furthest = max(self.furthest, self.elapsed() / usable)
        return self.furthest

    def save_due(self):
        return time.monotonic() - self.last_save >= self.save_every

    def saved(self):
        self.last_save = time.monotonic()


class Screen:
    """The bar and the live figure of a run. Previews take at most a twentieth of the time."""

    def __init__(self, run, bar_every=1.0, preview_every=20.0):
        self.run, self.bar_every, self.preview_every = run, bar_every, preview_every
        settings = run.settings
        self.live = LiveFigure(settings.run_dir, f"{settings.preset}, {settings.image_size} px, {settings.source}")
        self.bar = tqdm(total=1.0, desc="train", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}")
        self.say = self.bar.write
        self.last_bar = self.last_preview = time.monotonic()
        self.since, self.training = 0, 0.0  # steps and seconds without previews, for the rate

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.run.keeper.wait()
        self.run.tell()
        self.bar.close()

    def refresh(self):
        """Bring the bar, and from time to time the figure, up to date."""
        now = time.monotonic()
        self.since += 1
        if now - self.last_bar < self.bar_every:
            return
        self.training += now - self.last_bar
        self.run.collect()
        self.report()
        if now - self.last_preview >= max(self.preview_every, 20 * self.run.clock.preview_seconds()):
            self.preview()
        self.last_bar = time.monotonic()

    def report(self):
        """Share of the budget, step, mean loss of the last 50 steps, pictures per second, time left, steps skipped."""
        run, clock = self.run, self.run.clock
        rate = self.since * run.settings.batch_size / max(self.training, 1e-9)
        left = "" if run.settings.max_steps else f" | {max(0.0, clock.budget - clock.elapsed()) / 60:.1f} min left"
        skipped = f" | {run.trainer.update.skipped} skipped" if run.trainer.update.skipped else ""
        self.bar.n = run.progress()
        self.bar.set_postfix_str(f"step {run.seen:,} | loss {run.recent(50):.4f} | {rate:,.0f} img/s{left}{skipped}")

    def preview(self):
        """Redraw the figure with pictures from the same noise each time."""
        start, settings = time.monotonic(), self.run.settings
        pictures = self.run.trainer.sample(
            min(24, settings.samples),
            image_size=self.run.stage or settings.image_size,
            num_steps=min(20, settings.steps),
            seed=settings.seed,
        )
        self.live.update(self.run.history, pictures)
        self.last_preview = time.monotonic()
        self.run.clock.previews.append(self.last_preview - start)

    def finish(self):
        """The last picture of the run: bar, figure, loss.png."""
        self.report()
        self.preview()
        self.live.finish(self.run.history)
