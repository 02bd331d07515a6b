"""The faults of the README's table: each is done to a real run, checked, and returned as a Row of that table."""

import io
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from fault_lab import STEPS, after, before, kill_at, kill_points

import ld_checkpoint
from ld_train import PATIENCE

HALF = STEPS // 2
SAME = "nothing: the same run, bit by bit"


@dataclass
class Row:
    """What a fault costs, and the sentence that the user reads."""

    lost: str
    said: str


def sentence(outcome, *words):
    """The printed line that holds the words; fails if there is none."""
    lines = [line for line in outcome.said.splitlines() if all(word in line for word in words)]
    assert lines, f"nothing printed says {words}: {outcome.said!r}"
    return lines[-1]


def same(lab, outcome):
    """Assert that a run ended as the undisturbed one did: weights, average, optimizer, randomness and every loss."""
    assert outcome.status == 0, outcome.said
    assert outcome.losses == lab.straight.losses
    assert outcome.digest == lab.straight.digest


def newest(folder):
    return ld_checkpoint.load_checkpoint(folder / "checkpoint.pt")["run"]["seen"]


# ---- the end of a process -------------------------------------------------------------------------------------------


def killed_half_way(lab, folder):
    """Kill a run right after the save at step HALF; returns the outcome."""
    outcome = lab.run(folder, die_after_save_at, HALF)
    assert outcome.status == -signal.SIGKILL and outcome.saved == HALF
    return outcome


