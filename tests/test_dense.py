"""Laws of the dense block, and of the recipe that takes it: formula, size, gradients, rates, files, maps of the gates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ld_play
import ld_utils
import ld_widgets
import liquid_diffusion as ld
from ld_checkpoint import load_weights, save_weights
from ld_export import export_onnx
from liquid_diffusion import DenseLiquidBlock, LiquidDiffusion, RectifiedFlowTrainer, liquid_diffusion

ROOT = Path(__file__).parents[1]
COUNTS = dict(nano=921_971, tiny=9_497_011, small=29_156_819, base=66_343_331, large=132_622_051)


def network(**options):
    """A small network whose weights all differ from zero, so that nothing passes by being zero."""
    torch.manual_seed(0)
    model = LiquidDiffusion(channels=(8, 16), blocks=(1, 1), dense=True, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_the_block_is_the_cell_on_one_dense_kernel_added_to_its_input():
    torch.manual_seed(0)
    block = DenseLiquidBlock(16, 6).double()
    nn.init.normal_(block.norm_cfc.linear.weight)
    x, t, e = torch.randn(2, 16, 5, 7).double(), torch.rand(2).double(), torch.randn(2, 6).double()
    cell, (scale, shift) = block.cfc, block.norm_cfc.linear(e)[..., None, None].chunk(2, 1)
    z = F.silu(F.group_norm(x, ld.GROUPS) * (1 + scale) + shift)
    z = F.silu(F.conv2d(z, cell.backbone[0].weight, cell.backbone[0].bias, padding=1))
    a, b = cell.time_a(e)[..., None, None], cell.time_b(e)[..., None, None]
    gate = torch.sigmoid(a * cell.f(z) - b)
    torch.testing.assert_close(block(x, t, e), x + gate * cell.g(z) + (1 - gate) * cell.h(z))
    assert cell.backbone[0].weight.shape == (16, 16, 3, 3)


@pytest.mark.parametrize("preset", ld.PRESETS)
def test_sizes_are_pinned_and_near_those_of_the_formulas(preset):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in liquid_diffusion(preset, name).parameters()) for name in ("dense", "measured")]
    assert counts[0] == COUNTS[preset]
    assert counts[0] == pytest.approx(counts[1], rel=0.16)


def test_the_heads_start_at_a_tenth_and_modulations_at_zero():
    torch.manual_seed(0)
    cell = DenseLiquidBlock(96, 24).cfc
    for head, size in ((cell.g[-1], 0.1), (cell.h[-1], 0.1), (cell.f, 1.0)):
        assert head.weight.std().item() * (3 * 88) ** 0.5 == pytest.approx(size, rel=0.05)
    assert DenseLiquidBlock(96, 24).norm_cfc.linear.weight.abs().max() == 0


def test_checkpointing_changes_no_gradient_and_the_lean_form_is_not_for_it():
    x, t, gradients = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8]), []
    for options in ({}, dict(gradient_checkpointing=True), dict(lean=False)):
        model = network(**options)
        assert any(m.checkpointing for m in model.modules() if isinstance(m, DenseLiquidBlock)) == (len(gradients) == 1)
        model(x, t).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) and a.abs().max() > 0 for a, b, c in zip(*gradients))


def test_the_recipe_takes_half_the_rate_and_muon_for_3x3_kernels_too():
    for preset, rate in (("nano", 8e-3), ("tiny", 4e-3)):
        with torch.device("meta"):
            model = liquid_diffusion(preset, "dense")
            adamw, muon = ld.optimizers(model)
        taken = {tuple(p.shape[2:]) for group in muon.param_groups for p in group["params"]}
        assert taken == {(1, 1), (3, 3)} and not [p for g in adamw.param_groups for p in g["params"] if p.ndim == 4]
        assert max(g["lr"] for g in adamw.param_groups) == muon.param_groups[0]["lr"] == rate
    trainer = RectifiedFlowTrainer(liquid_diffusion("nano", "dense"), device="cpu", recipe="dense")
    assert trainer.time_distribution == "logit-normal" and max(trainer.update.peak_lrs) == 8e-3


def test_a_network_of_dense_blocks_learns():
    trainer = RectifiedFlowTrainer(network(), device="cpu", warmup_steps=5)
    images = torch.ones(16, 3, 8, 8) * torch.tensor([1.0, -1.0]).repeat(8)[:, None, None, None]
    losses = [trainer.train_step(images)["loss"].item() for _ in range(80)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_it_comes_back_from_its_file_and_other_blocks_do_not_fit(tmp_path):
    model, x, t = network(), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    config, weights = load_weights(save_weights(model, tmp_path / "w.safetensors"))
    assert config["dense"] is True
    torch.testing.assert_close(ld.model_from(config, weights)(x, t), model(x, t))
    with pytest.raises(ValueError, match="those of another network"):
        ld.model_from({**config, "dense": False}, weights)
    with pytest.raises(ValueError, match="describes no LiquidDiffusion"):
        ld.model_from({**config, "relaxation": "spec"}, weights)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(LiquidDiffusion.from_pretrained(tmp_path)(x, t), model(x, t))


def test_its_gates_can_be_watched():
    model = network().eval()
    velocity, gates, _ = ld_play.liquid_maps(model, torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8]))
    assert velocity.shape == (2, 3, 8, 8) and list(gates) == list(ld_play.stage_ends(model))
    assert all(0 < gate.min() and gate.max() < 1 and gate.std() > 1e-3 for gate in gates.values())


def test_its_onnx_file_gives_the_same_velocity(tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, x, t = network().eval(), torch.randn(3, 3, 12, 16), torch.rand(3)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    (velocity,) = session.run(None, {"x": x.numpy(), "t": t.numpy()})
    with torch.no_grad():
        assert np.abs(velocity - model(x, t).numpy()).max() < 1e-4


def test_wherever_recipes_are_offered_all_of_them_are():
    notebook = json.loads((ROOT / "LiquidDiffusion_Training.ipynb").read_text(encoding="utf-8"))
    lines = [line for cell in notebook["cells"] for line in cell["source"] if line.startswith("recipe = ")]
    assert [json.loads(line.split("#@param ")[1]) for line in lines] == [list(ld.RECIPES)]
    values = dict(source="samples", preset="nano", image_size=32, minutes=5.0, batch_size=8, seed=0, smoke=False)
    panel = ld_widgets.settings_panel(ld_utils.read_settings(**values))
    (field,) = [child for child in panel.children if child.description == "recipe"]
    assert list(field.options) == list(ld.RECIPES)
