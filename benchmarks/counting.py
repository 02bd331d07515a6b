"""What a network costs, by counting: no clock, so the same on every machine."""

from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

MiB = 2**20


def kept_bytes(model, *inputs, blocks=()):
    """Bytes of the storages that autograd saves in model(*inputs) for the backward pass, each once, weights left out.

    blocks: modules under gradient checkpointing; what goes into them is kept too, and autograd does not tell.
    """
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    hooks = [block.register_forward_pre_hook(lambda _, args: keep(args[0]) and None) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


def per_picture(bytes_at):
    """Slope of bytes_at(batch size): what does not grow with the batch is left out."""
    return bytes_at(3) - bytes_at(2)


def forward_macs(model, *inputs):
    """Multiply-adds of the matrix products and convolutions of model(*inputs)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages alive that operations under it have made: `now` and the highest, `peak`. Works on fake tensors."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        pointer, size = storage._cdata, storage.nbytes()
        self.seen.add(pointer)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self.drop, pointer, size)

    def drop(self, pointer, size):
        self.seen.discard(pointer)
        self.now -= size
