"""What a network costs, by counting: no clock, so the same on every machine."""

import torch


def kept_bytes(model, *inputs):
    """Bytes of the storages that autograd saves in model(*inputs) for the backward pass, each once, weights left out."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*inputs)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
