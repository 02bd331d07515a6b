"""What the image cache is worth on this machine: four figures, each against its goal.

    python benchmarks/data.py            # about 4 minutes; prints a table, writes benchmarks/results/data.json

Ratios are taken within one run, the two sides in turns, and given as median (lowest to highest). The source is made
here: 512 px JPEG (quality 90) of the project's sample pictures enlarged over a noise texture, because what a JPEG costs
to decode depends on how much detail it holds. Everything is on local disk, which favours plain streaming.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hub_stand_in import parquet_bytes  # noqa: E402
from PIL import Image  # noqa: E402

from ld_data import SAMPLES, open_images  # noqa: E402

SIZE, BATCH, ROUNDS = 64, 64, 3
PICTURES = 1500  # JPEG files of 512 px
LINKS = 4  # names for each of them, so that a fill is long beside the start of its process
CACHED = 30_000  # rows of the cache that batches are drawn from: as many as CelebA-HQ has
STEP = 0.002  # seconds
GROUP = 300_000_000  # bytes of a row group


def jpegs(count, side=512):
    """Detailed pictures as JPEG bytes."""
    dice = np.random.default_rng(0)
    samples = sorted(SAMPLES.rglob("*.png"))
    for index in range(count):
        sample = Image.open(samples[index % len(samples)]).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        noise = sum(
            np.asarray(Image.fromarray(dice.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((side, side)), float)
            for n in (8, 64, 512)
        )
        pixels = 0.7 * np.asarray(sample) + 0.1 * noise  # [side, side, 3]
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield file.getvalue()


def make_sources(folder):
    """In a process of its own, so that its memory is not counted: `write_sources`; returns the mean bytes of a JPEG."""
    subprocess.run([sys.executable, __file__, str(folder)], check=True)
    return statistics.mean(path.stat().st_size for path in (folder / "files").iterdir())


def write_sources(folder):
    """The same pictures as files and as four parquet shards; a zip of 30,000 small ones; a shard of one row group."""
    pictures = list(jpegs(PICTURES))
    (folder / "files").mkdir()
    (folder / "shards").mkdir()
    (folder / "group").mkdir()
    for index, data in enumerate(pictures):
        first = folder / "files" / f"{index:05d}.jpg"
        first.write_bytes(data)
        for link in range(1, LINKS):
            os.link(first, folder / "files" / f"{link * PICTURES + index:05d}.jpg")
    for shard in range(4):
        name = f"train-{shard:05d}-of-00004.parquet"
        (folder / "shards" / name).write_bytes(parquet_bytes(pictures[shard::4], group=100))
    dice = np.random.default_rng(1)
    with zipfile.ZipFile(folder / "small.zip", "w") as archive:
        for index in range(CACHED):
            archive.writestr(f"{index}.ppm", b"P6 %d %d 255\n" % (SIZE, SIZE) + dice.bytes(3 * SIZE * SIZE))
    mean = sum(map(len, pictures)) / len(pictures)
    many = [pictures[index % PICTURES] for index in range(round(GROUP / mean))]
    (folder / "group" / "train.parquet").write_bytes(parquet_bytes(many, group=len(many)))


def naive_stream(folder):
    """img/s of `datasets` streaming as its guides show it: decode, resize, two DataLoader workers; start-up left out."""
    from datasets import load_dataset

    files = sorted(str(path) for path in (folder / "shards").glob("*.parquet"))
    stream = load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)
    stream = stream.select_columns(["image"]).map(to_tensor)
    loader = iter(torch.utils.data.DataLoader(stream, batch_size=BATCH, num_workers=2))
    next(loader)
    start, rows = time.perf_counter(), 0
    for batch in islice(loader, 16):
        rows += len(batch["image"])
    seconds = time.perf_counter() - start
    return rows / seconds


def to_tensor(row):
    pixels = np.asarray(row["image"].convert("RGB").resize((SIZE, SIZE)))
    return {"image": torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1}


def cached_stream(cache, batches=2000):
    """img/s of `cache.batch` called without a pause."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in range(batches):
        cache.batch(BATCH, generator=generator)
    return batches * BATCH / (time.perf_counter() - start)


