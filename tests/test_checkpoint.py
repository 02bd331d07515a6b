"""Files that cannot be half written, cannot harm, and are refused before memory is taken for them."""

import json
import os
import pickle
import random
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from fault_lab import small_trainer
from faults import Payload

import ld_checkpoint
from ld_checkpoint import (
    CheckpointError,
    Keeper,
    load_checkpoint,
    load_weights,
    open_weights,
    random_state,
    save_checkpoint,
    save_weights,
    set_random_state,
    snapshot,
)
from liquid_diffusion import LiquidDiffusion, model_from

CONFIG = dict(channels=[8, 16], blocks=[1, 1], t_dim=8, in_channels=3)


def trained(steps=2, **options):
    trainer = small_trainer(**options)
    for step in range(steps):
        trainer.train_step(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1)
    return trainer


def equal(a, b):
    """Bitwise equality of nested dicts, lists, tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---- writing --------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path):
    state = trained().state_dict()
    save_checkpoint(state, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.pop("format") == ld_checkpoint.FORMAT
    assert equal(loaded, snapshot(state))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ld_checkpoint.write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    ld_checkpoint.write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["fsync", "replace"]


def test_two_and_the_best_are_kept_here_and_in_the_second_folder(tmp_path):
    keeper = Keeper(tmp_path / "run", tmp_path / "backup")
    for step in range(1, 6):
        keeper.save({"model": {}, "config": {}, "step": step}, best=step == 2)
    keeper.wait()
    for folder in (tmp_path / "run", tmp_path / "backup" / "run"):
        assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "checkpoint-previous.pt", "best.pt"}
        steps = [
            load_checkpoint(folder / name)["step"] for name in ("checkpoint.pt", "checkpoint-previous.pt", "best.pt")
        ]
        assert steps == [5, 4, 2]
    assert keeper.news == []


def test_a_snapshot_is_not_changed_by_what_comes_after():
    trainer = trained(1)
    copy = snapshot(trainer.state_dict())
    before = snapshot(copy)
    trainer.train_step(torch.rand(4, 3, 8, 8) * 2 - 1)
    assert equal(copy, before)
    assert not equal(copy["model"], snapshot(trainer.state_dict())["model"])


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A drive that takes two seconds for a file holds nothing up, until the next save wants to write."""
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(2), real(file))[1])
    keeper = Keeper(tmp_path)
    start = time.monotonic()
    keeper.save({"model": {}, "config": {}})
    assert time.monotonic() - start < 1 and keeper.busy
    keeper.wait()
    assert time.monotonic() - start >= 2 and not keeper.busy
    assert (tmp_path / "checkpoint.pt").exists()


def test_an_earlier_run_is_set_aside_not_overwritten(tmp_path):
    keeper = Keeper(tmp_path)
    keeper.save({"model": {}, "config": {}, "step": 1}, best=True)
    keeper.wait()
    keeper.set_aside()
    assert keeper.load_newest() is None
    (aside,) = tmp_path.iterdir()
    assert str(aside) in keeper.news[0]
    assert load_checkpoint(aside / "checkpoint.pt")["step"] == 1


def test_left_over_parts_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / ".checkpoint.pt.123.part").write_bytes(b"half")
    Keeper(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_global_random_generators_come_back():
    state = random_state()
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    set_random_state(state)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn


# ---- files of a stranger --------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint({"model": {"w": torch.randn(50)}, "config": {"a": 1}}, path)
    content, good = path.read_bytes(), load_checkpoint(path)
    dice, refused = random.Random(0), 0
    for _ in range(400):
        place = dice.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :])
        try:
            assert equal(load_checkpoint(path), good), place
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_every_length_of_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint({"model": {"w": torch.randn(50)}, "config": {}}, path)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged, cut short or no checkpoint"):
            load_checkpoint(path)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    files = {name: tmp_path / name for name in ("zip.pt", "legacy.pt", "bare.pt", "model.pt")}
    evil = {"model": Payload(tmp_path / "ran"), "config": {}, "format": 1}
    torch.save(evil, files["zip.pt"])
    torch.save(evil, files["legacy.pt"], _use_new_zipfile_serialization=False)
    files["bare.pt"].write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    torch.save(torch.nn.Linear(1, 1), files["model.pt"])  # a whole module: code by name
    for name, path in files.items():
        with pytest.raises(CheckpointError, match="code") as error:
            load_checkpoint(path)
        assert "not opened" in str(error.value), name
        with pytest.raises(CheckpointError):
            load_weights(path)
    assert not (tmp_path / "ran").exists()
    torch.load(files["zip.pt"], weights_only=False)  # the control: this payload does run where it is let
    assert (tmp_path / "ran").exists()


def test_a_compressed_file_cannot_unfold_in_memory(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 50_000_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"format": 99, "model": {}, "config": {}}])
def test_files_of_other_projects_and_later_formats_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project|update the project"):
        load_checkpoint(tmp_path / "a.pt")


# ---- published weights ----------------------------------------------------------------------------------------------


