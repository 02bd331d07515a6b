"""Checkpoint files of a run: written whole or not at all, two kept and the best, copied aside, read without running code."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

FORMAT = 2  # of a checkpoint; a change that older code cannot read raises it
READABLE = (1, FORMAT)  # of a file of format 1 the weights alone can be used: it has the state of another optimizer
NEWEST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint-previous.pt", "best.pt"
SHIPPED = Path(__file__).resolve().parent / "sample_data" / "emoji-nano-32.safetensors"


class CheckpointError(RuntimeError):
    """A file that cannot be used; the message is one sentence that says what is wrong and what to do."""


# ---- one file -------------------------------------------------------------------------------------------------------


def write_whole(path, write, previous=None):
    """Call write(file) on a temporary neighbour of `path` and rename it, so that no reader ever sees half a file.

    previous: a name that the file now at `path`, if any, gets in the same moment. OSError if the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # which torch.save hides behind one of its own
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(state, path, previous=None):
    """Write a dict of tensors and plain values, whole or not at all; see write_whole. The folder must exist."""
    write_whole(path, lambda file: torch.save({**state, "format": FORMAT}, file), previous)


def load_checkpoint(path, device="cpu"):
    """Read what save_checkpoint wrote; no code in the file is run. CheckpointError for any other or damaged file."""
    check_archive(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds Python code where only numbers belong, so it was not opened; ask for a safetensors file instead."
        ) from None
    except OSError:
        raise
    except Exception as error:  # whatever a reader trips over in a file of someone else's making
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)}); use another file.") from None
    if not isinstance(state, dict) or not {"format", "model", "config"} <= set(state):
        raise CheckpointError(f"{path} is not a checkpoint of this project; use one that its training wrote.")
    if state["format"] not in READABLE:
        raise CheckpointError(f"{path} has format {state['format']!r}, this code reads {FORMAT}; update the project.")
    return state


def check_archive(path):
    """Raise a CheckpointError unless the file is an uncompressed zip, as torch writes it, whose checksums all hold."""
    with open(path, "rb") as file:
        start = file.read(1)
    if start == pickle.PROTO:
        raise CheckpointError(f"{path} is a bare pickle, which can hold code, so it was not opened; use another file.")
    try:
        with zipfile.ZipFile(path) as archive:
            plain = all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
            sound = plain and archive.testzip() is None
    except Exception as error:  # zipfile raises half a dozen kinds for a file with flipped bits
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where a flipped bit points
            raise
        sound = False
    if not sound:
        size = os.path.getsize(path)
        raise CheckpointError(f"{path} ({size:,} bytes) is damaged, cut short or no checkpoint; use another file.")


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---- weights to publish ---------------------------------------------------------------------------------------------


def save_weights(model, path, **metadata):
    """Write a model's weights and its `config` as safetensors, which cannot hold code; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    texts = {"config": json.dumps(model.config), **{name: str(value) for name, value in metadata.items()}}
    content = safetensors.torch.save(tensors, metadata=texts)
    write_whole(path, lambda file: file.write(content))
    return path


def load_weights(path):
    """(config, state dict) of a safetensors file, or of a checkpoint's averaged weights; no code in it is run.

    Both are a stranger's word until `model_from` of the notebook has checked them. CheckpointError if unreadable.
    """
    return read_weights(path)[:2]


def read_weights(path):
    """(config, state dict, metadata) as load_weights and open_weights return them, from one reading of the file."""
    if Path(path).suffix != ".safetensors":
        state = load_checkpoint(path)
        return state["config"], state.get("ema", state["model"]), state.get("settings", {})
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            config = json.loads(metadata.pop("config"))
            return config, {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (safetensors.SafetensorError, ValueError):
        raise CheckpointError(f"{path} is damaged or no safetensors file; use another file.") from None
    except KeyError:
        raise CheckpointError(f"{path} does not name its network; use a file that save_weights wrote.") from None


def open_weights(path=None):
    """(config, weights, metadata) of the file that LD_WEIGHTS names, else of `path`, else of the network that ships with the project.

    metadata: the texts given to save_weights, or the settings of a checkpoint's run. CheckpointError if unreadable.
    """
    path = Path(os.environ.get("LD_WEIGHTS") or path or SHIPPED)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}; name the weights.safetensors or the checkpoint.pt of a run.")
    return read_weights(path)


# ---- the files of a run ---------------------------------------------------------------------------------------------


def snapshot(value):
    """A copy on the CPU of all tensors in nested dicts, lists and tuples; nothing that happens later changes it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(item) for item in value)
    return value


