"""One run on several processes, one for each GPU: the batch is shared, gradients are averaged, one process keeps the files."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState, notebook_launcher
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ld_checkpoint import Keeper
from ld_data import open_images, to_model_range
from ld_train import Run, Screen, follow


class WorkerLost(RuntimeError):
    """A process of a run ended before its time; the message is one sentence that says which, and what to do."""


# ---- processes ------------------------------------------------------------------------------------------------------


def launch(worker, *args, processes=None):
    """Call worker(*args) in `processes` new processes, one for each GPU by default, and wait for all of them.

    CUDA must not have been used before in this process, as they are forked from it. Raises WorkerLost. From a terminal the
    same is done by `torchrun` or `accelerate launch`.
    """
    processes = processes or max(1, torch.cuda.device_count())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    try:
        notebook_launcher(last_to_complain, (worker, *args), num_processes=processes, use_port=port)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reason = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else first_words(failure)
        raise WorkerLost(
            f"Process {rank} of {processes} ended ({reason}), so the run was stopped; run again to go on from its last checkpoint."
        ) from None


def last_to_complain(worker, *args):
    """worker(*args); a RuntimeError waits a moment, so that who only lost the others is not taken for the one that ended first."""
    try:
        worker(*args)
    except RuntimeError:
        time.sleep(3)
        raise


def first_words(failure):
    """What a process said when it failed, in one line."""
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    return " ".join(str(message).split())[:300]


def join(timeout=600.0):
    """Meet the other processes that the launcher started, or be alone if there is none. To be called once in each.

    timeout: seconds without an answer after which the others count as lost and waiting for them raises.
    """
    limit = timedelta(seconds=timeout)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=limit)
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if state.device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // dist.get_world_size()))
    Messages.group = dist.new_group(backend="gloo", timeout=limit)


class Messages:
    """Small messages from CPU to CPU, so that no GPU is waited for."""

    group = None

    @classmethod
    def broadcast(cls, value):
        """The first process's value, in all processes."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=cls.group)
        return box[0]

    @classmethod
    def largest(cls, *numbers):
        """The largest that any process has of each number."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=cls.group)
        return tensor.tolist()


def is_first():
    return dist.get_rank() == 0


def part(n):
    """The rows of a batch of n that this process works on."""
    share = n // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


# ---- gradients ------------------------------------------------------------------------------------------------------


def average(tensors):
    """Replace each tensor by its mean over the processes; one message for all."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


class SharedGradients:
    """Goes before RectifiedFlowTrainer among a class's bases: each process takes its part of the batch, all get the mean gradient.

    train_step gets the whole batch, of which only the rows `part` need to be there, and draws its times and noise, so a step
    is the same for every number of processes but for rounding. The mean comes after the local backward pass: a process may
    run out of memory and do its part again, and what is not finite in one is not finite in all, so all skip the same steps.
    """

    def gradients(self, images, noise, t):
        mine = part(len(images))
        loss = super().gradients(images[mine], noise[mine], t[mine])
        average([loss] + [p.grad for p in self.model.parameters() if p.grad is not None])
        return loss


# ---- the run --------------------------------------------------------------------------------------------------------


def train(trainer, cache, settings, open_cache=None):
    """ld_train.train on all processes that have met by `join`; settings.batch_size counts the pictures of all of them.

    trainer: of a class with SharedGradients. In an epoch every picture is used at most once, by one process. The first
    process alone shows figures, averages the weights, samples and writes checkpoints, which any number of processes can go
    on from, one included. Returns the history.
    """
    run = SharedRun(trainer, cache, settings, open_cache or (lambda size: open_images(settings.source, size)))
    return follow(run, Screen(run) if is_first() else Silence())


class SharedRun(Run):
    """A Run of which every process has a copy that takes the same steps."""

    def __init__(self, trainer, cache, settings, open_cache):
        if settings.batch_size % dist.get_world_size():
            raise ValueError(
                f"{dist.get_world_size()} processes cannot share a batch of {settings.batch_size} equally; choose a multiple."
            )
        super().__init__(trainer, cache, settings, open_cache)
        self.keeper = SharedKeeper(settings.run_dir, settings.backup)
        self.agreed = 0.0  # share of the budget, the same in all processes
        self.epoch, self.position, self.permutation = -1, 0, torch.empty(0, dtype=torch.long)
        self.side = None  # of the pictures that the permutation is of
        for tensor in trainer.model.state_dict().values():
            dist.broadcast(tensor, src=0)
        if not is_first():
            trainer.update.ema.update = lambda model, step: None

    def progress(self):
        return self.agreed

    def over(self, stop=False):
        """True in all processes if the budget is spent by the clock of one of them, or one was told to stop."""
        self.agreed, stop = Messages.largest(super().progress(), float(bool(stop)))
        return bool(stop) or self.agreed >= 1

    def keep(self):
        if is_first():
            super().keep()

    # ---- pictures

    def pictures(self):
        """The next batch, of which this process reads its part; the other rows are zero."""
        n, mine = self.settings.batch_size, part(self.settings.batch_size)
        cache = self.caches[self.stage]
        if self.position + n > len(self.permutation):
            rows = -int(Messages.largest(-len(cache))[0])  # that all processes have
            self.start_epoch(self.epoch + 1, rows, self.stage)
        rows = self.permutation[self.position : self.position + n][mine]
        self.position += n
        batch = torch.from_numpy(cache.images[rows.numpy()])  # [n / processes, 3, H, W]
        mirrored = torch.rand(n, 1, 1, 1, generator=self.flips)[mine] < 0.5
        batch = to_model_range(torch.where(mirrored, batch.flip(-1), batch), self.trainer.device, flip=False)
        images = batch.new_zeros(n, *batch.shape[1:])
        images[mine] = batch
        return images

    def start_epoch(self, epoch, rows, side, position=0):
        """Shuffle the pictures that are there; what is left over at its end and fills no batch is not used."""
        if rows < self.settings.batch_size:
            raise ValueError(
                f"A batch of {self.settings.batch_size} needs as many pictures, and there are {rows}; lower it."
            )
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        self.epoch, self.side, self.position = epoch, side, position
        self.permutation = torch.randperm(rows, generator=generator)

    def enter_stage(self):
        super().enter_stage()
        if self.stage != self.side:
            self.position = len(self.permutation)  # the pictures of another size begin an epoch of their own

    # ---- checkpoints

    def state(self):
        state = super().state()
        state["run"]["epoch"] = [self.epoch, len(self.permutation), self.side, self.position]
        return state

    def load(self, state):
        super().load(state)
        if state["run"].get("epoch", [0, 0])[1]:  # not in a run of ld_train, nor before the first step
            self.start_epoch(*state["run"]["epoch"])


class SharedKeeper(Keeper):
    """A Keeper whose files the first process writes and reads, for all."""

    def save(self, state, best=False):
        if is_first():
            super().save(state, best)

    def load_newest(self):
        return Messages.broadcast(super().load_newest() if is_first() else None)

    def set_aside(self, keep=True):
        if is_first():
            super().set_aside(keep)


class Silence:
    """The Screen of the processes that show nothing."""

    def say(self, sentence):
        pass

    refresh = finish = lambda self: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
