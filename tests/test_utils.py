"""Pictures, checkpoint files, widgets and the live figure."""

import io
import os

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import ld_utils
import ld_widgets


def test_uint8_survives_the_model_range_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = ld_utils.from_uint8(levels)
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(ld_utils.to_uint8(floats), levels)
    assert ld_utils.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_grid_holds_every_picture_in_order(tmp_path):
    pictures = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 4, 4)
    path = ld_utils.save_grid(pictures, tmp_path / "new" / "grid.png", columns=3, scale=1)
    with Image.open(path) as grid:
        assert grid.size == (3 * 6 + 2, 2 * 6 + 2)
        centres = [grid.getpixel((4 + 6 * (i % 3), 4 + 6 * (i // 3)))[0] for i in range(6)]
    assert centres == [0, 51, 102, 153, 204, 255]


def test_live_figure_writes_its_pictures(tmp_path):
    live = ld_utils.LiveFigure(tmp_path, "title")
    history = [(step, 1 / step) for step in range(1, 20)]
    live.update(history, torch.zeros(4, 3, 8, 8))
    live.finish(history)
    for name in ("preview.png", "loss.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 10


def test_settings_panel_mirrors_the_settings():
    values = dict(source="samples", preset="nano", image_size=32, minutes=5.0, batch_size=8, seed=0, smoke=False)
    settings = ld_utils.read_settings(**values)
    panel = ld_widgets.settings_panel(settings)
    fields = {field.description: field for field in panel.children}
    assert fields["preset"].value == "nano"
    fields["minutes"].value = 7.5
    fields["preset"].value = "tiny"
    assert (settings.minutes, settings.preset) == (7.5, "tiny")


def test_film_slider_shows_the_frame_it_points_to():
    film = torch.linspace(-1, 1, 5)[:, None, None, None, None].expand(5, 2, 3, 4, 4)
    slider, picture = ld_widgets.film_slider(film).children
    last = picture.value
    slider.value = 0
    assert picture.value != last
    slider.value = 4
    assert picture.value == last


def test_explorer_computes_each_choice_once_and_says_so():
    asked = []

    def draw(steps, solver, seed):
        asked.append((steps, solver, seed))
        return f"{steps} {solver} {seed}".encode()

    box = ld_widgets.explorer(draw, [dict(steps=1)], steps=(4, [1, 2, 4]), solver=("euler", ["euler"]), seed=(0, None))
    *fields, picture, status = box.children
    assert [field.description for field in fields] == ["steps", "seed"]  # the only solver is no choice
    assert asked == [(1, "euler", 0), (4, "euler", 0)] and picture.value == b"4 euler 0"
    fields[0].value = 1
    assert (picture.value, status.value, len(asked)) == (b"1 euler 0", "kept", 2)
    seen = []
    status.observe(lambda change: seen.append(change["new"]), names="value")
    fields[1].value = 7
    assert picture.value == b"1 euler 7" and asked[2:] == [(1, "euler", 7)]
    assert seen[0] == "computing ..." and seen[1].startswith("computed in")


def test_explorer_gives_each_kind_of_choice_its_widget():
    box = ld_widgets.explorer(
        lambda **values: repr(values).encode(), x=(3, range(2, 9, 2)), mode=("b", ["a", "b"]), top_left=(0, None)
    )
    slider, menu, number, picture, _ = box.children
    assert (slider.min, slider.max, slider.step, menu.options, number.description) == (2, 8, 2, ("a", "b"), "top left")
    assert picture.value == b"{'x': 3, 'mode': 'b', 'top_left': 0}"


def test_machine_line_names_versions_and_memory():
    line = ld_utils.machine_line()
    assert f"torch {torch.__version__.split('+')[0]}" in line
    assert f"{os.cpu_count()} CPU cores" in line


def test_a_gpu_without_kernels_is_named(monkeypatch):
    """What Kaggle's P100 is with current wheels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 2**34}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert "choose a T4" in ld_utils.machine_line()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "choose a T4" not in ld_utils.machine_line()


def test_show_grid_outside_a_notebook_does_nothing():
    pictures = torch.zeros(4, 3, 8, 8)
    ld_utils.show_grid(pictures, title="t", columns=2)
    ld_utils.show_grid(pictures, columns=4, labels=list("abcd"))
    ld_utils.show_grid(pictures, columns=2, row_labels=["a", "b"])


@pytest.mark.parametrize("count", [1, 5])
def test_loss_curve_takes_short_histories(tmp_path, count):
    ld_utils.LiveFigure(tmp_path, "").finish([(i, 1.0) for i in range(1, count + 1)])


def test_figure_sliders_draw_at_their_values_at_once_and_at_each_move():
    seen = []

    def draw(**values):
        seen.append(values)
        return Figure(figsize=(1 + values["a"], 1))

    first, second, picture = ld_widgets.figure_sliders(draw, a=(1.0, 0.0, 5.0), b=(2.0, 1.0, 3.0)).children
    before = picture.value
    first.value = 4.0
    second.value = 3.0
    assert seen == [dict(a=1.0, b=2.0), dict(a=4.0, b=2.0), dict(a=4.0, b=3.0)]
    assert [Image.open(io.BytesIO(png)).width for png in (before, picture.value)] == [200, 500]
