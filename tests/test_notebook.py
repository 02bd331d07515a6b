"""The notebook as a document and as a program: form, export rules, settings, and the Colab branch of its setup cell."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import ld_utils

ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "LiquidDiffusion_Training.ipynb"
NOTEBOOKS = [TRAINING, *sorted((ROOT / "notebooks").glob("*.ipynb"))]
OWN_MODULES = sorted(path.stem for path in ROOT.glob("ld_*.py"))


def code_cells(path):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


# ---- form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_form_that_colab_writes(path):
    raw = json.loads(path.read_text())
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 0)
    assert raw["metadata"]["colab"] == {"gpuType": "T4", "provenance": [], "toc_visible": True}
    assert raw["metadata"]["accelerator"] == "GPU"
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert raw["metadata"]["kernelspec"]["language"] == "python"
    assert "widgets" not in raw["metadata"]  # GitHub refuses to show such a notebook
    assert not [cell for cell in raw["cells"] if "id" in cell or cell.get("outputs")]
    badge = f"colab.research.google.com/github/krystv/liquid-diffusion/blob/main/{path.relative_to(ROOT)}"
    assert badge in "".join(raw["cells"][0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_stands_before_code_and_cells_are_short(path):
    nb = nbformat.read(path, as_version=4)
    lengths = [len(source.splitlines()) for source in code_cells(path)]
    assert max(lengths) <= 45
    prose = sum(cell.cell_type == "markdown" for cell in nb.cells)
    assert prose >= 0.4 * len(nb.cells)
    assert not [source for source in code_cells(path) if re.search(r"(?<!\w)(input|getpass|notebook_login)\(", source)]


def test_exported_cells_start_with_the_mark_and_import_torch_the_hub_and_the_standard_library_alone():
    for source in code_cells(TRAINING):
        assert "#| export" not in source.partition("\n")[2], "nbdev drops a mark that is not the first line"
    tree = ast.parse((ROOT / "liquid_diffusion.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= {"torch", "huggingface_hub"} | set(sys.stdlib_module_names)  # the Hub for save_pretrained alone


@pytest.mark.parametrize("module", OWN_MODULES)
def test_helper_modules_do_not_import_the_model(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "liquid_diffusion" not in names
    assert ast.get_docstring(tree), "one line says what belongs in the module"


# ---- settings -------------------------------------------------------------------------------------------------------

FORM = dict(source="auto", preset="auto", image_size=0, minutes=0.0, batch_size=0, seed=0, smoke=False)


@pytest.fixture
def clean_environment(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("LD_"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_every_form_field_is_a_setting_and_the_environment_wins(clean_environment):
    cell = next(source for source in code_cells(TRAINING) if source.startswith("#@title Settings"))
    fields = [line.split(" = ")[0] for line in cell.splitlines() if "#@param" in line]
    assert set(FORM) <= set(fields)
    clean_environment.setenv("LD_SOURCE", "some/folder")
    clean_environment.setenv("LD_PRESET", "tiny")
    clean_environment.setenv("LD_IMAGE_SIZE", "48")
    clean_environment.setenv("LD_MINUTES", "1.5")
    clean_environment.setenv("LD_BATCH_SIZE", "7")
    clean_environment.setenv("LD_SEED", "3")
    settings = ld_utils.read_settings(**FORM)
    values = (
        settings.source,
        settings.preset,
        settings.image_size,
        settings.minutes,
        settings.batch_size,
        settings.seed,
    )
    assert values == ("some/folder", "tiny", 48, 1.5, 7, 3)
    clean_environment.setenv("LD_MINUTES", "soon")
    with pytest.raises(ValueError, match="LD_MINUTES is 'soon'"):
        ld_utils.read_settings(**FORM)


def test_auto_settings_follow_the_machine(clean_environment):
    clean_environment.setattr("torch.cuda.is_available", lambda: False)
    cpu = ld_utils.read_settings(**FORM)
    assert (cpu.source, cpu.preset, cpu.image_size, cpu.minutes) == ("samples", "nano", 32, 5.0)
    clean_environment.setattr("torch.cuda.is_available", lambda: True)
    gpu = ld_utils.read_settings(**FORM)
    assert (gpu.source, gpu.preset, gpu.image_size, gpu.minutes) == ("huggan/CelebA-HQ", "tiny", 64, 150.0)
    assert ld_utils.read_settings(**{**FORM, "source": "samples"}).source == "samples"  # a value given stays


# ---- the Colab branch of the setup cell ------------------------------------------------------------------------------


def git(*arguments, cwd):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def bare_repository(tmp_path_factory):
    """The project's files as they are now, as a bare git repository to clone."""
    folder = tmp_path_factory.mktemp("repo")
    ignore = shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", ".*_cache", "nb.py", "tests")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    git("init", "-q", "-b", "main", cwd=folder / "tree")
    git("add", "-A", cwd=folder / "tree")
    git("commit", "-qm", "files", cwd=folder / "tree")
    git("clone", "-q", "--bare", "tree", "bare.git", cwd=folder)
    return folder / "bare.git"


