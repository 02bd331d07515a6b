"""Small helpers that more than one notebook needs: pictures and figures, settings, the machine."""

from __future__ import annotations

import io
import itertools
import math
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

# ---- pictures -------------------------------------------------------------------------------------------------------


def from_uint8(images):
    """uint8 [..., H, W] in 0..255 -> float32 in [-1, 1]; the inverse of `to_uint8`."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images):
    """float [..., H, W] in [-1, 1] -> uint8 in 0..255; values outside are clamped, uint8 passes as it is."""
    if images.dtype == torch.uint8:
        return images
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def grid_image(images, columns=8):
    """[N, C, H, W], float in [-1, 1] or uint8 -> one PIL image, `columns` pictures a row on white."""
    grid = make_grid(to_uint8(images).cpu(), nrow=columns, padding=2, pad_value=255)  # [3, H', W']
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_grid(images, path, columns=8, scale=2):
    """Write the grid as PNG, every pixel `scale` wide, and return the path."""
    picture = grid_image(images, columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(path)
    return Path(path)


def draw_grid(axes, images, columns=8):
    """Show the grid on matplotlib axes."""
    axes.imshow(grid_image(images, columns), interpolation="nearest")
    axes.set_axis_off()


def show_grid(images, title=None, columns=8, labels=None, row_labels=None):
    """Display pictures [N, C, H, W], float in [-1, 1] or uint8, with one label per picture or per row."""
    rows = -(-len(images) // columns)
    cell = min(1.4, 11 / columns)
    figure = Figure(figsize=(cell * columns + (0.8 if row_labels else 0), cell * rows + 0.35), layout="constrained")
    axes = figure.subplots(1, columns) if labels else figure.subplots(rows, 1) if row_labels else figure.subplots()
    if labels:
        for ax, image, label in zip(axes, images, labels):
            draw_grid(ax, image[None], 1)
            ax.set_title(label, fontsize=9)
    elif row_labels:
        for ax, row, label in zip(axes, images.split(columns), row_labels):
            ax.imshow(grid_image(row, columns), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_ylabel(label, rotation=0, ha="right", va="center")
            ax.spines[:].set_visible(False)
    else:
        draw_grid(axes, images, columns)
    if title:
        figure.suptitle(title, fontsize=10)
    show(figure)


def show_histogram(values, xlabel, title):
    """Display how often the values [N] occur."""
    figure = Figure(figsize=(6, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.hist(values.cpu().numpy(), bins=50, color="0.35")
    axes.set(xlabel=xlabel, ylabel="count", title=title)
    show(figure)


def png(figure):
    """A matplotlib figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def in_notebook():
    """True where a figure can be displayed: in a Jupyter kernel, Colab and nbconvert included."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


def show(figure):
    """Display a figure in a notebook, and do nothing elsewhere; returns the handle that `update` redraws, or None."""
    if not in_notebook():
        return None
    from IPython.display import Image as DisplayImage
    from IPython.display import display

    return display(DisplayImage(data=png(figure)), display_id=True)


class LiveFigure:
    """Loss curve and sample grid, redrawn in place in a notebook and written to `folder` as loss.png and preview.png."""

    def __init__(self, folder, title):
        self.folder, self.title, self.handle = Path(folder), title, None
        self.folder.mkdir(parents=True, exist_ok=True)

    def update(self, history, samples):
        """history: list of (step, loss); samples: [N, C, H, W] in [-1, 1]."""
        from IPython.display import Image as DisplayImage

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_loss(left, history)
        draw_grid(right, samples, columns=round(len(samples) ** 0.5 * 1.4))
        right.set_title("samples from averaged weights, same noise each time", fontsize=9)
        figure.suptitle(self.title, fontsize=10)
        if self.handle is None:
            self.handle = show(figure)
        else:
            self.handle.update(DisplayImage(data=png(figure)))
        save_grid(samples, self.folder / "preview.png")

    def finish(self, history):
        """Write loss.png."""
        figure = Figure(figsize=(6, 4), layout="constrained")
        draw_loss(figure.subplots(), history)
        (self.folder / "loss.png").write_bytes(png(figure))


def draw_loss(axes, history):
    """Every loss as a dot, and their running mean as a line."""
    steps, losses = zip(*history) if history else ((), ())
    axes.plot(steps, losses, ".", color="0.8", markersize=3, label="one step")
    smooth, mean = [], None
    for loss in losses:
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        smooth.append(mean)
    axes.plot(steps, smooth, color="C0", label="running mean")
    axes.set(xlabel="step", ylabel="velocity MSE", yscale="log")
    axes.legend(loc="upper right", fontsize=8)


# ---- settings and machine -------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What a run is made of; printed in the notebook, changed by the panel, stored in the checkpoint."""

    source: str
    preset: str
    image_size: int  # pixels, height and width
    minutes: float  # of training
    batch_size: int
    seed: int
    smoke: bool  # a few steps of everything, to see that it works
    rows_to_start: int = 2000  # pictures in the cache before training starts
    max_steps: int = 0  # the budget in steps; 0: the minutes decide
    samples: int = 32
    steps: int = 50  # Euler steps of the final grid
    run_dir: Path = Path("runs")
    plan: str = ""  # growing resolution, "64:0.6,128:0.4": side in pixels and share of the budget, stage by stage
    recipe: str = "measured"  # of network and trainer: "measured", "dense" or "plain"; see liquid_diffusion
    resume: str = "auto"  # "auto" goes on with the run in run_dir, "never" sets it aside and starts anew
    backup: str = ""  # a folder, say on a mounted drive, that gets a copy of every checkpoint
    save_every: float = 60.0  # seconds between checkpoints

    @property
    def stages(self):
        """The plan as a list of Stage, one of the whole budget if there is no plan."""
        return parse_plan(self.plan) if self.plan else [Stage(self.image_size, 1.0)]

    def change(self, name, value):
        """Set one value; a run_dir that was chosen by the settings follows them."""
        follows = self.run_dir == run_folder(vars(self))
        setattr(self, name, value)
        if name == "plan" and value:
            self.image_size = self.stages[-1].image_size
        if follows:
            self.run_dir = run_folder(vars(self))


