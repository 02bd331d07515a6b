"""Models as folders and Hub repositories: what save_pretrained writes, and what from_pretrained takes and refuses."""

import json

import pytest
import torch

from liquid_diffusion import LiquidDiffusion, RectifiedFlowTrainer, liquid_diffusion_nano


def small(**options):
    torch.manual_seed(0)
    return LiquidDiffusion(channels=(8, 16), blocks=(1, 1), **options)


def output(model):
    x = torch.randn(2, model.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.tensor([0.2, 0.9]))


def same_weights(one, other):
    there = other.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in one.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("options", [{}, dict(relaxation="spec", expansion=2.0, in_channels=1, t_dim=6, lean=False)])
def test_a_saved_model_comes_back_with_the_same_velocity(tmp_path, options):
    model = small(**options)
    model.save_pretrained(tmp_path)
    again = LiquidDiffusion.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == model.config == again.config
    assert not again.training
    assert same_weights(again, model)
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-6)


def test_averaged_weights_of_a_trainer_are_saved(tmp_path):
    """They are a deep copy, in channels_last, and without gradients."""
    trainer = RectifiedFlowTrainer(small(), device="cpu", warmup_steps=1)
    for _ in range(3):
        trainer.train_step(torch.rand(4, 3, 8, 8) * 2 - 1)
    trainer.update.settle()
    trainer.update.ema.model.save_pretrained(tmp_path)
    again = LiquidDiffusion.from_pretrained(tmp_path)
    assert same_weights(again, trainer.update.ema.model)
    assert not same_weights(again, trainer.model)


def test_a_preset_has_a_builder_and_no_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'nano' is a preset and has no weights; liquid_diffusion\('nano'\)"):
        LiquidDiffusion.from_pretrained("nano")
    monkeypatch.chdir(tmp_path)
    liquid_diffusion_nano(channels=(8, 16), blocks=(1, 1)).save_pretrained("nano")
    assert LiquidDiffusion.from_pretrained("nano").config["channels"] == [8, 16]  # a folder of that name is one


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (["channels"], "no list of names and values"),
        ({"channels": [8, 16], "blocks": [1, 1], "token": "x"}, "describes no LiquidDiffusion"),
        ({"channels": [8, 16], "blocks": [1, 1], "map_location": "cuda"}, "describes no LiquidDiffusion"),
        ({"channels": [8, 1e12], "blocks": [1, 1]}, "which no network here has"),
        ({"channels": [4096] * 2, "blocks": [64] * 2}, "those of another network"),
        ({"channels": [8, 24], "blocks": [1, 1]}, "those of another network"),
        ({}, "describes no LiquidDiffusion"),
    ],
)
def test_a_config_of_anybodys_making_is_refused_in_a_sentence(folder, config, message):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as failure:
        LiquidDiffusion.from_pretrained(folder)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04pickle", b"<html>Not found</html>" * 9])
def test_files_that_are_something_else_are_refused_in_a_sentence(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="No model can be read from .*; give a folder or owner/name") as failure:
        LiquidDiffusion.from_pretrained(folder)
    assert "\n" not in str(failure.value)


def test_a_pickle_of_weights_is_not_opened(folder):
    weights = folder / "model.safetensors"
    torch.save(small().state_dict(), weights)
    with pytest.raises(ValueError, match="No model can be read"):
        LiquidDiffusion.from_pretrained(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="No model can be read"):
        LiquidDiffusion.from_pretrained(folder)