def test_published_weights_are_safetensors_that_build_the_same_network(tmp_path):
    model = trained().update.ema.model
    path = save_weights(model, tmp_path / "w.safetensors", source="lab")
    config, weights = load_weights(path)
    again = model_from(config, weights)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    assert torch.equal(again(x, t), model.to(memory_format=torch.contiguous_format)(x, t))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["source"] == "lab"


def test_a_checkpoint_serves_as_weights_too(tmp_path):
    trainer = trained()
    save_checkpoint(trainer.state_dict(), tmp_path / "a.pt")
    model = model_from(*load_weights(tmp_path / "a.pt"))
    assert equal(dict(model.state_dict()), dict(trainer.update.ema.model.state_dict()))


def test_notebooks_take_the_users_own_weights_before_the_shipped_ones(tmp_path, monkeypatch):
    model = LiquidDiffusion(**CONFIG)
    named = save_weights(model, tmp_path / "named.safetensors", image_size=48)
    shipped = save_weights(model, tmp_path / "shipped.safetensors", source="samples")
    save_checkpoint({**trained().state_dict(), "settings": dict(image_size=16)}, tmp_path / "run.pt")
    monkeypatch.setattr("ld_checkpoint.SHIPPED", shipped)
    monkeypatch.delenv("LD_WEIGHTS", raising=False)
    assert open_weights()[2] == open_weights("")[2] == dict(source="samples")
    config, weights, metadata = open_weights(named)
    assert (config, metadata) == (model.config, dict(image_size="48"))
    assert equal(weights, dict(model.state_dict()))
    monkeypatch.setenv("LD_WEIGHTS", str(tmp_path / "run.pt"))
    assert open_weights(named)[2] == dict(image_size=16)
    monkeypatch.setenv("LD_WEIGHTS", str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match="There is no file .*none.safetensors"):
        open_weights()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no safetensors"),
        (b"\xff" * 100, "damaged or no safetensors"),
        (safetensors.torch.save({"w": torch.zeros(1)}), "does not name its network"),
        (safetensors.torch.save({"w": torch.zeros(1)}, {"config": "{"}), "damaged or no safetensors"),
    ],
)
def test_bad_safetensors_are_a_sentence(tmp_path, content, message):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        dict(channels=[10**9, 10**9]),
        dict(channels=[8] * 10**6, blocks=[1] * 10**6),
        dict(blocks=[1, 10**9]),
        dict(t_dim=10**12),
        dict(in_channels=10**9),
        dict(expansion=1e12),
        dict(expansion=float("nan")),
        dict(channels=[[8] * 10] * 10),
        dict(channels="8,16"),
        dict(channels=None),
        dict(surprise=1),
        dict(channels=[4096, 4096], blocks=[64, 64]),  # within every bound, and 100 GB
    ],
    ids=str,
)
def test_a_config_that_asks_too_much_is_refused_before_memory_is_taken(tmp_path, change):
    weights = dict(LiquidDiffusion(**CONFIG).state_dict())
    content = safetensors.torch.save(weights, {"config": json.dumps({**CONFIG, **change})})
    (tmp_path / "w.safetensors").write_bytes(content)
    config, loaded = load_weights(tmp_path / "w.safetensors")
    before = resident_bytes()
    with pytest.raises(ValueError) as error:
        model_from(config, loaded)
    assert str(error.value).count("\n") == 0
    assert resident_bytes() - before < 200e6


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_config_that_is_no_dict_is_refused():
    with pytest.raises(ValueError, match="config"):
        model_from([1, 2], {})


def test_state_of_another_network_changes_nothing(tmp_path):
    trainer, other = trained(), small_trainer()
    other_model = LiquidDiffusion(channels=(16, 16), blocks=(1, 1))
    strange = type(other)(other_model, device="cpu")
    before = snapshot(trainer.state_dict())
    with pytest.raises(ValueError, match="another network"):
        trainer.load_state_dict(snapshot(strange.state_dict()))
    assert equal(snapshot(trainer.state_dict()), before)


def test_a_run_of_the_time_before_muon_keeps_its_weights_and_cannot_go_on(tmp_path):
    trainer = trained()
    state = snapshot(trainer.state_dict())
    state["optimizer"] = state.pop("optimizers")[0]
    before = snapshot(trainer.state_dict())
    with pytest.raises(ValueError, match="another network or recipe; start from the weights alone"):
        trainer.load_state_dict(state)
    assert equal(snapshot(trainer.state_dict()), before)
    torch.save({**state, "format": 1}, tmp_path / "old.pt")
    config, found = ld_checkpoint.load_weights(tmp_path / "old.pt")
    assert config == trainer.model.config and equal(found, state["ema"])


@pytest.mark.parametrize("part", ["model", "ema", "adamw", "muon"])
def test_one_tensor_of_another_shape_changes_nothing(part):
    trainer = trained()
    state = snapshot(trained(3).state_dict())
    before = snapshot(trainer.state_dict())
    if part == "adamw":
        state["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(1)
    elif part == "muon":
        state["optimizers"][1]["state"][0]["momentum"] = torch.zeros(1)
    else:
        state[part]["out.2.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="another network"):
        trainer.load_state_dict(state)
    assert equal(snapshot(trainer.state_dict()), before)