class Stage(NamedTuple):
    """A part of a run: side of the pictures, and the share of the budget at which it ends."""

    image_size: int
    end: float


def parse_plan(text):
    """From "64:0.6,128:0.4" to [Stage(64, 0.6), Stage(128, 1.0)]; shares are scaled to sum 1. ValueError for other texts."""
    try:
        pairs = [(int(size), float(share)) for size, share in (part.split(":") for part in text.split(","))]
    except ValueError:
        pairs = []
    if not pairs or any(size < 1 or not 0 < share < math.inf for size, share in pairs):
        raise ValueError(f"The plan is {text!r}; write side:share per stage, for example 64:0.6,128:0.25,256:0.15.")
    total, ends = sum(share for _, share in pairs), itertools.accumulate(share for _, share in pairs)
    return [Stage(size, end / total) for (size, _), end in zip(pairs, ends)]


def read_values(**values):
    """The form's values as attributes; LD_<NAME> in the environment wins. ValueError for a text where a number belongs."""
    texts = {name: os.environ.get(f"LD_{name.upper()}") for name in values}
    return SimpleNamespace(
        **{name: _parse(name, texts[name], type(value)) if texts[name] else value for name, value in values.items()}
    )


def read_settings(**values):
    """Settings from the form's values; LD_<NAME> in the environment wins, and "auto" or 0 is chosen by the machine."""
    values = vars(read_values(**values))
    gpu = torch.cuda.is_available()
    auto = dict(source="huggan/CelebA-HQ", preset="tiny", image_size=64, minutes=150.0, batch_size=128)
    if not gpu:
        auto = dict(source="samples", preset="nano", image_size=32, minutes=5.0, batch_size=32)
    if values["smoke"]:
        auto |= dict(source="samples", preset="nano", image_size=16, minutes=1.0, batch_size=8)
    chosen = values | {name: auto[name] for name in auto if values[name] in ("auto", 0)}
    if chosen["smoke"]:
        chosen |= dict(rows_to_start=64, max_steps=4, samples=8, steps=4)
    if chosen.get("plan"):
        chosen["image_size"] = parse_plan(chosen["plan"])[-1].image_size
    if chosen.get("resume", "auto") not in ("auto", "never"):
        raise ValueError(f"resume is {chosen['resume']!r}; choose 'auto' to go on with an earlier run, or 'never'.")
    if not chosen.get("backup") and DRIVE.is_dir():
        chosen["backup"] = str(DRIVE / "LiquidDiffusion")
    folder = os.environ.get("LD_RUN_DIR")
    return Settings(**chosen, run_dir=Path(folder) if folder else run_folder(chosen))


DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it


def run_folder(chosen):
    """A folder that is the same whenever the settings are, so that running the notebook again finds its earlier run."""
    size = chosen.get("plan") or f"{chosen['image_size']}px"
    recipe = chosen.get("recipe", "measured")
    kept = [chosen["source"], chosen["preset"], size, recipe * (recipe != "measured")]
    kept += [f"seed{chosen['seed']}" * bool(chosen["seed"]), "smoke" * chosen["smoke"]]
    return Path("runs", "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.") for word in kept if word))


def _parse(name, text, kind):
    if kind is bool:
        return text.lower() in ("1", "true", "yes")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"LD_{name.upper()} is {text!r}; it must be a number.") from None


def machine_line():
    """One line: GPU and its memory, CPU cores, RAM, versions; says what to do where the GPU cannot be used."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "datasets"))
    return f"{_gpu()} | {os.cpu_count()} CPU cores | {_ram_gib():.0f} GiB RAM | Python {platform.python_version()}, {packages}"


def _gpu():
    if not torch.cuda.is_available():
        return "no GPU: the small preset trains on the CPU"
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    major, minor = torch.cuda.get_device_capability()
    if all(int(arch.removeprefix("sm_")) // 10 != major for arch in torch.cuda.get_arch_list() if "sm_" in arch):
        return f"{name} (sm_{major}{minor}) has no kernels in this PyTorch: choose a T4 in the runtime menu"
    return f"{name}, {memory:.1f} GiB"


def _ram_gib():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