def die_after_save_at(trainer, step):
    """Wait for the save of this step and then kill the process."""
    save = ld_checkpoint.Keeper._write

    def write(self, state, best):
        save(self, state, best)
        if state["run"]["seen"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    ld_checkpoint.Keeper._write = write
    after(trainer, "train_step", step + 1, lambda: time.sleep(60))  # killed long before


def kill_once(lab, folder):
    killed_half_way(lab, folder)
    outcome = lab.run(folder)
    same(lab, outcome)
    return Row(SAME, sentence(outcome, "Going on after", f"{HALF} steps"))


def kill_at_20_points(lab, folder):
    straight = lab.run(folder / "straight", max_steps=120)
    lost = []
    for place, count, share in kill_points(20):
        outcome = lab.run(folder, kill_at, place, count, share, every=3, max_steps=120)
        assert outcome.status == -signal.SIGKILL, (place, outcome)
        keeper = ld_checkpoint.Keeper(folder)
        seen = keeper.load_newest()["run"]["seen"]
        assert seen >= outcome.saved and not keeper.news, (place, keeper.news)
        lost.append(max(0, outcome.done - seen))
    outcome = lab.run(folder, max_steps=120)
    assert (outcome.status, outcome.losses, outcome.digest) == (0, straight.losses, straight.digest)
    said = sentence(outcome, "Going on after")
    return Row(f"the steps since the last save, here {min(lost)} to {max(lost)}; then the same run, bit by bit", said)


def terminated(lab, folder):
    outcome = lab.run(folder, send, signal.SIGTERM)
    assert outcome.status == -signal.SIGTERM and newest(folder) == outcome.done == HALF
    same(lab, lab.run(folder))
    return Row(SAME, sentence(outcome, "Stopped by the system"))


def interrupted(lab, folder):
    outcome = lab.run(folder, send, signal.SIGINT)
    assert outcome.status == 0 and newest(folder) == outcome.done == HALF  # the notebook goes on
    assert (folder / "preview.png").exists()
    same(lab, lab.run(folder))
    return Row(SAME, sentence(outcome, "Stopped by hand"))


def send(trainer, number):
    """Send the process a signal in the middle of step HALF."""
    before(trainer, "gradients", HALF, lambda: os.kill(os.getpid(), number))


# ---- disks and folders ----------------------------------------------------------------------------------------------


def disk_full(lab, folder):
    outcome = lab.run(folder, fill_disk)
    same(lab, outcome)
    sentence(outcome, "written to", "again")
    return Row(SAME, sentence(outcome, "No checkpoint could be written"))


def fill_disk(trainer):
    """From step 10 to step HALF the kernel lets no file grow beyond 100 kB, as if the disk were full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before(trainer, "gradients", 10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))
    before(trainer, "gradients", HALF, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


def disk_full_and_killed(lab, folder):
    outcome = lab.run(folder, fill_disk_and_die)
    assert outcome.status == -signal.SIGKILL
    assert newest(folder) == outcome.saved < HALF
    same(lab, lab.run(folder))
    return Row("the steps since the last save that fitted", "Going on after ... steps (in the next run)")


def fill_disk_and_die(trainer):
    fill_disk(trainer)
    before(trainer, "train_step", HALF - 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def backup_read_only(lab, folder):
    outcome = lab.run(folder, backup=read_only(folder))
    same(lab, outcome)
    return Row(SAME, sentence(outcome, "No checkpoint could be written"))


def read_only(folder):
    """A folder that takes no files even from root, or, where there is none, a file in place of the folder."""
    if Path("/sys/kernel").is_dir():
        return "/sys/kernel"
    (folder / "backup").write_text("no folder")
    return str(folder / "backup")


def backup_vanishes(lab, folder):
    drive = folder / "drive"
    (drive / "mine").mkdir(parents=True)
    outcome = lab.run(folder, unmount, drive, backup=str(drive / "mine" / "backup"))
    same(lab, outcome)
    assert newest(drive / "mine" / "backup" / folder.name) == STEPS  # it came back and got the last one
    sentence(outcome, "written to", "again")
    return Row(SAME, sentence(outcome, "No checkpoint could be written", "drive"))


def unmount(trainer, drive):
    """The drive is gone from step 10 to step HALF."""
    gone = drive.with_name("gone")
    before(trainer, "train_step", 10, lambda: os.rename(drive, gone))
    before(trainer, "train_step", HALF, lambda: os.rename(gone, drive))


def machine_lost(lab, folder):
    (folder / "drive").mkdir(parents=True)
    backup = str(folder / "drive" / "backup")
    outcome = lab.run(folder / "run", die_after_save_at, HALF, backup=backup)
    assert outcome.status == -signal.SIGKILL
    shutil.rmtree(folder / "run")
    outcome = lab.run(folder / "run", backup=backup)
    same(lab, outcome)
    return Row(SAME + ", from the second folder", sentence(outcome, "Going on after", f"{HALF} steps"))


# ---- damaged files --------------------------------------------------------------------------------------------------


def damaged(damage):
    """A fault: the newest checkpoint is damaged, and the run goes on from the one before."""

    def fault(lab, folder):
        killed_half_way(lab, folder)
        path = folder / "checkpoint.pt"
        before_that = ld_checkpoint.load_checkpoint(folder / "checkpoint-previous.pt")["run"]["seen"]
        path.write_bytes(damage(path.read_bytes(), folder))
        outcome = lab.run(folder)
        same(lab, outcome)
        assert not (folder / "ran").exists()
        sentence(outcome, "Going on after", f"{before_that} steps")
        assert (folder / "checkpoint.pt.damaged").exists()
        lost = f"the steps since the checkpoint before it, here {HALF - before_that}; then the same run, bit by bit"
        return Row(lost, sentence(outcome, "the checkpoint before it is used"))

    return fault


def truncated(content, folder):
    return content[: len(content) * 2 // 3]


def flipped(content, folder):
    """One bit of the largest tensor flips, which leaves the file readable to torch."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tensors = [item for item in archive.infolist() if "/data/" in item.filename]
    largest = max(tensors, key=lambda item: item.file_size)
    start = largest.header_offset + 30 + sum(struct.unpack("<HH", content[largest.header_offset + 26 :][:4]))
    place = start + largest.file_size // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def empty(content, folder):
    return b""


def foreign(content, folder):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, folder / "foreign.pt")
    return (folder / "foreign.pt").read_bytes()


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def malicious(content, folder):
    torch.save({"model": Payload(folder / "ran"), "config": {}, "format": 1}, folder / "malicious.pt")
    return (folder / "malicious.pt").read_bytes()


def malicious_pickle(content, folder):
    return pickle.dumps(Payload(folder / "ran"))


def all_damaged(lab, folder):
    killed_half_way(lab, folder)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (folder / name).write_bytes(b"\0" * 1000)
    outcome = lab.run(folder)
    assert outcome.done == 0 and "CheckpointError" in outcome.said
    return Row("the run; a second folder would have saved it", sentence(outcome, "None of the 2 checkpoints"))


# ---- bad numbers and too little memory ------------------------------------------------------------------------------


def nan_in_batch(lab, folder):
    outcome = lab.run(folder, spoil_batch, HALF)
    return one_step_lost(outcome)


