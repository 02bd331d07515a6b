"""The network outside of this project: diffusers' loop as docs/share.md shows it, and ONNX against torch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ld_export import export_onnx, folded
from liquid_diffusion import LiquidDiffusion, RectifiedFlow, integrate, set_lean

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "share.md").read_text(encoding="utf-8"), re.S)


def network(channels=(8, 16), blocks=(1, 1)):
    """A network whose weights all differ from zero, so that nothing passes by being zero."""
    torch.manual_seed(0)
    model = LiquidDiffusion(channels, blocks).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def snippet(word):
    """The one piece of code in docs/share.md that holds `word`."""
    (found,) = [code for code in SNIPPETS if word in code]
    return found


# ---- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network().save_pretrained(folder)
    return folder


def run_loop(folder, scheduler):
    """Execute the page's loop with a scheduler; returns its variables."""
    code = snippet("FlowMatchEuler").replace("owner/name", str(folder)).replace("  # or FlowMatchHeun", "  # or ")
    names = {}
    exec(code.replace("FlowMatchEulerDiscreteScheduler", scheduler), names)
    return names


@pytest.mark.parametrize(
    ("scheduler", "solver"), [("FlowMatchEulerDiscreteScheduler", "euler"), ("FlowMatchHeunDiscreteScheduler", "heun")]
)
def test_the_loop_of_the_page_is_our_own_solver_at_the_schedulers_times(folder, scheduler, solver):
    names = run_loop(folder, scheduler)
    times = list(dict.fromkeys((names["scheduler"].sigmas).tolist()))  # Heun lists inner times twice
    assert times[0] == 1 and times[-1] == 0
    start = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if solver == "heun":  # its last step, to t = 0, is Euler's
            *_, x = integrate(names["model"], start, times[:-1], "heun")
            *_, x = integrate(names["model"], x, times[-2:], "euler")
        else:
            *_, x = integrate(names["model"], start, times, "euler")
    torch.testing.assert_close(names["x"], x, rtol=0, atol=1e-3)
    assert names["images"].abs().max() <= 1


def test_the_loop_ends_near_our_samples(folder):
    """Other times, same flow: 50 steps of either are closer to each other than to anything else."""
    images = run_loop(folder, "FlowMatchEulerDiscreteScheduler")["images"]
    flow = RectifiedFlow(LiquidDiffusion.from_pretrained(folder), device="cpu")
    ours = flow.sample(4, 32, num_steps=50, seed=0)
    assert (images - ours).abs().mean() < 0.02 * (ours[:2] - ours[2:]).abs().mean()


# ---- ONNX -----------------------------------------------------------------------------------------------------------


def test_folding_changes_nothing_and_leaves_the_small_kernels_unused():
    model = network()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9])
    fold = folded(model)
    set_lean(model, False)
    expected = model(x, t)
    for module in fold.modules():
        if hasattr(module, "dw3"):
            module.dw3 = module.dw5 = module.dw7 = None
    torch.testing.assert_close(fold(x, t), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """(a network with one stage, its ONNX file)."""
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model = network((8,), (1,))
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.mark.parametrize(("n", "height", "width"), [(1, 8, 8), (3, 24, 16)])
def test_onnx_equals_torch_at_sizes_and_batches_it_was_not_exported_with(onnx, n, height, width):
    import onnxruntime

    model, path = onnx
    x, t = torch.randn(n, 3, height, width), torch.rand(n)
    (velocity,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy(), "t": t.numpy()})
    with torch.no_grad():
        assert np.abs(velocity - model(x, t).numpy()).max() < 1e-4


def test_onnx_holds_one_7x7_kernel_where_training_has_three(onnx):
    import onnx as library

    sizes = [tuple(w.dims[2:]) for w in library.load(onnx[1]).graph.initializer if len(w.dims) == 4]
    blocks = 4  # encoder, two in the bottleneck, decoder
    assert sizes.count((7, 7)) == 2 * blocks  # the cell's and the merged one
    assert sizes.count((5, 5)) == 0


def test_pictures_without_torch_are_those_with_it(onnx, tmp_path):
    model, path = onnx
    code = snippet("sample_onnx").replace("model.onnx", str(path)).replace("50", "5").replace("32, 32", "16, 16")
    program = f"import sys; sys.modules['torch'] = None\n{code}\nnp.savez('out.npz', noise=noise, images=images)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    out = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        *_, x = integrate(model, torch.from_numpy(out["noise"]).float(), [1, 0.8, 0.6, 0.4, 0.2, 0])
    assert np.abs(out["images"] - x.clamp(-1, 1).numpy()).max() < 1e-4
