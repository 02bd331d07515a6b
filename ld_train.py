"""The training loop around any trainer: time budget, progress, live figure. The step itself is the trainer's."""

from __future__ import annotations

import time

import torch
from tqdm.auto import tqdm

from ld_data import to_model_range
from ld_utils import LiveFigure


def train(trainer, cache, settings):
    """Train until settings.minutes are over (or settings.max_steps, if not 0) and return the history, [(step, loss)].

    trainer: has train_step(images) -> {"loss": tensor, ...}, sample(n, ...), progress and device. Keyboard interrupt ends
    the loop after the current step, without an error.
    """
    generator = torch.Generator().manual_seed(settings.seed)  # order and flips of the pictures
    clock, history, fresh = Clock(settings), [], []
    live = LiveFigure(settings.run_dir, f"{settings.preset}, {settings.image_size} px, {settings.source}")
    bar = tqdm(total=1.0, desc="train", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}")
    try:
        while not clock.over():
            trainer.progress = clock.progress()
            batch = cache.batch(settings.batch_size, generator=generator)
            metrics = trainer.train_step(to_model_range(batch, trainer.device, generator=generator))
            clock.steps += 1
            fresh.append((clock.steps, metrics["loss"]))
            if clock.due():
                history += [(step, loss.item()) for step, loss in fresh]
                fresh.clear()
                report(bar, clock, settings, history)
                if clock.preview_due():
                    live.update(history, preview(trainer, settings))
                    clock.preview_done()
    except KeyboardInterrupt:
        bar.write(f"Stopped by hand after {clock.steps:,} steps; what was learned so far stays.")
    history += [(step, loss.item()) for step, loss in fresh]
    live.update(history, preview(trainer, settings))
    live.finish(history)
    report(bar, clock, settings, history)
    bar.close()
    return history


def preview(trainer, settings, num_steps=20):
    """Pictures from the same noise each time, [n, C, H, W]."""
    n = min(24, settings.samples)
    return trainer.sample(
        n, image_size=settings.image_size, num_steps=min(num_steps, settings.steps), seed=settings.seed
    )


def report(bar, clock, settings, history):
    """Bring the bar up to date: share of the budget, step, mean loss of the last 50 steps, pictures per second, time left."""
    recent = [loss for _, loss in history[-50:]]
    rate = clock.steps * settings.batch_size / max(clock.training, 1e-9)
    left = max(0.0, clock.budget - clock.elapsed())
    bar.n = min(1.0, clock.progress())
    bar.set_postfix_str(
        f"step {clock.steps:,} | loss {sum(recent) / max(1, len(recent)):.4f} | {rate:,.0f} img/s | {left / 60:.1f} min left"
    )


class Clock:
    """What is spent of the budget, and when the bar and the preview are due. Previews take at most a twentieth of the time."""

    def __init__(self, settings, bar_every=1.0, preview_every=20.0):
        self.budget, self.max_steps, self.steps = settings.minutes * 60, settings.max_steps, 0
        self.bar_every, self.preview_every = bar_every, preview_every
        self.start = self.last_bar = self.last_preview = self.preview_start = time.monotonic()
        self.training = 0.0  # seconds of training alone

    def elapsed(self):
        return time.monotonic() - self.start

    def progress(self):
        """Share of the budget that is spent, in time or in steps, whichever is further."""
        return max(self.elapsed() / self.budget, self.steps / self.max_steps if self.max_steps else 0.0)

    def over(self):
        return self.progress() >= 1

    def due(self):
        now = time.monotonic()
        if now - self.last_bar < self.bar_every:
            return False
        self.training += now - max(self.last_bar, self.last_preview)
        self.last_bar = self.preview_start = now
        return True

    def preview_due(self):
        return self.preview_start - self.last_preview >= self.preview_every

    def preview_done(self):
        self.last_preview = time.monotonic()
        self.preview_every = max(self.preview_every, 20 * (self.last_preview - self.preview_start))