def nan_in_gradient(lab, folder):
    outcome = lab.run(folder, spoil_gradient, HALF)
    return one_step_lost(outcome)


def one_step_lost(outcome):
    assert outcome.status == 0
    assert (outcome.counts["steps"], outcome.counts["skipped"]) == (STEPS - 1, 1)
    return Row("one step, which changes nothing and is counted", "... | 1 skipped (in the progress bar)")


def spoil_batch(trainer, step):
    original, calls = trainer.train_step, iter(range(1, 10_000))

    def spoilt(images):
        if next(calls) == step:
            images[0, 0, 0, 0] = math.nan
        return original(images)

    trainer.train_step = spoilt


def spoil_gradient(trainer, step):
    weight = trainer.model.stem[0].weight
    before(trainer, "accumulate", step, lambda: spoil_next_gradient(weight))


def spoil_next_gradient(weight):
    def spoil(gradient):
        handle.remove()
        return gradient * math.inf

    handle = weight.register_hook(spoil)


def nan_in_weights(lab, folder):
    outcome = lab.run(folder, spoil_weights, HALF, max_steps=60)
    assert outcome.status == 0
    assert outcome.counts["lr_scale"] == 0.5
    assert outcome.counts["steps"] == 60 and outcome.counts["skipped"] == 0  # counted from the way back on
    assert len(outcome.losses) == 60 and all(map(math.isfinite, outcome.losses))
    said = sentence(outcome, f"{PATIENCE} steps in a row", "half the learning rate")
    return Row(f"the steps since the last save and {PATIENCE} more", said)


def spoil_weights(trainer, step):
    before(trainer, "train_step", step, lambda: trainer.model.stem[0].weight.data[0].fill_(math.nan))


def nan_for_good(lab, folder):
    outcome = lab.run(folder, spoil_all_from, HALF, max_steps=60)
    assert "Diverged" in outcome.said
    assert newest(folder) <= HALF
    assert outcome.counts["skipped"] == 0  # the good weights are back
    sentence(outcome, "half the learning rate.")
    return Row("the steps since the last save; the run stops", sentence(outcome, "a second time"))


def spoil_all_from(trainer, step):
    original = trainer.train_step

    def spoilt(images):
        return original(images * math.nan if trainer.update.steps >= step - 1 else images)

    trainer.train_step = spoilt


def out_of_memory(lab, folder):
    outcome = lab.run(folder, small_memory)
    assert outcome.status == 0 and outcome.counts["steps"] == STEPS
    for ours, theirs in zip(outcome.losses, lab.straight.losses):
        assert math.isclose(ours, theirs, rel_tol=0.02)  # the same steps but for rounding
    return Row("no step; the batch is done again in parts", sentence(outcome, "Out of memory"))


def small_memory(trainer):
    """From step HALF on the network takes two pictures at once and no more, as a device with other users might."""
    forward, calls = trainer.model.forward, iter(range(1, 10_000))

    def small(x, t):
        if len(x) > 2 and torch.is_grad_enabled() and next(calls) > HALF:
            raise torch.OutOfMemoryError("simulated")
        return forward(x, t)

    trainer.model.forward = small


FAULTS = {
    "kill -9 after half of the run": kill_once,
    "kill -9 at 20 points before, during and after writes, one after another": kill_at_20_points,
    "SIGTERM": terminated,
    "SIGINT (stop button)": interrupted,
    "disk full during saves, later free again": disk_full,
    "disk full during saves, then kill -9": disk_full_and_killed,
    "second folder is read-only": backup_read_only,
    "second folder vanishes and comes back": backup_vanishes,
    "the machine is lost, the second folder is left": machine_lost,
    "newest checkpoint truncated": damaged(truncated),
    "newest checkpoint with one bit flipped": damaged(flipped),
    "newest checkpoint empty": damaged(empty),
    "newest checkpoint from another project": damaged(foreign),
    "newest checkpoint with code in its pickle": damaged(malicious),
    "newest checkpoint a bare pickle with code": damaged(malicious_pickle),
    "all checkpoints damaged": all_damaged,
    "NaN in a batch": nan_in_batch,
    "infinity in a gradient": nan_in_gradient,
    "NaN in the weights": nan_in_weights,
    "NaN in every batch from some step on": nan_for_good,
    "out of memory in mid-run (simulated)": out_of_memory,
}
