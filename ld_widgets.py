"""ipywidgets for the notebooks: each mirrors a plain variable, and nothing waits for a click."""

from __future__ import annotations

import io

import ipywidgets as widgets

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
        "resume": widgets.Dropdown(description="resume", options=["auto", "never"]),
        "backup": widgets.Text(description="backup"),
    }
    for name, field in fields.items():
        field.value = getattr(settings, name)
        field.observe(lambda change, name=name: settings.change(name, change["new"]), names="value")
    return widgets.VBox(list(fields.values()))


def film_slider(film, columns=4, scale=3):
    """A slider over stored frames, film [T, N, C, H, W] in [-1, 1], first frame noise; frames are rendered once, ahead."""
    frames = [_png(frame, columns, scale) for frame in film]
    picture = widgets.Image(value=frames[-1], format="png")
    slider = widgets.IntSlider(value=len(frames) - 1, max=len(frames) - 1, description="step")
    slider.observe(lambda change: setattr(picture, "value", frames[change["new"]]), names="value")
    return widgets.VBox([slider, picture])


def _png(frame, columns, scale):
    image = grid_image(frame, columns)
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
