"""A trained network as an ONNX file, and pictures from that file without torch."""

from __future__ import annotations

import copy

import numpy as np


def folded(model):
    """A copy of a LiquidDiffusion for sampling, on the CPU: blocks by the formulas, each with its 3, 5 and 7 pixel kernels as one."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "lean"):
            module.lean = False  # autograd functions of its own making cannot be exported
        if hasattr(module, "merged_kernel"):
            kernel = module.merged_kernel()
            module.merged_kernel = lambda kernel=kernel: kernel
    return model


def export_onnx(model, path):
    """Write the velocity of a LiquidDiffusion as ONNX: x [B, C, H, W], t [B] -> velocity, for any B, H and W; returns the path.

    Needs torch, onnx and onnxscript, and takes a minute or more for a large preset.
    """
    import torch

    side = 4 * model.multiple
    example = torch.zeros(2, model.in_channels, side, side), torch.full((2,), 0.5)
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            folded(model),
            example,
            dynamo=True,
            verbose=False,
            input_names=["x", "t"],
            output_names=["velocity"],
            dynamic_shapes=({0: free, 2: free, 3: free}, {0: free}),
        )
    program.save(path)
    return path


def sample_onnx(path, noise, num_steps=50):
    """Euler's method from noise [B, C, H, W] (t = 1) to pictures in [-1, 1] (t = 0), numpy float32; needs onnxruntime alone.

    noise: np.random.default_rng(seed).standard_normal((B, C, H, W)). Sides must be multiples of what the network asks for.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.asarray(noise, np.float32)
    for step in range(num_steps):
        t = np.full(len(x), 1 - step / num_steps, np.float32)
        (velocity,) = session.run(None, {"x": x, "t": t})
        x = x - velocity / np.float32(num_steps)
    return x.clip(-1, 1)
