"""What `make train` stands on: the headless runner and the Makefile's checks of the machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent


def run_notebook(folder, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("## Part one")])
    nb.cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nb, folder / "small.ipynb")
    return subprocess.run(
        [sys.executable, ROOT / "run_notebook.py", folder / "small.ipynb"],
        cwd=folder, env=os.environ | {"LD_RUN_DIR": str(folder / "out")}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_runner_tells_what_happens_and_leaves_the_executed_notebook(tmp_path):
    bar = "from tqdm.auto import tqdm\nfor i in tqdm(range(3), desc='bar'): pass"
    done = run_notebook(
        tmp_path, "import os, pathlib\nprint('hello')", bar, "pathlib.Path(os.environ['LD_RUN_DIR'], 'x').touch()"
    )
    assert done.returncode == 0, done.stderr
    for text in ("Part one", "hello", "0/3", "small.ipynb", "out/x"):
        assert text in done.stdout
    executed = nbformat.read(tmp_path / "out" / "small.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "hello\n"


def test_a_failing_cell_is_reported_and_what_ran_before_is_kept(tmp_path):
    done = run_notebook(tmp_path, "print('before')", "raise ValueError('pick another source')", "print('after')")
    assert done.returncode == 1
    assert "ValueError: pick another source" in done.stderr
    executed = nbformat.read(tmp_path / "out" / "small.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "before\n"
    assert "after" not in done.stdout


def make(*arguments, cwd):
    """Run make as from a fresh shell, even where make itself started the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LD_", "MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bare_tree(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    return tmp_path


def test_a_missing_python_is_named(bare_tree):
    done = make("train", "PYTHON=python3.99", cwd=bare_tree)
    assert done.returncode != 0
    assert "There is no 'python3.99'" in done.stdout + done.stderr


@pytest.mark.parametrize("version", ["3.9.18", "3.14.0"])
def test_a_python_that_is_too_old_or_too_new_is_named(bare_tree, version):
    fake = bare_tree / "python"  # this Python, but with another version number
    code = f"import sys; sys.version_info = {tuple(map(int, version.split('.')))}; exec(sys.argv[1])"
    fake.write_text(
        f'#!/bin/sh\ncase "$1" in -c) exec {sys.executable} -c "{code}" "$2";; *) echo "Python {version}";; esac\n'
    )
    fake.chmod(0o755)
    done = make("train", f"PYTHON={fake}", cwd=bare_tree)
    assert done.returncode != 0
    assert f"is Python {version}; LiquidDiffusion needs 3.10 to 3.13" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "name"), [("SOURCE=a/b", "LD_SOURCE=a/b"), ("MINUTES=3", "LD_MINUTES=3"), ("SIZE=48", "LD_IMAGE_SIZE=48")]
)
def test_make_hands_its_variables_to_the_notebook(bare_tree, given, name):
    """The environment of `make train` is what read_settings reads."""
    with open(bare_tree / "Makefile", "a") as file:
        file.write("\nshow-environment:\n\t@env | grep ^LD_ || true\n")
    assert name in make("-s", "show-environment", given, cwd=bare_tree).stdout.splitlines()
