"""Images from anywhere as one growing uint8 cache: streamed and decoded once, read by memory map from then on.

    cache = open_images("huggan/flowers-102-categories", image_size=64)
    cache.wait(2000)
    x = to_model_range(cache.batch(64, generator=g), device)  # float32 [64, 3, 64, 64] in [-1, 1]

A separate process (`ld_fill.py`) streams the source and appends to the cache, so two CPU cores keep a GPU busy:
training reads finished pixels, while the network and the decoders work elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

import ld_fill
from ld_decode import to_8bit
from ld_utils import from_uint8

FORMAT = 1  # of a cache on disk; a change of decoding or layout raises it, and old caches are then filled anew
LOOK_SECONDS = 0.5  # `batch` looks for new rows this often; what it has gathered ahead is then void
SAMPLES = Path(__file__).resolve().parent / "sample_data"


class DataError(RuntimeError):
    """The source or the cache is at fault; the message is one sentence that says what to do."""


def open_images(
    source,
    image_size=64,
    split="train",
    cache_dir=None,
    max_images=None,
    seed=0,
    *,
    revision=None,
    config=None,
    max_bad=0.02,
    strict=True,
    patience=600.0,
    retry_wait=1.0,
    timeout=30.0,
):
    """Open the image cache of a source, filling it in the background where it is not complete.

    source       "samples" (488 emoji faces that come with the project); a folder of pictures, nested or not; a zip;
                 a parquet file or a folder with parquet files; a list of pictures in memory (PIL, arrays [H, W] or
                 [H, W, C], tensors [C, H, W]); or a Hub id "owner/name" of any set with an image column. Sizes
                 matter there: huggan/CelebA-HQ is 34 GB of 1024 px pictures, its 256 px mirror
                 korexyz/celeba-hq-256x256 moves a twelfth of the bytes and is as good at 256 px and below.
    image_size   side of the squares, pixels
    split        name of the split; in a folder or zip, of a subfolder, if there is one
    cache_dir    where caches live; default $LD_CACHE, else ~/.cache/liquid_diffusion. Each source, size, split, seed
                 and limit has a folder of its own there, and so has each state of a local source that changed.
    max_images   stop after this many pictures
    seed         order of the shards (of the files, where the source is files) and of `batch` without a generator;
                 rows keep their order within a shard, so of a sorted set the first rows may all be of one class
    revision, config   of a Hub set; by default the newest revision, pinned for good when the cache is begun
    max_bad      largest share of rows that may be dropped as unusable
    strict       False: a filler that failed is a warning in `batch` and `wait`, and the rows so far are used
    patience     seconds without a new row, retries included, after which a shard counts as lost
    retry_wait   seconds before the first retry; doubles up to 60
    timeout      seconds without a byte after which a connection counts as dead

    Returns an `ImageCache`. Raises `DataError` where the source can be seen to be wrong at once.
    """
    root = Path(cache_dir or os.environ.get("LD_CACHE") or "~/.cache/liquid_diffusion").expanduser().absolute()
    identity = {
        "format": FORMAT,
        **identify(source, split, root),
        "image_size": image_size,
        "split": split,
        "max_images": max_images,
        "seed": seed,
        "asked_revision": revision,
        "config": config,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.]+", "-", identity["source"]).strip("-")[-40:]
    knobs = {"max_bad": max_bad, "patience": patience, "retry_wait": retry_wait, "timeout": timeout}
    return ImageCache(root / f"{name}-{image_size}px-{key}", identity, knobs, strict)


def identify(source, split, root):
    """What a source is and, for local ones, a fingerprint that changes with its content."""
    if isinstance(source, (list, tuple)):
        source = _spool(source, root)
    path = SAMPLES if str(source) == "samples" else Path(source).expanduser().absolute()
    if not str(source) or not path.exists():
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
            return {"kind": "hub", "source": str(source)}
        raise DataError(f"{source!r} is neither a folder, zip or parquet file here nor a Hub id like owner/name.")
    parquet = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if parquet:
        listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in parquet]
        return {"kind": "parquet", "source": str(path), "fingerprint": ld_fill.fingerprint(listing)}
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise DataError(f"{path} is neither a folder nor a zip nor a parquet file; pass one of these.")
    try:
        listing = ld_fill.list_pictures(path, split)
    except zipfile.BadZipFile as fault:
        raise DataError(f"{path} is damaged ({fault}); fetch it again.") from fault
    if not listing:
        types = " ".join(sorted(ld_fill.SUFFIXES))
        raise DataError(f"{path} holds no pictures of split {split!r} ({types}); pass a folder or zip that does.")
    kind = "folder" if path.is_dir() else "zip"
    return {"kind": kind, "source": str(path), "fingerprint": ld_fill.fingerprint(listing)}


def _spool(pictures, root):
    """Pictures in memory -> a zip below the cache root, named after its content, for the filler to read."""
    if not pictures:
        raise DataError("The list of pictures is empty; pass at least one.")
    files = [b"" if picture is None else _encode(picture) for picture in pictures]
    path = root / f"memory-{hashlib.sha256(b''.join(files)).hexdigest()[:16]}.zip"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(temporary, "w") as archive:
            for index, data in enumerate(files):
                archive.writestr(f"{index:07d}.png", data)
        os.replace(temporary, path)
    return path


def _encode(picture):
    """PIL picture, array [H, W] or [H, W, C], or tensor [C, H, W] -> bytes of a lossless file."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu().numpy()
        picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture  # [H, W, C]
    if not isinstance(picture, Image.Image):
        pixels = to_8bit(np.asarray(picture))
        picture = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    fits_png = picture.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
    ImageOps.exif_transpose(picture).save(file, "PNG" if fits_png else "TIFF")
    return file.getvalue()


