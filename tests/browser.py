"""The notebooks in a real browser: Chromium drives JupyterLab, runs all cells, moves the widgets and looks at the pictures.

Not part of `make unit`; `make browser` runs it and leaves screenshots in the folder that LD_SHOTS names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parent.parent
TRAINING, PLAYGROUND = "LiquidDiffusion_Training.ipynb", "notebooks/02_playground.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTE = 60_000  # milliseconds; waits end when their condition holds, so a long one costs nothing
expect.set_options(timeout=MINUTE)
PICTURE = """async image => {
  try { return String(new Uint8Array(await (await fetch(image.src)).arrayBuffer())) }
  catch { return null }  // replaced by a newer one in this moment
}"""
SETTINGS = {
    "labconfig/page_config.json": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
    "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the project, since JupyterLab saves what it runs; the training notebook gets a cell that prints settings."""
    folder = tmp_path_factory.mktemp("lab")
    ignore = shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", ".*_cache", "tests", "benchmarks")
    shutil.copytree(ROOT, folder / "project", ignore=ignore)
    notebook = nbformat.read(folder / "project" / TRAINING, as_version=4)
    probe = nbformat.v4.new_code_cell("print('now', settings.minutes, settings.preset)")
    del probe["id"]  # which came with nbformat 4.5
    notebook.cells.append(probe)
    nbformat.write(notebook, folder / "project" / TRAINING)
    for name, content in SETTINGS.items():
        path = folder / "config" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """JupyterLab on a free port of this machine: a function from a notebook's path to its address."""
    own = {name: text for name, text in os.environ.items() if name != "PYTHONPATH" and not name.startswith("LD_")}
    own |= {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= dict(LD_SMOKE="1", LD_RUN_DIR=str(folder / "runs"), LD_CACHE=str(folder / "cache"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder / "project", env=own, stdout=log, stderr=log)
    try:
        yield wait_for_server(folder, server)
    finally:
        server.terminate()
        server.wait(60)


def wait_for_server(folder, server):
    """Read the address that the server writes down once it listens."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        for path in (folder / "runtime").glob("jpserver-*.json"):
            info = json.loads(path.read_text() or "{}")
            if info:
                return lambda notebook: f"{info['url']}lab/tree/{notebook}?token={info['token']}&reset"
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'lab.log').read_text()}")


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "There is no Chromium here; install it (Debian: apt install chromium)."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request):
    """A page of its own; what it shows at the end is kept, the whole length of the notebook, failed or not."""
    page = browser.new_page(viewport=dict(width=1300, height=1000))
    page.set_default_timeout(MINUTE)
    yield page
    shoot(page, request.node.name, height=15_000)
    page.close()


def shoot(page, name, height=1000):
    """Keep a screenshot."""
    page.set_viewport_size(dict(width=1300, height=height))
    if height > 1000:
        page.evaluate(
            "document.querySelectorAll('.jp-WindowedPanel-outer, .jp-Notebook').forEach(x => x.scrollTo(0, 0))"
        )
    shots = Path(os.environ.get("LD_SHOTS", "runs/browser"))
    shots.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=shots / f"{name}.png")
    page.set_viewport_size(dict(width=1300, height=1000))


def run_all(page, address):
    """Open the notebook, run all its cells by the menu, and wait until the last one has run; no cell may fail."""
    page.goto(address)
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"Python 3.*\| Idle")).wait_for()  # the kernel is there
    page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    finished = page.locator(".jp-CodeCell .jp-InputPrompt").last.filter(has_text=re.compile(r"\[\d+\]:"))
    failed = page.locator(".jp-OutputArea-output").get_by_text(re.compile("Traceback|Error:"))
    expect(finished.or_(failed).first).to_be_visible(timeout=5 * MINUTE)
    assert failed.all_inner_texts() == []


def panel(page, label):
    """The first box of widgets that has a control of this name."""
    return page.locator(".widget-vbox", has=page.locator(".widget-label").get_by_text(label, exact=True)).first


def control(box, label):
    """The control of this name in a box."""
    return box.locator(".widget-inline-hbox", has=box.page.locator(".widget-label").get_by_text(label, exact=True))


def picture(box, other_than=None):
    """Bytes, as text, of the picture that the box shows, once it shows another than the one given."""
    deadline = time.monotonic() + MINUTE / 1000
    while time.monotonic() < deadline:
        now = box.locator("img").evaluate(PICTURE)
        if now not in (None, other_than):
            return now
        box.page.wait_for_timeout(100)
    raise AssertionError("The picture did not change within a minute.")


def press(box, label, key):
    """Press a key on the handle of a slider."""
    control(box, label).locator(".noUi-handle, .ui-slider-handle").press(key)


def test_playground_runs_and_its_sliders_change_the_pictures(page, address):
    run_all(page, address(PLAYGROUND))

    explorer = panel(page, "steps")
    first = picture(explorer)
    press(explorer, "steps", "ArrowLeft")  # to 2, computed ahead
    second = picture(explorer, other_than=first)
    expect(explorer.get_by_text("kept", exact=True)).to_be_visible()
    press(explorer, "steps", "ArrowRight")
    assert picture(explorer, other_than=second) == first
    seed = control(explorer, "seed").locator("input")
    seed.fill("7")
    seed.press("Enter")
    picture(explorer, other_than=first)
    expect(explorer.get_by_text(re.compile("^computed in"))).to_be_visible()
    explorer.scroll_into_view_if_needed()
    shoot(page, "explorer")

    scrubber = panel(page, "step")
    last = picture(scrubber)
    press(scrubber, "step", "ArrowLeft")
    earlier = picture(scrubber, other_than=last)
    press(scrubber, "step", "Home")
    noise = picture(scrubber, other_than=earlier)
    assert noise != last
    scrubber.scroll_into_view_if_needed()
    shoot(page, "scrubber")

    maps = panel(page, "frame")
    before = picture(maps)
    press(maps, "frame", "ArrowLeft")
    picture(maps, other_than=before)
    maps.scroll_into_view_if_needed()
    shoot(page, "maps")


def test_settings_panel_of_the_training_notebook_changes_the_settings(page, address):
    run_all(page, address(TRAINING))
    probe = page.locator(".jp-CodeCell").last
    expect(probe.locator(".jp-OutputArea-output")).to_have_text("now 1.0 nano\n")

    settings = panel(page, "batch size")
    settings.scroll_into_view_if_needed()
    minutes = control(settings, "minutes").locator("input")
    minutes.fill("7.5")
    minutes.press("Enter")
    control(settings, "preset").locator("select").select_option("tiny")
    shoot(page, "settings")

    probe.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    expect(probe.locator(".jp-OutputArea-output")).to_have_text("now 7.5 tiny\n")