def installed():
    """Names and versions of all packages, as pip lists them."""
    return subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout


def run_on_colab(folder, bare_repository, monkeypatch, until, hidden=(), notebook=TRAINING):
    """Run a notebook's cells up to the one that holds `until`, alone in a folder, in a kernel that has google.colab."""
    site = folder / "site"
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    (site / "sitecustomize.py").write_text(
        "import importlib.util, google.colab\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {list(hidden)!r} else find(name, *rest)\n"
    )
    content = folder / "content"
    content.mkdir()
    shutil.copy(notebook, content)
    for name, value in dict(PYTHONPATH=str(site), LD_REPO=str(bare_repository), LD_SMOKE="1", PIP_NO_INDEX="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LD_CACHE", str(folder / "cache"))
    nb = nbformat.read(content / notebook.name, as_version=4)
    wanted = next(i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and until in cell.source)
    nb.cells = nb.cells[: wanted + 1]
    NotebookClient(nb, timeout=300, resources={"metadata": {"path": str(content)}}).execute()
    return content, "\n".join(
        output.get("text", "") for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs
    )


@pytest.mark.timeout(400)
def test_on_colab_the_notebook_alone_clones_the_project_and_installs_nothing(
    tmp_path, bare_repository, clean_environment
):
    before = installed()
    content, printed = run_on_colab(tmp_path, bare_repository, clean_environment, until="open_images(")
    assert (content / "liquid-diffusion" / "ld_utils.py").exists()
    assert "Installed now: nothing" in printed
    assert installed() == before
    assert "488" in printed  # the built-in pictures came with the clone


@pytest.mark.timeout(400)
def test_on_colab_only_what_is_missing_is_asked_of_pip(tmp_path, bare_repository, clean_environment):
    before = installed()
    hidden = ("ipywidgets",)
    _, printed = run_on_colab(tmp_path, bare_repository, clean_environment, until="#@title Setup", hidden=hidden)
    assert "Installed now: ipywidgets\n" in printed
    assert installed() == before  # it was there, and pip left it and its dependencies alone


@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_on_colab_the_other_notebooks_find_the_project_too(tmp_path, bare_repository, clean_environment, path):
    before = installed()
    content, printed = run_on_colab(tmp_path, bare_repository, clean_environment, "import ld_utils", notebook=path)
    assert (content / "liquid-diffusion" / "ld_utils.py").exists()
    assert "nothing, all of it was there" in printed
    assert installed() == before


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_a_notebook_opened_in_its_own_folder_finds_the_project(tmp_path, clean_environment, path):
    """Without conftest.py's PYTHONPATH, as in JupyterLab."""
    clean_environment.delenv("PYTHONPATH", raising=False)
    nb = nbformat.read(path, as_version=4)
    setup = next(cell for cell in nb.cells if cell.source.startswith("#@title Setup"))
    where = nbformat.v4.new_code_cell("import ld_utils; print(ld_utils.__file__)")
    nb.cells = [setup, where, setup, where]  # twice, as people do
    NotebookClient(nb, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert [Path(cell.outputs[0].text.strip()) for cell in nb.cells[1::2]] == [ROOT / "ld_utils.py"] * 2
