"""kill -9 of the filler, or of the process that trains, at any point: the next run loses and repeats nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub_stand_in import numbered_png, numbers

from ld_data import DataError, open_images

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).resolve().parent.parent
ROWS = 1000
KILLS = 20
NOTEBOOK = """
import sys
from ld_data import open_images
cache = open_images(sys.argv[1], 16, cache_dir=sys.argv[2])
print(cache._process.pid, flush=True)
cache.wait()
print("complete", flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pictures large enough that a fill goes on for a long while after any row at which it is killed."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(ROWS):
        (folder / f"{number}.png").write_bytes(numbered_png(number, side=1000))
    return folder


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """What one run without any accident makes of them."""
    with open_images(source, 16, cache_dir=tmp_path_factory.mktemp("reference")) as cache:
        images = np.array(cache.wait().images)
    assert sorted(numbers(images)) == list(range(ROWS))
    return images


def points(seed):
    """Row counts, in order, at which to kill, and for each a short delay that moves it off the commits."""
    dice = random.Random(seed)
    return [(rows, dice.random() / 5) for rows in sorted(dice.sample(range(400), KILLS))]


def until(condition, seconds=60, pause=0.005):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def test_the_filler_killed_at_twenty_random_points(source, reference, tmp_path):
    killed = 0
    for rows, delay in points(seed=1):
        with open_images(source, 16, cache_dir=tmp_path) as cache:
            until(lambda cache=cache, rows=rows: len(cache) >= rows)
            time.sleep(delay)
            cache._process.send_signal(signal.SIGKILL)
            cache._process.wait()
            killed += not cache.complete
            np.testing.assert_array_equal(cache.images, reference[: len(cache)])
            with pytest.raises(DataError, match="killed .* open the same source again"):
                cache.wait()
    assert killed == KILLS
    with open_images(source, 16, cache_dir=tmp_path) as cache:
        np.testing.assert_array_equal(cache.wait().images, reference)


def test_the_filler_killed_between_the_pixels_and_the_state_that_counts_them(source, reference, tmp_path):
    torn = 0
    for attempt in range(20):
        options = {"image_size": 16, "cache_dir": tmp_path / str(attempt), "max_images": 150}
        with open_images(source, **options) as cache:
            pixels, state = cache.folder / "images.u8", cache.folder / "state.json"
            until(lambda pixels=pixels: pixels.exists() and pixels.stat().st_size, pause=0)
            cache._process.send_signal(signal.SIGKILL)
            cache._process.wait()
        if state.exists():
            continue  # too late, it was counted already
        torn += 1
        with open_images(source, **options) as cache:
            np.testing.assert_array_equal(cache.wait().images, reference[:150])
        if torn == 3:
            break
    assert torn, "never killed in time"


def gone(pid):
    """True once a process has ended, also where nobody has collected its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_notebook_killed_leaves_no_filler_and_loses_nothing(source, reference, tmp_path):
    for rows in (0, 150, 300):
        notebook = subprocess.Popen(
            [sys.executable, "-c", NOTEBOOK, source, tmp_path],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        filler = int(notebook.stdout.readline())
        state = next(tmp_path.iterdir()) / "state.json"
        until(lambda rows=rows, state=state: rows == 0 or (state.exists() and rows_of(state) >= rows))
        notebook.kill()
        notebook.wait()
        notebook.stdout.close()
        until(lambda filler=filler: gone(filler), seconds=20)
    with open_images(source, 16, cache_dir=tmp_path) as cache:
        np.testing.assert_array_equal(cache.wait().images, reference)


def rows_of(state):
    return json.loads(state.read_text())["rows"]
