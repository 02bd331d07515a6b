"""The filler: the one process that reads a source, decodes each row once and appends it to an image cache.

`ld_data.open_images` starts it as `python ld_fill.py REQUEST`; it imports no torch. A cache folder holds

    images.u8    uint8 [rows, 3, size, size], one row after the other
    state.json   how many of those rows count, and where in the source the next one comes from
    lock         flock'ed by the filler at work; the kernel frees it when that process dies
    filler.log   warnings and tracebacks

Pixels reach the disk first and the state file is then replaced in one step, so whatever lies past `rows` is not yet
there: a filler may be killed at any moment, and the next one repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import responses
from pathlib import Path, PurePosixPath

from ld_decode import Dropped, decode

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
MAX_FILE = 256 << 20  # bytes; a longer member of a zip is not unpacked
COMMIT_SECONDS = 0.25  # rows become visible to readers at least this often while they arrive
THREADS = 2  # Pillow decodes outside the GIL; on two cores four were slower
AHEAD = 64  # rows handed to the threads before the first of them is needed
PARQUET_PIECE = 8 << 20  # bytes asked for at a time
PARQUET_BATCH = 32  # rows; the default is a whole row group, and an empty one is then an error
LONGEST_PAUSE = 60  # seconds between two tries
BRIEFLY = 10  # seconds to go on where more patience rarely helps: no network at the start, an unknown id
DEFINITE = {
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "HFValidationError",
    "DatasetNotFoundError",
    "DataFilesNotFoundError",
    "EmptyDatasetError",
}


class FillError(Exception):
    """What is wrong and what to do, in one sentence for the user."""


# ---- the state on disk, shared with the reader ----


def row_bytes(identity):
    """Bytes of one picture in images.u8."""
    return 3 * identity["image_size"] ** 2


def read_state(folder, identity):
    """The last committed state of a cache folder, or None where there is none that its pixels bear out."""
    try:
        state = json.loads((folder / "state.json").read_text())
        stored = (folder / "images.u8").stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    return state if stored >= state["rows"] * row_bytes(identity) else None


def new_state(identity):
    return {
        **identity,
        "revision": None,
        "total": None,  # rows of the source, where it says so
        "rows": 0,  # pictures in images.u8
        "seen": 0,  # rows taken from the source, dropped ones too
        "shard": 0,  # position in the seeded order
        "offset": 0,  # rows of that shard already seen
        "dropped": {},  # reason -> rows
        "examples": [],
        "note": "",  # what is being waited for
        "complete": False,
    }


def replace_file(path, text):
    """Write `path` so that a reader, or a crash, meets either the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- sources: each has `shards`, `total` (rows, or None) and `rows(shard, offset)` yielding (name, payload) ----


def list_pictures(path, split):
    """[(name, bytes, time or checksum)] of the pictures below a folder or in a zip, sorted by name.

    Where some lie in a folder called like the split (`train/cat/1.png`), only those count; a split other than "train"
    must have such a folder. Hidden files, and what macOS adds to zips, do not count.
    """
    if path.is_dir():
        found = [_stat(path, file) for file in _walk(path)]
    else:
        with zipfile.ZipFile(path) as archive:
            found = [(m.filename, m.file_size, m.CRC) for m in archive.infolist() if not m.is_dir()]
    found = sorted(row for row in found if _is_picture(PurePosixPath(row[0])))
    within = [row for row in found if split in PurePosixPath(row[0]).parts[:-1]]
    return within if within or split != "train" else found


