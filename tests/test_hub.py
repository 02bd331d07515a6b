"""Sharing a run on the Hub: upload, page, download and the page's own five lines, against a stand-in on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from fault_lab import open_pictures, settings_for, small_trainer
from hub_model_stand_in import ModelHub

import ld_hub
from ld_checkpoint import load_checkpoint
from ld_train import train
from ld_utils import save_grid

TOKEN = "hf_a_secret_that_nobody_may_see"
SHARE = """
import os, torch, ld_hub
from types import SimpleNamespace
from huggingface_hub import hf_hub_download
from ld_checkpoint import load_weights
from liquid_diffusion import LiquidDiffusion, model_from

model = model_from(*load_weights("run/checkpoint.pt"))
print(ld_hub.share(model, "owner/faces", "run", metrics={"KID": "0.012 ± 0.003, 1,000 pictures"}))
page = open(hf_hub_download("owner/faces", "README.md"), encoding="utf-8").read()
exec(page.split("```python")[1].split("```")[0])
assert os.path.getsize("samples.png") > 100 and images.shape == (16, 3, 8, 8)
again = LiquidDiffusion.from_pretrained("owner/faces").state_dict()
assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
os.environ["LD_HUB_REPO"] = "owner/cell"
trainer = SimpleNamespace(update=SimpleNamespace(ema=SimpleNamespace(model=model)))
exec(CELL, dict(os=os, trainer=trainer, settings=SimpleNamespace(run_dir="run")))
del os.environ["LD_HUB_REPO"]
exec(CELL, dict(os=os))
for token in ("hf_wrong", ""):
    os.environ["HF_TOKEN"] = token
    try:
        ld_hub.share(model, "owner/faces", "run")
    except ld_hub.HubError as error:
        print(error)
try:
    LiquidDiffusion.from_pretrained("owner/nothing")
except ValueError as error:
    print(error)
"""


def share_cell():
    """The training notebook's last code."""
    notebook = nbformat.read(Path(__file__).parents[1] / "LiquidDiffusion_Training.ipynb", as_version=4)
    (found,) = [cell.source for cell in notebook.cells if cell.source.startswith("#@title Share it")]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `run`, a finished run of five steps."""
    folder = tmp_path_factory.mktemp("share")
    with open_pictures(folder / "cache", 8) as cache:
        train(small_trainer(), cache.wait(), settings_for(folder / "run", max_steps=5))
    save_grid(torch.zeros(4, 3, 8, 8), folder / "run" / "samples.png")
    return folder


@pytest.fixture(scope="module")
def shared(folder):
    """What a process printed that shared the run, line by line, and the stand-in it shared it with."""
    with ModelHub(TOKEN) as hub:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        places = dict(HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "home"), PYTHONPATH=path)
        environment = {**os.environ, **places, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        command = [sys.executable, "-c", f"CELL = {share_cell()!r}\n{SHARE}"]
        options = dict(
            env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        process = subprocess.run(command, **options)
    assert process.returncode == 0, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    return process.stdout.splitlines(), hub


def test_the_model_goes_up_and_comes_back_with_its_page_and_grid(shared, folder):
    lines, hub = shared
    assert lines[0].startswith(f"{hub.endpoint}/owner/faces/commit/")
    files = hub.repos["owner/faces"]["main"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert files["samples.png"] == (folder / "run" / "samples.png").read_bytes()


def test_the_notebooks_last_cell_shares_only_where_a_repository_is_named(shared):
    lines, hub = shared
    assert lines[1].startswith(f"{hub.endpoint}/owner/cell/commit/")
    assert lines[2] == "Nothing was shared: hub_repo is empty."
    assert set(hub.repos["owner/cell"]["main"]) == set(hub.repos["owner/faces"]["main"])
    assert hub.commits == 2


def test_without_a_good_token_there_is_a_sentence_and_no_prompt(shared):
    wrong, without, nothing = shared[0][3:]
    assert re.fullmatch(r"The Hub did not take owner/faces \(.*401.*\); check the name and that the token .*\.", wrong)
    assert re.fullmatch(r"There is no Hub token here; make one .* put it into HF_TOKEN .*\.", without)
    assert re.fullmatch(
        r"No model can be read from owner/nothing \(.*404.*\); give a folder or owner/name .*\.", nothing
    )


def test_the_token_is_stored_nowhere(shared, folder):
    _, hub = shared
    assert not [name for name, data in hub.repos["owner/faces"]["main"].items() if TOKEN.encode() in data]
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_page_says_how_the_model_was_made(shared):
    page = shared[1].repos["owner/faces"]["main"]["README.md"].decode()
    assert page.startswith("---\nlibrary_name: liquid-diffusion\n")
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", page, re.M))
    assert rows["parameters"].startswith(f"{sum(p.numel() for p in small_trainer().model.parameters()):,} ")
    assert re.fullmatch(r"5 steps of 4 pictures, \d+\.\d minutes", rows["training"])
    assert rows["KID"] == "0.012 ± 0.003, 1,000 pictures"
    assert "![Samples of this model](samples.png)" in page
    assert "the author's own, 8 px" in rows["pictures"]


@pytest.mark.parametrize(
    ("source", "text", "listed"),
    [
        ("huggan/CelebA-HQ", "https://huggingface.co/datasets/huggan/CelebA-HQ", True),
        ("samples", "Apache License 2.0", False),
        ("/home/me/my secret folder", "the author's own", False),
    ],
)
def test_the_page_names_the_source_and_its_licence_and_no_local_folder(folder, source, text, listed):
    state = load_checkpoint(folder / "run" / "checkpoint.pt")
    state["settings"]["source"] = source
    page = ld_hub.model_card(small_trainer().model, "owner/x", state)
    assert text in page
    assert (f"datasets:\n- {source}\n" in page) == listed
    assert "secret folder" not in page and str(folder) not in page
    assert "| quality | not measured |" in page
    assert "samples.png)" not in page