def written(path):
    """When the file was written, seconds; None if there is none, or its drive is gone."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


class Keeper:
    """Keeps `checkpoint.pt`, the one before it and `best.pt` in a run's folder, and copies of them in a second folder.

    backup: a folder, say on a mounted drive, in which the copies get a folder of the run's name; None for no copies.
    `news` collects one sentence for each folder that stops or resumes taking files. No failure to write ends a run.
    """

    def __init__(self, folder, backup=None):
        self.folder, self.backup = Path(folder), Path(backup) if backup else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.news, self.failed, self.thread, self.seconds = [], set(), None, 0.0
        for leftover in self.folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)

    @property
    def folders(self):
        return [self.folder] + ([self.backup / self.folder.name] if self.backup else [])

    @property
    def busy(self):
        """True while a thread is still writing."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, state, best=False):
        """Copy the state to the CPU and return; a thread writes it, to the folder and then to the second one."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(snapshot(state), best), name="checkpoint")
        self.thread.start()

    def wait(self):
        """Return once nothing is being written."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, state, best):
        start = time.time()
        for folder in self.folders:
            try:
                self._put(state, folder, best, start)
            except (OSError, RuntimeError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
                self._tell(folder, f"No checkpoint could be written to {folder} ({reason}); the next save tries again.")
            else:
                self._tell(folder, None)
        self.seconds = time.time() - start

    def _put(self, state, folder, best, moment):
        if folder != self.folder:
            self.backup.mkdir(exist_ok=True)  # not its parents: a drive that is gone must not be imitated by a folder
        folder.mkdir(exist_ok=True)
        save_checkpoint(state, folder / NEWEST, folder / PREVIOUS)
        os.utime(folder / NEWEST, (moment, moment))  # the same in both folders, so that load_newest can compare
        if best:
            with open(folder / NEWEST, "rb") as newest:
                write_whole(folder / BEST, lambda file: shutil.copyfileobj(newest, file))

    def _tell(self, folder, failure):
        if failure and folder not in self.failed:
            self.news.append(failure)
            self.failed.add(folder)
        elif not failure and folder in self.failed:
            self.news.append(f"Checkpoints are written to {folder} again.")
            self.failed.discard(folder)

    def load_newest(self):
        """The newest readable checkpoint, or None where there is none. Damaged files are named in `news` and set aside.

        CheckpointError if there are files and none can be read.
        """
        files = [folder / name for folder in self.folders for name in (NEWEST, PREVIOUS)]
        files = sorted(filter(written, files), key=written, reverse=True)
        for path in files:
            try:
                return load_checkpoint(path)
            except (CheckpointError, OSError) as error:
                self.news.append(f"{str(error).rpartition(';')[0] or error}; the checkpoint before it is used.")
                with suppress(OSError):  # so that the next save cannot push the good one out
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
        if files:
            raise CheckpointError(
                f"None of the {len(files)} checkpoints of {self.folder} can be read; they are kept as *.damaged, and "
                "running again starts anew."
            )
        return None

    def set_aside(self, keep=True):
        """Move an earlier run's files to a dated folder inside (delete them with keep=False), so that a new run begins."""
        for folder in self.folders:
            old = [folder / name for name in (NEWEST, PREVIOUS, BEST) if (folder / name).exists()]
            aside = folder / time.strftime("earlier_%Y-%m-%d_%H-%M-%S")
            for path in old:
                if keep:
                    aside.mkdir(exist_ok=True)
                    os.replace(path, aside / path.name)
                else:
                    path.unlink()
            if old and keep:
                self.news.append(f"The checkpoints of the earlier run are now in {aside}.")


# ---- what a checkpoint holds beside the trainer ---------------------------------------------------------------------


def random_state():
    """The states of all global random generators, as plain values and tensors."""
    kind, words, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=[kind, torch.from_numpy(words.astype(np.int64)), *rest],
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


def set_random_state(state):
    """Put the global random generators back to what random_state returned."""
    kind, words, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def code_version():
    """The commit this code stands at, "+" if it was changed since; "unknown" outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


def all_finite(tensors):
    """True if every number in the tensors is finite; one wait for the device."""
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    return math.isfinite(torch.stack(torch._foreach_norm(numbers)).sum().item())
