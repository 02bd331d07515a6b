"""ipywidgets for the notebooks: each mirrors a plain variable, and nothing waits for a click."""

from __future__ import annotations

import io
import time

import ipywidgets as widgets
from tqdm.auto import tqdm

from ld_utils import grid_image, png


def settings_panel(settings):
    """Fields for the settings; a change writes to `settings` at once, and every cell run after it sees the new value."""
    fields = {
        "source": widgets.Text(description="source"),
        "preset": widgets.Dropdown(description="preset", options=["nano", "tiny", "small", "base", "large"]),
        "image_size": widgets.IntText(description="image size"),
        "minutes": widgets.FloatText(description="minutes"),
        "batch_size": widgets.IntText(description="batch size"),
        "seed": widgets.IntText(description="seed"),
        "plan": widgets.Text(description="plan"),
        "recipe": widgets.Dropdown(description="recipe", options=["measured", "dense", "plain"]),
        "resume": widgets.Dropdown(description="resume", options=["auto", "never"]),
        "backup": widgets.Text(description="backup"),
    }
    for name, field in fields.items():
        field.value = getattr(settings, name)
        field.observe(lambda change, name=name: settings.change(name, change["new"]), names="value")
    return widgets.VBox(list(fields.values()))


def scrubber(frames, description="step"):
    """A slider over stored frames, PNG bytes each; it opens at the last and asks the network for nothing."""
    picture = widgets.Image(value=frames[-1], format="png")
    slider = widgets.IntSlider(value=len(frames) - 1, max=len(frames) - 1, description=description)
    slider.observe(lambda change: setattr(picture, "value", frames[change["new"]]), names="value")
    return widgets.VBox([slider, picture])


def film_slider(film, columns=4, scale=3):
    """A scrubber over film [T, N, C, H, W] in [-1, 1], first frame noise; frames are rendered once, ahead."""
    return scrubber([grid_png(frame, columns, scale) for frame in film])


def explorer(draw, ahead=(), **controls):
    """Controls over a picture, draw(**values) -> PNG bytes; a line below says whether it is being computed or was kept.

    controls: name=(value, choices): a range makes a slider, a list of numbers a slider over them, a list of texts a menu, None
    a number field; a list of one is no choice and shows nothing. ahead: dicts of values to compute at once, with a bar, and keep.
    """
    kept, status, picture = {}, widgets.Label(), widgets.Image(format="png")
    fields = {name: _field(name, *control) for name, control in controls.items()}

    def show(_=None, **values):
        values = {name: field.value for name, field in fields.items()} | values
        key = tuple(values.values())
        status.value = "kept" if key in kept else "computing ..."
        if key not in kept:
            start = time.perf_counter()
            kept[key] = draw(**values)
            status.value = f"computed in {time.perf_counter() - start:.1f} s"
        picture.value = kept[key]

    for values in tqdm([*ahead, {}], desc="computing ahead", disable=not ahead):
        show(**values)
    for field in fields.values():
        field.observe(show, names="value")
    shown = [field for name, field in fields.items() if controls[name][1] is None or len(controls[name][1]) > 1]
    return widgets.VBox([*shown, picture, status])


def _field(name, value, choices):
    """The widget for one of explorer's controls; sliders report where they come to rest, so that no work queues up."""
    name = name.replace("_", " ")
    if choices is None:
        return widgets.IntText(value=value, description=name)
    if isinstance(choices, range):
        low, high = choices[0], choices[-1]
        return widgets.IntSlider(value, low, high, choices.step, description=name, continuous_update=False)
    if isinstance(choices[0], str):
        return widgets.Dropdown(options=choices, value=value, description=name)
    return widgets.SelectionSlider(options=choices, value=value, description=name, continuous_update=False)


def grid_png(pictures, columns=8, scale=3):
    """The grid of pictures [N, C, H, W] in [-1, 1] as PNG bytes, every pixel `scale` wide."""
    image = grid_image(pictures, columns)
    buffer = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), 0).save(buffer, "PNG")
    return buffer.getvalue()


def figure_sliders(draw, **ranges):
    """Sliders over the figure draw(**values), drawn anew at each move; ranges: name=(start, low, high) of each value."""
    sliders = {
        name: widgets.FloatSlider(value=start, min=low, max=high, step=0.05, description=name)
        for name, (start, low, high) in ranges.items()
    }
    picture = widgets.Image(format="png")

    def redraw(_=None):
        picture.value = png(draw(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    redraw()
    return widgets.VBox([*sliders.values(), picture])