def _walk(path):
    """Every file below a folder, also through links, but each folder once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in SUFFIXES)


def _stat(path, file):
    stat = file.stat() if file.exists() else file.lstat()  # a dangling link is a row too: one that cannot be read
    return file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns


def _is_picture(name):
    hidden = any(part == "__MACOSX" or part.startswith(".") and part != ".." for part in name.parts)
    return not hidden and name.suffix.lower() in SUFFIXES


def fingerprint(listing):
    """Changes whenever a file is added, removed, renamed, resized or touched."""
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


class Pictures:
    """A folder or a zip of picture files, in seeded order so that a part of it is a fair sample."""

    def __init__(self, identity):
        path = Path(identity["source"])
        listing = list_pictures(path, identity["split"])
        if fingerprint(listing) != identity["fingerprint"]:
            raise FillError(f"{path} changed while it was being opened; open it again.")
        self.names = [name for name, *_ in listing]
        random.Random(identity["seed"]).shuffle(self.names)
        self.shards, self.total = [path.name], len(self.names)
        if path.is_dir():
            self.read = lambda name: (path / name).read_bytes()
        else:
            self.archive = zipfile.ZipFile(path)
            self.read = self._unpack

    def _unpack(self, name):
        if self.archive.getinfo(name).file_size > MAX_FILE:
            raise Dropped("too many bytes")
        return self.archive.read(name)

    def rows(self, shard, offset):
        for name in self.names[offset:]:
            yield name, partial(self.read, name)


class Shards:
    """What `datasets` can stream: a Hub id at one pinned revision, or local parquet files; shards in seeded order."""

    def __init__(self, identity, revision):
        import datasets

        source, self.split = identity["source"], identity["split"]
        if identity["kind"] == "hub":
            builder = datasets.load_dataset_builder(source, name=identity["config"], revision=revision)
        elif Path(source).is_dir():
            builder = datasets.load_dataset_builder(source)
        else:
            builder = datasets.load_dataset_builder("parquet", data_files={self.split: [source]})
        files = builder.config.data_files
        if self.split not in files:
            raise FillError(f"{source} has no split {self.split!r}; it has {', '.join(map(repr, files))}.")
        self.format = builder.name
        self.shards = sorted(files[self.split])
        random.Random(identity["seed"]).shuffle(self.shards)
        published = (builder.info.splits or {}).get(self.split)
        self.total = published.num_examples if published else None

    def rows(self, shard, offset):
        import datasets

        options = parquet_options() if self.format == "parquet" else {}
        stream = datasets.load_dataset(
            self.format, data_files={self.split: [shard]}, split=self.split, streaming=True, **options
        )
        column = image_column(stream.features or {})
        if isinstance(stream.features[column], datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
        for index, row in enumerate(stream.skip(offset), offset):
            yield f"{PurePosixPath(shard).name} row {index}", cell_bytes(row[column])


def parquet_options():
    """Keywords for `load_dataset` that fetch a row group in pieces, not at one go: 0.3 GB less at 300 MB a group.

    `datasets` before 4.2 takes no scan options, so there they become the default of pyarrow in this process.
    """
    import pyarrow.dataset
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    pieces = pyarrow.dataset.ParquetFragmentScanOptions(
        use_buffered_stream=True, buffer_size=PARQUET_PIECE, pre_buffer=False
    )
    if hasattr(ParquetConfig, "fragment_scan_options"):
        return {"batch_size": PARQUET_BATCH, "fragment_scan_options": pieces}
    if not isinstance(pyarrow.dataset.ParquetFileFormat, partial):
        pyarrow.dataset.ParquetFileFormat = partial(
            pyarrow.dataset.ParquetFileFormat, default_fragment_scan_options=pieces
        )
    return {"batch_size": PARQUET_BATCH}


def image_column(features):
    """Name of the column that holds pictures: of type Image, or a struct with `bytes`, or binary, in that order."""
    import datasets

    tests = (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, dict) and "bytes" in feature,
        lambda feature: isinstance(feature, datasets.Value) and "binary" in feature.dtype,
    )
    for test in tests:
        for name, feature in features.items():
            if test(feature):
                return name
    raise FillError(f"The source has no image column, only {', '.join(features) or 'nothing'}; choose another.")


def cell_bytes(cell):
    """A cell of the image column, decoding off -> its bytes, read from its address if need be, or None."""
    if not isinstance(cell, dict):
        return cell
    if cell["bytes"] is None and "://" in (cell.get("path") or ""):
        import fsspec

        with fsspec.open(cell["path"], "rb") as file:
            return file.read()
    return cell["bytes"]


# ---- the filler ----


def decode_row(payload, size):
    """Bytes, None or a callable that reads them -> uint8 [3, size, size], or the reason why not."""
    try:
        return decode(payload() if callable(payload) else payload, size)
    except Dropped as reason:
        return str(reason)
    except (OSError, RuntimeError, zipfile.BadZipFile, zipfile.zlib.error):
        return "unreadable"


def decode_ahead(rows, size, pool):
    """(name, payload) -> (name, picture or reason) in the same order; all that came before a fault comes out first."""
    pending, fault = deque(), None
    try:
        for name, payload in rows:
            pending.append((name, pool.submit(decode_row, payload, size)))
            if len(pending) >= AHEAD:
                name, future = pending.popleft()
                yield name, future.result()
    except Exception as error:
        fault = error
    for name, future in pending:
        yield name, future.result()
    if fault:
        raise fault


def brief(fault):
    """An HTTP status, or kind and first line of an exception, to be quoted within a sentence."""
    while fault.__cause__:
        fault = fault.__cause__
    response = getattr(fault, "response", None)
    if response is not None:
        return f"{response.status_code} {responses.get(response.status_code, '')}".strip()
    return f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0][:200]}".rstrip(" .:")


def is_definite(fault):
    """True for answers that rarely change by asking again: no such data set, revision or files, or not public."""
    return any(kind.__name__ in DEFINITE for kind in type(fault).__mro__)


def shorten_retries(pause):
    """Make `datasets` give up soon: its own retries last up to 28 min, start no new request and count no progress."""
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 2
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = pause
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = pause


def forget_listings():
    """A failed request may have left a wrong "not found" or an incomplete listing in memory."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()


