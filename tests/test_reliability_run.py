"""The run around the trainer: budget, resume, stages, batch fitting, self-test."""

import math
import time
from dataclasses import replace

import pytest
import torch
from fault_lab import digest, open_pictures, settings_for, small_trainer

import ld_train
import ld_utils
from ld_checkpoint import load_checkpoint, snapshot
from ld_train import Clock, train
from ld_utils import Stage, parse_plan
from liquid_diffusion import RectifiedFlowTrainer, lr_factor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for size in (8, 16):
        open_pictures(folder, size).wait().close()
    return lambda size=8: open_pictures(folder, size)


def images(n=8, size=8, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_loaded_and_a_longer_budget_goes_on(tmp_path, pictures, capsys):
    settings = settings_for(tmp_path, max_steps=4)
    first = small_trainer()
    history = train(first, pictures(), settings)
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    again = small_trainer(seed=5)
    assert train(again, pictures(), settings) == history
    assert "This run is finished (4 steps" in capsys.readouterr().out
    assert digest(again.state_dict()) == digest(first.state_dict())
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == written
    longer = train(small_trainer(), pictures(), replace(settings, max_steps=6))
    assert longer[:4] == history and len(longer) == 6
    assert "Going on after 4 steps" in (said := capsys.readouterr().out) and "Changed since: max_steps" in said


def test_never_sets_the_run_aside_and_starts_anew(tmp_path, pictures, capsys):
    settings = settings_for(tmp_path, max_steps=3)
    history = train(small_trainer(), pictures(), settings)
    assert train(small_trainer(), pictures(), replace(settings, resume="never")) == history
    assert "the earlier run are now in" in capsys.readouterr().out
    assert len(list(tmp_path.glob("earlier_*/checkpoint.pt"))) == 1


def test_another_run_in_the_folder_is_not_overwritten(tmp_path, pictures):
    train(small_trainer(), pictures(), settings_for(tmp_path, max_steps=2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run with seed = 0, and now it is 1"):
        train(small_trainer(), pictures(), settings_for(tmp_path, seed=1))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_holds_all_that_was_promised(tmp_path, pictures):
    train(small_trainer(), pictures(), settings_for(tmp_path, max_steps=2))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert set(state) >= {"model", "ema", "optimizers", "scaler", "counts", "progress", "generators", "config"}
    assert set(state) >= {"random", "run", "settings", "code"} and set(state["random"]) == {
        "python",
        "numpy",
        "torch",
        "cuda",
    }
    assert state["settings"]["image_size"] == 8 and state["run"]["seen"] == 2 and len(state["run"]["losses"]) == 2


def test_the_folder_follows_the_settings(monkeypatch):
    form = dict(source="a/b c", preset="nano", image_size=32, minutes=1.0, batch_size=8, seed=0, plan="", resume="auto")
    monkeypatch.delenv("LD_RUN_DIR", raising=False)
    for name in ("SOURCE", "PRESET", "IMAGE_SIZE", "MINUTES", "BATCH_SIZE", "SEED", "PLAN", "RECIPE", "SMOKE"):
        monkeypatch.delenv(f"LD_{name}", raising=False)
    read = lambda **changes: ld_utils.read_settings(**{**form, "backup": "", "smoke": False, **changes})  # noqa: E731
    assert str(read().run_dir) == "runs/a-b-c-nano-32px" == str(read(minutes=9.0).run_dir)
    folders = {
        str(read(**change).run_dir)
        for change in (dict(seed=1), dict(preset="tiny"), dict(image_size=64), dict(recipe="plain"))
    }
    assert len(folders | {str(read().run_dir)}) == 5
    settings = read()
    settings.change("preset", "tiny")
    assert str(settings.run_dir) == "runs/a-b-c-tiny-32px"
    with pytest.raises(ValueError, match="'auto' to go on with an earlier run, or 'never'"):
        read(resume="perhaps")


# ---- the budget -----------------------------------------------------------------------------------------------------


def test_a_time_budget_holds_preview_and_checkpoint_and_ends_at_rate_zero(tmp_path, pictures):
    settings = settings_for(tmp_path, max_steps=0, minutes=8 / 60, save_every=2.0)
    trainer, rates = small_trainer(), []
    step = trainer.train_step
    trainer.train_step = lambda batch: rates.append((m := step(batch))["lr"]) or m
    start = time.monotonic()
    train(trainer, pictures(), settings)
    spent = time.monotonic() - start
    assert 5 < spent < 10
    assert (tmp_path / "samples.png").exists() or (tmp_path / "preview.png").exists()
    assert rates[-1] < 0.05 * max(rates)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert 5 < state["run"]["elapsed"] <= 10 and state["run"]["progress"] == 1
    assert len(train(small_trainer(), pictures(), settings)) == len(rates)  # finished: not a step more


def test_time_spent_before_a_disconnect_counts(monkeypatch):
    settings = settings_for("x", max_steps=0, minutes=1.0)
    now = [100.0]
    monkeypatch.setattr(ld_train.time, "monotonic", lambda: now[0])
    clock = Clock(settings)
    clock.go_on(dict(elapsed=15.0, progress=0.25), same=True)
    now[0] += 30
    assert clock.progress(0.0) == pytest.approx(45 / 60)
    clock.go_on(
        dict(elapsed=5.0, progress=1.0), same=True
    )  # it ended before the minutes did, to show its samples in them
    assert clock.progress(0.0) == 1
    clock.go_on(dict(elapsed=0.0, progress=1.0), same=False)
    assert clock.progress(0.0) < 1


def test_what_the_end_takes_is_kept_free_and_progress_never_falls(monkeypatch):
    settings = settings_for("x", max_steps=0, minutes=1.0, samples=24, steps=20)
    clock = Clock(settings)
    clock.start -= 30
    assert clock.progress(0.0) == pytest.approx(0.5, abs=0.01)
    clock.previews = [2.0]  # one preview, and the next section's pictures: 1.6 of it
    assert clock.progress(save_seconds=3.0) == pytest.approx(30 / (60 - 2 * 2.6 - 6), abs=0.01)
    clock.previews = [2.0, 2.0, 90.0]  # the machine stood still during the last
    assert clock.preview_seconds() == 2.0
    clock.previews = []
    assert clock.progress(0.0) > 0.6


def test_warm_up_ends_in_a_share_of_a_short_run():
    assert lr_factor(0, 0.0, 100) == pytest.approx(0.01)
    assert lr_factor(1, 0.05, 100) == pytest.approx((1 + math.cos(0.05 * math.pi)) / 2)
    assert lr_factor(1, 0.025, 100) == pytest.approx(0.5 * (1 + math.cos(0.025 * math.pi)) / 2)


# ---- growing resolution ---------------------------------------------------------------------------------------------


def test_a_plan_is_read_or_refused():
    assert parse_plan("64:0.6,128:0.25,256:0.15") == [Stage(64, 0.6), Stage(128, 0.85), Stage(256, 1.0)]
    assert parse_plan("8:1, 16:3") == [Stage(8, 0.25), Stage(16, 1.0)]
    for text in ("64", "64:x", "64:0", "0:1", "64:0.5;128:0.5", "64:inf", "64:nan"):
        with pytest.raises(ValueError, match="64:0.6,128:0.25,256:0.15"):
            parse_plan(text)


def growing(folder, **changes):
    return settings_for(folder, plan="8:0.5,16:0.5", image_size=16, max_steps=12, **changes)


def test_pictures_grow_noise_shifts_and_weights_carry_over(tmp_path, pictures, capsys):
    trainer, seen = small_trainer(), []
    step = trainer.train_step
    trainer.train_step = lambda batch: seen.append((batch.shape[-1], trainer.shift)) or step(batch)
    opened = []
    train(trainer, pictures(8), growing(tmp_path), lambda size: opened.append((size, len(seen))) or pictures(size))
    assert seen == [(8, 1.0)] * 6 + [(16, 2.0)] * 6
    assert opened == [(16, 1)]  # filled while the first stage trains, which begins with the second step
    assert "Step 6: the pictures grow from 8 to 16 px." in capsys.readouterr().out
    assert trainer.update.steps == 12 or trainer.update.flag is not None


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_resume_works_across_stages(tmp_path, pictures, stop):
    straight = small_trainer()
    history = train(straight, pictures(8), growing(tmp_path / "a"), pictures)
    first = small_trainer()
    step, calls = first.train_step, iter(range(1, 100))

    def stopping(batch):
        if next(calls) > stop:
            raise InterruptedError
        return step(batch)

    first.train_step = stopping
    with pytest.raises(InterruptedError):
        train(first, pictures(8), growing(tmp_path / "b", save_every=0.0), pictures)
    second = small_trainer(seed=9)
    assert train(second, pictures(8), growing(tmp_path / "b"), pictures) == history
    assert digest(second.state_dict()) == digest(straight.state_dict())


def test_a_stage_the_network_cannot_train_on_is_refused_at_the_start(tmp_path, pictures):
    with pytest.raises(ValueError, match="15 px is not a multiple of 2"):
        train(small_trainer(), pictures(8), settings_for(tmp_path, plan="8:0.5,15:0.5"))


# ---- memory ---------------------------------------------------------------------------------------------------------


def limit(trainer, most, checkpointed_most=None):
    """Let the network take `most` pictures at once, as a device with little memory would (more if checkpointing)."""
    forward, sizes = trainer.model.forward, []

    def limited(x, t):
        allowed = checkpointed_most if checkpointed_most and trainer.checkpointing else most
        sizes.append(len(x))
        if len(x) > allowed:
            raise torch.OutOfMemoryError("simulated")
        return forward(x, t)

    trainer.model.forward = limited
    trainer_said = []
    trainer.say = trainer_said.append
    return sizes, trainer_said


def test_out_of_memory_halves_and_the_step_is_the_same_but_for_rounding():
    network = dict(branch_scale=1.0)  # for AdamW's first step, see test_accumulated_micro_batches_are_the_same_step
    whole, parts = small_trainer(network=network, lr=1e-3), small_trainer(network=network, lr=1e-3)
    _, said = limit(parts, 5)
    losses = [trainer.train_step(images(16))["loss"] for trainer in (whole, parts)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    assert parts.micro_batch == 4 and [sentence.split(":")[1] for sentence in said] == [
        " now 8 at a time.",
        " now 4 at a time.",
    ]
    whole.update.settle(), parts.update.settle()
    weights = [torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) for trainer in (whole, parts)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_checkpointing_turns_on_by_itself_once_four_are_left():
    trainer = small_trainer()
    _, said = limit(trainer, 3, checkpointed_most=4)
    trainer.train_step(images(8))
    assert (trainer.micro_batch, trainer.checkpointing) == (4, True)
    assert all(stage.checkpointing for stage in trainer.model.modules() if hasattr(stage, "checkpointing"))
    assert "computed twice" in said[-1]


def test_memory_too_small_for_one_picture_is_a_sentence():
    trainer = small_trainer()
    limit(trainer, 0)
    with pytest.raises(torch.OutOfMemoryError, match="single picture; choose a smaller image size or preset"):
        trainer.train_step(images(4))


@pytest.mark.parametrize(("most", "found"), [(100, None), (36, None), (35, 16), (18, 16), (17, 8)])
def test_the_largest_batch_that_fits_has_an_eighth_to_spare(most, found):
    trainer = small_trainer()
    sizes, _ = limit(trainer, most)
    before = digest(snapshot(trainer.state_dict()))
    trainer.fit_micro_batch(32, 8)
    assert trainer.micro_batch == found
    assert sizes[0] == 36
    trainer.micro_batch = None
    assert digest(snapshot(trainer.state_dict())) == before
    assert all(p.grad is None for p in trainer.model.parameters())


# ---- self-test ------------------------------------------------------------------------------------------------------


def broken(fault, **options):
    """A trainer whose network fails as fault() says."""
    trainer = small_trainer(**options)
    forward, said = trainer.model.forward, []
    trainer.say = said.append
    trainer.model.forward = lambda x, t: fault(forward(x, t))
    return trainer, said


def half_has_no_kernel(output):
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("GET was unable to find an engine to execute this computation")
    return output


def cudnn_overflows(output):
    return output * math.inf if torch.backends.cudnn.enabled else output


@pytest.fixture(autouse=True)
def cudnn_as_before():
    before = torch.backends.cudnn.enabled
    yield
    torch.backends.cudnn.enabled = before


def test_self_test_says_nothing_where_all_is_well():
    trainer, said = broken(lambda output: output, precision=torch.float16)
    trainer.update.scaler.load_state_dict({**trainer.update.scaler.state_dict(), "scale": 128.0})
    before = digest(snapshot(trainer.state_dict()))
    trainer.self_test(8)
    assert (trainer.precision, said, torch.backends.cudnn.enabled) == (torch.float16, [], True)
    assert digest(snapshot(trainer.state_dict())) == before
    assert trainer.update.scaler.get_scale() == 128  # what a resumed run brings along


def test_a_missing_kernel_falls_back_to_float32():
    trainer, said = broken(half_has_no_kernel, precision=torch.float16)
    trainer.self_test(8)
    assert trainer.precision == torch.float32 and not trainer.update.scaler.is_enabled()
    assert said == [
        "float16 fails here (GET was unable to find an engine to execute this computation): training uses float32."
    ]
    assert trainer.train_step(images())["loss"].isfinite()


def test_numbers_that_overflow_with_cudnn_are_computed_without():
    trainer, said = broken(cudnn_overflows, precision=torch.bfloat16)
    trainer.self_test(8)
    assert (trainer.precision, torch.backends.cudnn.enabled) == (torch.bfloat16, False)
    assert said == ["bfloat16 fails here (numbers that are not finite): training uses bfloat16 without cuDNN."]


def test_no_working_path_is_a_sentence():
    trainer, _ = broken(lambda output: output * math.nan)
    with pytest.raises(
        RuntimeError, match="cannot be trained on this device .numbers that are not finite.; choose another"
    ):
        trainer.self_test(8)


def test_a_state_from_float16_goes_on_in_float32():
    half, full = small_trainer(precision=torch.float16), small_trainer()
    half.train_step(images())
    full.load_state_dict(snapshot(half.state_dict()))
    assert full.train_step(images())["loss"].isfinite()


def test_the_loop_trains_a_network_of_any_kind(tmp_path, pictures):
    """The loop asks of a trainer what RectifiedFlowTrainer has, whatever network is in it."""

    class Plain(torch.nn.Module):
        in_channels = 3

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            return self.layer(x)

    trainer = RectifiedFlowTrainer(Plain(), device="cpu")
    assert len(train(trainer, pictures(), settings_for(tmp_path, max_steps=3))) == 3
    assert load_checkpoint(tmp_path / "checkpoint.pt")["config"] is None
