"""Several processes, here on CPUs with gloo: the run of one process, every picture once in an epoch, and no hang."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from fault_lab import open_pictures, settings_for  # noqa: E402
from parallel_lab import BATCH, STEPS  # noqa: E402

import ld_train  # noqa: E402
from ld_data import to_model_range  # noqa: E402
from liquid_diffusion import LiquidDiffusion, RectifiedFlowTrainer  # noqa: E402

ROOT = Path(__file__).parents[1]


def run(*command, folder, deadline=600, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    options = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=deadline)
    return subprocess.run([sys.executable, *map(str, command)], **options)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(folder of the runs in parallel_lab.py, what launch said of each)."""
    folder = tmp_path_factory.mktemp("parallel")
    process = run(ROOT / "tests" / "parallel_lab.py", folder, folder=folder)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, json.loads((folder / "said.json").read_text())


def ends(lab, name, processes):
    return [torch.load(lab[0] / name / f"end-{rank}-of-{processes}.pt") for rank in range(processes)]


def epochs(n=5, rows=32):
    return [torch.randperm(rows, generator=torch.Generator().manual_seed(epoch)) for epoch in range(n)]


@pytest.fixture(scope="module")
def alone(lab):
    """A RectifiedFlowTrainer, as it is, that has taken the same steps in this process; nothing of ld_parallel is used."""
    torch.manual_seed(0)
    trainer = RectifiedFlowTrainer(LiquidDiffusion(channels=(16, 32), blocks=(1, 1)), device="cpu", lr=1e-3)
    flips = torch.Generator().manual_seed(1)
    images = torch.from_numpy(open_pictures(lab[0] / "pictures", 8).images.copy())
    order = torch.cat([epoch[: 2 * BATCH] for epoch in epochs()])
    trainer.losses = []
    for step in range(STEPS):
        trainer.progress = step / STEPS
        batch = to_model_range(images[order[step * BATCH : (step + 1) * BATCH]], "cpu", generator=flips)
        trainer.losses.append(trainer.train_step(batch)["loss"].item())
    trainer.update.settle()
    return trainer


@pytest.mark.parametrize(
    ("name", "processes"), [("two", 2), ("four", 4), ("resumed", 3), ("killed", 2)], ids=lambda value: str(value)
)
def test_several_processes_end_where_one_with_the_whole_batch_does(lab, alone, name, processes):
    """Within 1e-6, where the steps moved the weights by 1e-3 and more; also after a resume by three, and after a kill."""
    first, *others = ends(lab, name, processes)
    start = LiquidDiffusion(channels=(16, 32), blocks=(1, 1))
    assert max((p - q).abs().max() for p, q in zip(start.parameters(), alone.model.parameters())) > 1e-3
    for parameter, weight in alone.model.named_parameters():
        torch.testing.assert_close(first["weights"][parameter], weight, rtol=0, atol=1e-6)
        assert all(torch.equal(first["weights"][parameter], other["weights"][parameter]) for other in others)
    for parameter, weight in alone.update.ema.model.state_dict().items():
        torch.testing.assert_close(first["ema"][parameter], weight, rtol=0, atol=1e-6)
    assert first["counts"]["steps"] == STEPS
    for end in (first, *others):
        assert end["history"] == [(i, pytest.approx(loss, rel=1e-5)) for i, loss in enumerate(alone.losses, 1)]


def test_no_picture_is_read_twice_in_an_epoch(lab):
    one, other = (end["reads"] for end in ends(lab, "two", 2))
    assert len(one) == len(other) == STEPS
    for epoch, order in enumerate(epochs()):
        read = sum(one[2 * epoch : 2 * epoch + 2] + other[2 * epoch : 2 * epoch + 2], [])
        assert len(set(read)) == len(read) == 2 * BATCH
        assert set(read) == set(order[: 2 * BATCH].tolist())


def test_one_process_writes_the_checkpoints(lab):
    assert (lab[0] / "two" / "saves").read_text().split() == ["0", str(STEPS)]
    assert not ends(lab, "two", 2)[1]["ema"]


def test_a_plain_run_goes_on_where_several_processes_stopped(lab, alone, tmp_path):
    shutil.copytree(lab[0] / "two", tmp_path / "two")
    trainer = RectifiedFlowTrainer(LiquidDiffusion(channels=(16, 32), blocks=(1, 1)), device="cpu", lr=1e-3)
    settings = settings_for(tmp_path / "two", batch_size=BATCH, max_steps=STEPS + 2)
    history = ld_train.train(trainer, open_pictures(lab[0] / "pictures", 8), settings)
    assert [loss for _, loss in history[:STEPS]] == pytest.approx(alone.losses, rel=1e-5)
    trainer.update.settle()
    assert len(history) == trainer.update.steps == STEPS + 2


def test_a_worker_that_dies_or_fails_ends_the_run_with_a_sentence(lab):
    said = lab[1]
    advice = ", so the run was stopped; run again to go on from its last checkpoint."
    assert said["killed"] == f"Process 1 of 2 ended (SIGKILL){advice}"
    assert said["failed"] == f"Process 1 of 2 ended (KeyError: 'a name that is not there'){advice}"
    assert "5 processes cannot share a batch of 12 equally; choose a multiple." in said["uneven"]
    assert [name for name, sentence in said.items() if sentence] == ["killed", "failed", "uneven"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(lab):
    one, other = ends(lab, "resumed", 2)  # as they were before three processes went on
    assert one["counts"]["steps"] == other["counts"]["steps"] == 4
    saves = (lab[0] / "resumed" / "saves").read_text().split()
    assert saves == ["0", "4", str(STEPS)]


def test_a_bad_number_in_one_process_skips_the_step_in_all(lab):
    """In float16, where the scale of the loss must stay the same too."""
    one, other = ends(lab, "bad", 2)
    assert one["counts"] == other["counts"]
    assert one["counts"]["skipped"] >= 1 and one["counts"]["scale"] <= 2**15
    assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
    assert all(weight.isfinite().all() for weight in one["weights"].values())


@pytest.mark.timeout(300)
def test_torchrun_trains_and_leaves_weights_and_samples(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = run(
        *launcher, ROOT / "train_parallel.py", folder=tmp_path, LD_SMOKE="1", LD_RUN_DIR=str(tmp_path / "run")
    )
    assert process.returncode == 0, process.stderr[-3000:]
    for name in ("checkpoint.pt", "weights.safetensors", "samples.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