class Filler:
    """Fills one cache folder from where its state says, one shard after the other."""

    def __init__(self, request):
        self.folder, self.identity, self.knobs = Path(request["folder"]), request["identity"], request["knobs"]
        self.name = self.identity["source"]
        self.ready = []  # decoded, not yet on disk
        self.connected = False
        self.last_move = None  # time of the newest row or try; None while another filler is at work

    def run(self):
        """Wait for the lock, then fill until the source ends; raises `FillError`."""
        with locked(self.folder / "lock"):
            self.state = read_state(self.folder, self.identity) or new_state(self.identity)
            self.last_commit = time.monotonic()
            if not self.state["complete"]:
                with open(self.folder / "images.u8", "ab", buffering=0) as self.file:
                    self.file.truncate(self.state["rows"] * row_bytes(self.identity))
                    self.fill()

    def fill(self):
        if self.identity["kind"] == "hub":
            self.persist(self.connect, self.cannot_connect)
        source = self.persist(self.open_source, lambda fault: f"{self.name} cannot be opened ({brief(fault)}).")
        self.state["total"] = source.total
        with ThreadPoolExecutor(THREADS) as pool:
            for index in range(self.state["shard"], len(source.shards)):
                if self.full():
                    break
                self.persist(partial(self.take, source, index, pool), partial(self.lost, source, index))
                self.state.update(shard=index + 1, offset=0)
        self.check_bad(least=1)
        if not self.state["rows"]:
            raise FillError(f"{self.name} has no rows in split {self.identity['split']!r}; pass another source.")
        self.state["complete"] = True
        self.commit()

    def connect(self):
        """Pin the revision, so that an upload in the middle of a run changes nothing."""
        from huggingface_hub import HfApi

        asked = self.state["revision"] or self.identity["asked_revision"]
        self.state["revision"] = HfApi().dataset_info(self.name, revision=asked, timeout=self.knobs["timeout"]).sha
        self.connected = True

    def open_source(self):
        if self.identity["kind"] in ("folder", "zip"):
            return Pictures(self.identity)
        return Shards(self.identity, self.state["revision"])

    def take(self, source, index, pool):
        """Every row of one shard, from the offset on."""
        rows = source.rows(source.shards[index], self.state["offset"])
        for name, result in decode_ahead(rows, self.identity["image_size"], pool):
            self.last_move = time.monotonic()
            self.state.update(seen=self.state["seen"] + 1, offset=self.state["offset"] + 1, note="")
            if isinstance(result, str):
                self.drop(name, result)
            else:
                self.ready.append(result)
            if self.full():
                break
            if self.last_move - self.last_commit > COMMIT_SECONDS:
                self.commit()
        self.commit()

    def full(self):
        limit = self.identity["max_images"]
        return limit is not None and self.state["rows"] + len(self.ready) >= limit

    def persist(self, action, explain):
        """Run `action` until it succeeds, with growing pauses while `patience` lasts; every new row renews it.

        What `datasets` or the network raise ends as a `FillError` with the sentence that `explain` makes of it.
        """
        self.explain = explain
        pause, seen, since = self.knobs["retry_wait"], self.state["seen"], time.monotonic()
        while True:
            self.last_move = time.monotonic()
            try:
                return action()
            except FillError:
                raise
            except Exception as fault:
                traceback.print_exc()
                if self.state["seen"] > seen:
                    pause, seen, since = self.knobs["retry_wait"], self.state["seen"], time.monotonic()
                given_up = time.monotonic() + pause - since > self.patience(fault)
                self.state["note"] = "" if given_up else f"{brief(fault)}; trying again"
                self.commit()
                if given_up:
                    raise FillError(explain(fault)) from fault
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                forget_listings()

    def patience(self, fault):
        """Seconds to go on in the face of a fault: none for local files, few where waiting rarely helps."""
        if self.identity["kind"] != "hub":
            return 0
        unanswered = not self.connected and getattr(fault, "response", None) is None
        return min(self.knobs["patience"], BRIEFLY if unanswered or is_definite(fault) else float("inf"))

    def cannot_connect(self, fault):
        if getattr(fault, "response", None) is None:
            problem, remedy = "The Hub cannot be reached", "check the network"
        elif is_definite(fault):
            problem = f"{self.name} is no folder here, and no public data set (or not of that revision) on the Hub"
            remedy = "check the name"
        else:
            problem, remedy = "The Hub does not answer as it should", "try again later"
        return f'{problem} ({brief(fault)}); {remedy}, or pass source="samples" for the pictures that come along.'

    def lost(self, source, index, fault):
        """The sentence for a shard that stays unreadable."""
        state, shards = self.state, len(source.shards)
        missing = f"{shards - index} of {shards} shards are missing"
        if source.total:
            missing = f"{source.total - state['seen']} of {source.total} rows are missing"
        elif index:
            mean = (state["seen"] - state["offset"]) / index
            missing += f", about {mean * (shards - index) - state['offset']:.0f} rows by the mean of the others"
        return (
            f"Shard {PurePosixPath(source.shards[index]).name} of {self.name} stays unreadable at row {state['offset']} "
            f"({brief(fault)}): {missing}, {state['rows']} are kept; open the same source again to go on from there, or "
            "pass strict=False to make do with these."
        )

    def drop(self, name, reason):
        dropped = self.state["dropped"]
        dropped[reason] = dropped.get(reason, 0) + 1
        if len(self.state["examples"]) < 3:
            self.state["examples"].append(f"{name}: {reason}")
        self.check_bad(500)

    def check_bad(self, least):
        """Stop where too large a share of the rows, counted as `least` rows or more, was dropped."""
        bad, seen = sum(self.state["dropped"].values()), self.state["seen"]
        if bad > self.knobs["max_bad"] * max(seen, least):
            self.commit()
            counts = ", ".join(f"{count} {reason}" for reason, count in self.state["dropped"].items())
            raise FillError(
                f"{bad} of the first {seen} rows of {self.name} are no usable pictures ({counts}; "
                f"for example {'; '.join(self.state['examples'])}); mend the source, or pass max_bad={bad / seen:.2g} "
                "or more to leave them out."
            )

    def commit(self):
        """Put the decoded rows on the disk, then the state that counts them."""
        pixels = memoryview(b"".join(row.tobytes() for row in self.ready))
        rows = self.state["rows"] + len(self.ready)
        try:
            while pixels:
                pixels = pixels[self.file.write(pixels) :]
            os.fsync(self.file.fileno())
            replace_file(self.folder / "state.json", json.dumps({**self.state, "rows": rows}))
        except OSError as fault:
            if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                problem = f"The disk is full: {self.folder} takes no more than {self.state['rows']} rows"
                remedy = "free some space, or pass max_images or a cache_dir on a larger disk"
            else:
                problem, remedy = f"{self.folder} cannot be written ({fault.strerror})", "pass another cache_dir"
            raise FillError(f"{problem}; {remedy}.") from fault
        self.state["rows"], self.ready = rows, []
        self.last_commit = time.monotonic()