def original_sizes(source, split="train"):
    """(width, height) of each picture in a folder or zip, as it lies there and without decoding it; [] for other sources."""
    path = SAMPLES if str(source) == "samples" else Path(source).expanduser()
    if not path.is_dir() and not zipfile.is_zipfile(path):
        return []
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    sizes = []
    for name, *_ in tqdm(ld_fill.list_pictures(path, split), desc="sizes", leave=False):
        with suppress(OSError), Image.open(archive.open(name) if archive else path / name) as picture:
            sizes.append(picture.size)
    return sizes


def duplicates(images):
    """Groups of rows of images [N, C, H, W] whose pixels are equal, each a list of two or more, by their hash."""
    groups = {}
    for row, image in enumerate(images):
        groups.setdefault(hashlib.sha256(image.tobytes()).digest(), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


class Report(dict):
    """What became of a source's rows; prints one line for each entry."""

    def __repr__(self):
        return "\n".join(f"{key:<11}{_plain(value)}" for key, value in self.items())


def _plain(value):
    if isinstance(value, dict):
        value = [f"{count} {reason}" for reason, count in value.items()]
    return (", ".join(value) or "none") if isinstance(value, list) else value


class ImageCache:
    """Square RGB pictures, uint8 [N, 3, H, W] on disk, where N grows until the source is read to its end.

    Any number of processes may open the same cache: one of their fillers works, the others stand by, and the next one
    takes over should it die. Use as a context manager, or call `close`; a forgotten cache is closed with its process.
    """

    def __init__(self, folder, identity, knobs, strict):
        self.folder, self.identity, self.strict = folder, identity, strict
        self._knobs, self._state, self._stamp, self._process, self._failed = knobs, {}, None, None, None
        self._images = np.empty((0, 3, identity["image_size"], identity["image_size"]), np.uint8)
        self._generator = torch.Generator().manual_seed(identity["seed"])
        self._ahead = _LookAhead()
        self._looked = -LOOK_SECONDS  # when `batch` last asked for new rows and for the filler's health
        folder.mkdir(parents=True, exist_ok=True)
        if not self.complete:
            self._start_filler()

    def _start_filler(self):
        request = {
            "folder": str(self.folder),
            "identity": self.identity,
            "knobs": self._knobs,
            "parent": os.getpid(),
        }
        with open(self.folder / "filler.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, ld_fill.__file__, json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # an interrupted notebook cell leaves it running
            )
        self._stop = weakref.finalize(self, _stop, self._process)

    def _refresh(self):
        """Take over the newest committed state, if it changed; costs one `stat` otherwise."""
        try:
            stat = os.stat(self.folder / "state.json")
        except FileNotFoundError:
            return
        if self._stamp == (stat.st_ino, stat.st_mtime_ns):
            return
        state = ld_fill.read_state(self.folder, self.identity)
        if state is None:
            return
        self._stamp, self._state = (stat.st_ino, stat.st_mtime_ns), state
        if state["rows"] > len(self._images):
            shape = (state["rows"], *self._images.shape[1:])
            self._images = np.memmap(self.folder / "images.u8", np.uint8, "r", shape=shape)

    @property
    def images(self):
        """The pictures ready now: uint8 memory map [N, 3, H, W], read only."""
        self._refresh()
        return self._images

    def __len__(self):
        return len(self.images)

    @property
    def complete(self):
        """True once the source has been read to its end (or to `max_images`)."""
        self._refresh()
        return bool(self._state.get("complete"))

    @property
    def report(self):
        """Source, revision and counts as a dict that prints as a table."""
        self._refresh()
        keys = (
            "source",
            "revision",
            "split",
            "image_size",
            "rows",
            "total",
            "seen",
            "dropped",
            "examples",
            "complete",
            "note",
        )
        report = Report({key: self._state[key] for key in keys if self._state.get(key) not in (None, "")})
        return Report(report, failure=self._failed) if self._failed else report

    def wait(self, rows=None):
        """Show progress until `rows` pictures are ready, or all of them (None, or a source that has fewer).

        Raises `DataError` with the filler's sentence where it failed; with strict=False that is a warning.
        """
        start = len(self)
        with tqdm(total=rows, initial=start, unit="img", desc=Path(self.identity["source"]).name) as bar:
            while not self.complete and (rows is None or len(self) < rows) and not self._has_failed():
                if self._process is None:
                    raise DataError("The cache was closed before it was complete; open the same source again.")
                bar.set_postfix_str(self._state.get("note", ""), refresh=False)
                bar.update(len(self) - bar.n)
                time.sleep(0.1)
            bar.total = len(self)
            bar.update(len(self) - bar.n)
        return self

    def _has_failed(self):
        """True where the filler ended before the cache was complete; raises instead if the cache is strict."""
        if self._failed is None and self._process is not None and self._process.poll() is not None:
            self._failed = "" if self.complete else self._last_words()
            if self._failed and not self.strict:
                warnings.warn(f"{self._failed} Going on with the {len(self)} rows there are.", stacklevel=3)
        if self._failed and (self.strict or not len(self)):
            raise DataError(self._failed)
        return bool(self._failed)

    def _last_words(self):
        sentence = self._process.stdout.read().strip().rpartition("\n")[2]
        return sentence or (
            f"The filler was killed (exit status {self._process.returncode}), perhaps for want of memory; open the same "
            "source again to go on where it stopped."
        )

    def batch(self, batch_size, generator=None):
        """Random pictures among those ready now: uint8 [batch_size, 3, H, W] on the CPU, pinned if there is a GPU.

        Rows are drawn with replacement, so a batch is a function of the generator's state and of the number of rows
        alone: once the cache is complete, a run that restores its `torch.Generator` (on the CPU; default one seeded
        with `seed`) goes on with exactly the batches that it would have seen. Coming batches are gathered while the
        caller works on this one, which pays where the generator serves nothing else. Raises `DataError` where the
        filler failed, or where there are no rows yet.
        """
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._refresh()
            self._has_failed()
            self._looked = time.monotonic()
        images, generator = self._images, generator or self._generator
        if not len(images):
            raise DataError("The cache has no rows yet; call cache.wait(1) or more before cache.batch().")
        index = torch.randint(len(images), (batch_size,), generator=generator)  # [B]
        return self._ahead.take(images, index, generator)  # [B, 3, H, W]

    def close(self):
        """Stop the filler; the rows so far stay on disk and readable, and the next `open_images` goes on from there."""
        if self._process is not None:
            self._stop()
            self._process, self._failed = None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _LookAhead:
    """Gathers in a thread what a generator is about to draw; a wrong guess costs time, never the right rows.

    Each guess comes from a copy of the generator that runs ahead. The more guesses in a row come true, the more
    batches are gathered at a time, because waking a thread takes as long as gathering a batch.
    """

    MOST = 4 << 20  # bytes gathered at a time; more of them made the caller wait for the thread

    def __init__(self):
        self.queue = deque()  # (future of a block, position in it); a block: K times (indices, pictures)
        self.thread = ThreadPoolExecutor(1)
        self.copy = None

    def take(self, images, index, generator):
        """Rows `index` [B], just drawn from `generator` below len(images): uint8 [B, 3, H, W]."""
        batch, wrong = None, self.copy is None
        if self.queue:
            block, position = self.queue.popleft()
            if block.done():  # on a busy machine the thread may come too late, and is not waited for
                guess, pictures = block.result()[position]
                wrong = not torch.equal(guess, index)
                batch = None if wrong else pictures
        if batch is None:
            batch = _gather(images, index)
        if wrong:
            self.queue.clear()
            self.copy, self.count = generator.clone_state(), 1
        if len(self.queue) <= self.count // 2:
            self.count = min(2 * self.count, max(1, self.MOST // max(1, batch.nbytes)))
            block = self.thread.submit(_guess, images, len(index), self.count, self.copy)
            self.queue.extend((block, position) for position in range(self.count))
        return batch


def _guess(images, batch_size, count, generator):
    """The next `count` draws of a generator: as many pairs of indices [B] and pictures [B, 3, H, W]."""
    index = torch.stack([torch.randint(len(images), (batch_size,), generator=generator) for _ in range(count)])
    return list(zip(index.unbind(), _gather(images, index).unbind()))


def _gather(images, index):
    """Rows of a memory map, index of any shape -> a tensor of their own [*index.shape, 3, H, W], pinned for a GPU."""
    shape = (*index.shape, *images.shape[1:])
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    np.take(images, index.numpy(), axis=0, out=batch.numpy(), mode="clip")
    return batch


def _stop(process):
    process.kill()  # at any moment the state on disk is whole, so there is nothing to wind down
    process.wait()
    process.stdout.close()


def to_model_range(batch, device, flip=True, generator=None):
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W] in [-1, 1] on `device`, each picture mirrored with probability 1/2.

    `flip=False` leaves them as they are; `generator` (on any device) makes the choice repeatable.
    """
    batch = batch.to(device, non_blocking=True)
    if flip:
        where = batch.device if generator is None else generator.device
        mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator, device=where) < 0.5  # [B, 1, 1, 1]
        batch = torch.where(mirrored.to(batch.device), batch.flip(-1), batch)
    return from_uint8(batch)
