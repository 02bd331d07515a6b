"""Train on all GPUs of a machine, or of several: `torchrun --nproc_per_node gpu train_parallel.py`, settings by LD_*.

`accelerate launch train_parallel.py` does the same. Run again, with any number of processes, it goes on from the last
checkpoint; LD_BATCH_SIZE counts the pictures of all processes together.
"""

import torch

import ld_parallel
import ld_utils
from ld_checkpoint import save_weights
from ld_data import open_images
from liquid_diffusion import RectifiedFlowTrainer, liquid_diffusion


class SharedTrainer(ld_parallel.SharedGradients, RectifiedFlowTrainer):
    """A RectifiedFlowTrainer that is one of several."""


def work():
    """What each process does: meet the others, train, and in the first one write weights and samples."""
    ld_parallel.join()
    settings = ld_utils.read_settings(
        source="auto",
        preset="auto",
        image_size=0,
        minutes=0.0,
        batch_size=0,
        seed=0,
        plan="",
        recipe="measured",
        resume="auto",
        backup="",
        smoke=False,
    )
    cache = open_images(settings.source, settings.stages[0].image_size)
    torch.manual_seed(settings.seed)
    model = liquid_diffusion(settings.preset, settings.recipe)
    trainer = SharedTrainer(model, seed=settings.seed, recipe=settings.recipe)
    ld_parallel.train(trainer, cache, settings)
    if ld_parallel.is_first():
        save_weights(trainer.update.ema.model, settings.run_dir / "weights.safetensors", source=settings.source)
        final = trainer.sample(settings.samples, settings.image_size, settings.steps, seed=settings.seed + 1)
        print(ld_utils.save_grid(final, settings.run_dir / "samples.png"))


if __name__ == "__main__":
    work()