@contextlib.contextmanager
def locked(path):
    """Hold the exclusive lock on `path`, after waiting for its present holder to finish or die."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def watch(filler, parent):
    """End this process when its parent is gone, or when nothing moves and no timeout fires; the state stays whole."""
    limit = 2 * (filler.knobs["patience"] + filler.knobs["timeout"])
    while os.getppid() == parent:
        if filler.last_move and time.monotonic() - filler.last_move > limit:
            finish(filler.explain(TimeoutError(f"no row for {limit:.0f} s")))
        time.sleep(0.2)
    os._exit(1)


def finish(failure=""):
    """Leave at once, the sentence of a failure on stdout; on a regular exit pyarrow's threads would abort."""
    print(failure, flush=True)
    os._exit(bool(failure))


def main(request):
    """Fill the cache that `request` (JSON) describes."""
    request = json.loads(request)
    knobs = request["knobs"]
    os.nice(10)  # the training loop comes first
    timeout = str(math.ceil(knobs["timeout"]))
    os.environ.update(HF_HUB_DOWNLOAD_TIMEOUT=timeout, HF_HUB_ETAG_TIMEOUT=timeout)
    os.environ.update(USE_TORCH="0", USE_TF="0", USE_JAX="0", HF_UPDATE_DOWNLOAD_COUNTS="0")  # read by `datasets`
    filler = Filler(request)
    threading.Thread(target=watch, args=(filler, request["parent"]), daemon=True).start()
    try:
        if request["identity"]["kind"] in ("hub", "parquet"):
            shorten_retries(knobs["retry_wait"])
        filler.run()
    except FillError as fault:
        finish(str(fault))
    except BaseException as fault:  # whatever it is, the reader must hear of it
        traceback.print_exc()
        finish(f"The filler failed ({brief(fault)}); its log is {filler.folder / 'filler.log'}.")
    finish()


if __name__ == "__main__":
    main(sys.argv[1])
