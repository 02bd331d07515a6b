"""The demo page as a program sees it: a picture, a message for what cannot be, and a queue that loses nothing."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio", reason="needs gradio, see demo/requirements.txt")

from ld_checkpoint import save_weights  # noqa: E402
from liquid_diffusion import LiquidDiffusion, RectifiedFlow  # noqa: E402

APP = Path(__file__).parents[1] / "demo" / "app.py"
REQUEST = dict(pictures=3, size=16, steps=4, solver="heun", seed=5)


@pytest.fixture(scope="module")
def app():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    spec = importlib.util.spec_from_file_location("demo_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LiquidDiffusion(channels=(8, 16), blocks=(1, 1))


@pytest.fixture(scope="module")
def client(app, model, tmp_path_factory):
    from gradio_client import Client

    folder = tmp_path_factory.mktemp("demo")
    page = app.build(str(save_weights(model, folder / "weights.safetensors")))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield Client(url, download_files=str(folder), verbose=False)
    page.close()


def pixels(answer):
    with Image.open(answer) as picture:
        return np.asarray(picture.convert("RGB"))


def expected(app, model, pictures, size, steps, solver, seed):
    images = RectifiedFlow(model, "cpu").sample(pictures, size, steps, solver, seed)
    return app.grid(images)


def test_a_request_returns_the_pictures_of_its_seed(app, model, client):
    answer = pixels(client.predict(**REQUEST, api_name="/draw"))
    assert answer.shape == (16 * 3, 4 * 16 * 3, 3)
    assert (answer[:, 3 * 16 * 3 :] == 255).all()  # three pictures and an empty place
    assert np.abs(answer.astype(int) - expected(app, model, **REQUEST)).max() <= 1
    assert not np.array_equal(answer, pixels(client.predict(**{**REQUEST, "seed": 6}, api_name="/draw")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pictures=0), "whole number from 1 to 16|minimum"),
        (dict(pictures=999), "whole number from 1 to 16|maximum"),
        (dict(size=17), "multiple of 2"),
        (dict(steps=2.5), "The number of steps is 2.5; it must be a whole number"),
        (dict(seed=-1), "The seed is -1; it must be a whole number from 0 to 4294967295"),
        (dict(seed=None), "The seed is None"),
        (dict(solver="other"), "choices|There is no solver"),
    ],
)
def test_what_cannot_be_gets_a_message(client, change, message):
    with pytest.raises(Exception, match=message):
        client.predict(**{**REQUEST, **change}, api_name="/draw")


def test_eight_requests_at_once_are_all_answered_each_with_its_own(app, model, client):
    requests = [{**REQUEST, "seed": seed} for seed in range(8)]
    jobs = [client.submit(**request, api_name="/draw") for request in requests]
    for request, job in zip(requests, jobs):
        answer = pixels(job.result(timeout=200))
        assert np.abs(answer.astype(int) - expected(app, model, **request)).max() <= 1


def test_a_folder_of_save_pretrained_is_taken_too(app, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert app.load(str(tmp_path)).config == model.config
    with pytest.raises(ValueError, match="No model can be read"):
        app.load(str(tmp_path / "nothing"))
