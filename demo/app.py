"""A page that draws pictures with a trained LiquidDiffusion: `python demo/app.py`, or a Hugging Face Space (see README.md).

LD_MODEL names the network: a .safetensors or checkpoint file, a folder of save_pretrained, or owner/name on the Hub.
"""

import os
import sys
from pathlib import Path

import gradio as gr
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # in a Space the two modules lie beside this file

from ld_checkpoint import load_weights  # noqa: E402
from liquid_diffusion import SOLVERS, LiquidDiffusion, RectifiedFlow, integrate, model_from, time_grid  # noqa: E402

DEFAULT = HERE.parent / "sample_data" / "emoji-nano-32.safetensors"
LARGEST = dict(pictures=16, size=128, steps=200)


def load(name):
    """A LiquidDiffusion from a file, a folder or the Hub."""
    return model_from(*load_weights(name)) if Path(name).is_file() else LiquidDiffusion.from_pretrained(name)


def whole(name, value, low, high, multiple=1):
    """value as an int, or a gr.Error that says what it must be; requests may come from programs too."""
    if not isinstance(value, (int, float)) or value != int(value) or not low <= value <= high or value % multiple:
        step = f", a multiple of {multiple}" if multiple > 1 else ""
        raise gr.Error(f"{name} is {value!r}; it must be a whole number from {low} to {high}{step}.")
    return int(value)


def grid(images, columns=4, scale=3):
    """[N, 3, H, W] in [-1, 1] -> uint8 [rows * H * scale, columns * W * scale, 3], filled up with white."""
    images = torch.cat([images, images.new_ones(-len(images) % columns, *images.shape[1:])])
    images = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # [rows, H, columns, W, 3]
    pixels = images.flatten(2, 3).flatten(0, 1).add(1).mul(127.5).round().to(torch.uint8)  # [rows * H, columns * W, 3]
    return pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1).cpu().numpy()


def build(name, size=32):
    """The page for one network, whose pictures have `size` pixels a side at first."""
    flow = RectifiedFlow(load(name))

    @torch.no_grad()
    def draw(pictures, size, steps, solver, seed, progress=gr.Progress()):  # noqa: B008, gradio looks for this default
        count = whole("The number of pictures", pictures, 1, LARGEST["pictures"])
        side = whole("The size", size, flow.model.multiple, LARGEST["size"], flow.model.multiple)
        steps = whole("The number of steps", steps, 1, LARGEST["steps"])
        generator = torch.Generator().manual_seed(whole("The seed", seed, 0, 2**32 - 1))
        if solver not in SOLVERS:
            raise gr.Error(f"There is no solver {solver!r}; choose one of {', '.join(SOLVERS)}.")
        noise = torch.randn(count, flow.model.in_channels, side, side, generator=generator).to(flow.device)
        states = integrate(flow.model, noise, time_grid(steps), solver)
        *_, images = progress.tqdm(states, total=steps + 1, desc="from noise to pictures")
        return grid(images.clamp(-1, 1))

    with gr.Blocks(title="LiquidDiffusion") as page:
        gr.Markdown("# LiquidDiffusion\nPictures from noise by a network of liquid (CfC) blocks, without attention.")
        with gr.Row():
            with gr.Column():
                fields = [
                    gr.Slider(1, LARGEST["pictures"], 8, step=1, label="pictures"),
                    gr.Slider(
                        flow.model.multiple, LARGEST["size"], size, step=flow.model.multiple, label="size, pixels"
                    ),
                    gr.Slider(1, LARGEST["steps"], 25, step=1, label="steps"),
                    gr.Dropdown(list(SOLVERS), value="euler", label="solver"),
                    gr.Number(0, precision=0, label="seed"),
                ]
                button = gr.Button("Draw", variant="primary")
            picture = gr.Image(format="png", label="pictures")
        button.click(draw, fields, picture, api_name="draw", concurrency_limit=1)  # one at a time, the others wait
    return page.queue(max_size=64)


if __name__ == "__main__":
    build(os.environ.get("LD_MODEL", str(DEFAULT))).launch()