def waiting_share(folder, round_):
    """Share of the time spent in `cache.batch` by steps that sleep 2 ms, as a GPU's leave the CPU, during the fill."""
    generator = torch.Generator().manual_seed(0)
    with open_images(folder / "files", SIZE, cache_dir=folder / f"growing{round_}") as cache:
        quietly(cache.wait, 100)
        waited = steps = 0
        start = time.perf_counter()
        while not cache.complete:
            asked = time.perf_counter()
            cache.batch(BATCH, generator=generator)
            waited += time.perf_counter() - asked
            steps += 1
            time.sleep(STEP)
        return 100 * waited / (time.perf_counter() - start)


def pil_loop(folder):
    """img/s of the loop that one would write by hand, over the same files."""
    start = time.perf_counter()
    files = sorted((folder / "files").iterdir())[:PICTURES]
    for file in files:
        np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE)))
    return len(files) / (time.perf_counter() - start)


def fill(folder, round_):
    """img/s of a whole fill, from `open_images` to the last row, the start of the filler included."""
    start = time.perf_counter()
    with open_images(folder / "files", SIZE, cache_dir=folder / f"filled{round_}") as cache:
        quietly(cache.wait)
        return len(cache) / (time.perf_counter() - start)


def peak_memory(folder):
    """MB at the peak of filler and reader together, on a shard of one 300 MB row group."""
    peak = 0
    with open_images(folder / "group", SIZE, cache_dir=folder / "memory") as cache:
        done = threading.Event()
        waiter = threading.Thread(target=lambda: (quietly(cache.wait), done.set()))
        waiter.start()
        while not done.wait(0.02):
            peak = max(peak, resident(cache._process.pid))
        waiter.join()
        cache.batch(BATCH)
    return peak, resident(os.getpid())


def resident(pid):
    """MB of RAM that a process held at its peak (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0)


def quietly(wait, rows=None):
    """`cache.wait` without its bar."""
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        wait(rows)
    finally:
        sys.stderr = stderr


def figure(name, values, unit, goal, reached):
    middle = statistics.median(values)
    return {
        "figure": name,
        "median": round(middle, 2),
        "low": round(min(values), 2),
        "high": round(max(values), 2),
        "n": len(values),
        "unit": unit,
        "goal": goal,
        "reached": bool(reached(middle)),
    }


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "home")
        mean = make_sources(folder)
        filler, reader = peak_memory(folder)  # first, while this process has done nothing else
        with open_images(folder / "small.zip", SIZE, cache_dir=folder / "cache") as cache:
            quietly(cache.wait)
            cached_stream(cache, 200)
            rates = [(cached_stream(cache), naive_stream(folder)) for _ in range(ROUNDS)]
        waits = [waiting_share(folder, round_) for round_ in range(ROUNDS)]
        fills = [(fill(folder, round_), pil_loop(folder)) for round_ in range(ROUNDS)]
    ratio = partial(map, lambda pair: pair[0] / pair[1])
    rows = [
        figure("cache batches / naive stream", list(ratio(rates)), "x", "at least 100", lambda x: x >= 100),
        figure("2 ms steps waiting, while filling", waits, "%", "under 2", lambda x: x < 2),
        figure("peak RAM, filler + reader", [filler + reader], "MB", "under 2000", lambda x: x < 2000),
        figure("fill / plain PIL loop", list(ratio(fills)), "x", "at least 2", lambda x: x >= 2),
        figure("cache batches", [a for a, _ in rates], "img/s", "", lambda x: True),
        figure("naive stream", [b for _, b in rates], "img/s", "", lambda x: True),
        figure("fill", [a for a, _ in fills], "img/s", "", lambda x: True),
        figure("plain PIL loop", [b for _, b in fills], "img/s", "", lambda x: True),
        figure("peak RAM, filler alone", [filler], "MB", "", lambda x: True),
    ]
    machine = {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "picture_bytes": round(mean),
        "pictures": PICTURES * LINKS,
        "cached_rows": CACHED,
        "batch": BATCH,
        "size": SIZE,
    }
    print(f"{'figure':<36}{'median':>12}   {'lowest to highest':<24}{'goal':<14}")
    for row in rows:
        spread = f"{row['low']:,} to {row['high']:,}"
        verdict = f"{row['goal']}: {'yes' if row['reached'] else 'NO'}" if row["goal"] else ""
        print(f"{row['figure']:<36}{row['median']:>12,} {row['unit']:<6} {spread:<24}{verdict}")
    print(json.dumps(machine))
    path = ROOT / "benchmarks" / "results" / "data.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "figures": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_sources(Path(sys.argv[1]))
    else:
        main()
