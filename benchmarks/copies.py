"""Whether the network that ships copies its training pictures: distance to the nearest of them, beside that among themselves.

    python benchmarks/copies.py     # under a minute; prints one line, writes benchmarks/results/copies.json

32 samples of 50 Euler steps, noise from seed 1, as in docs/shipped.png; distances are root mean squares, pixels in [-1, 1].
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ld_checkpoint import SHIPPED, load_weights  # noqa: E402
from ld_data import open_images  # noqa: E402
from ld_play import nearest  # noqa: E402
from ld_utils import from_uint8  # noqa: E402
from liquid_diffusion import RectifiedFlow, model_from  # noqa: E402


def main():
    samples = RectifiedFlow(model_from(*load_weights(SHIPPED)).eval()).sample(32, 32, 50, seed=1)
    with open_images("samples", 32) as cache:
        training = torch.from_numpy(cache.wait().images.copy())  # uint8 [488, 3, 32, 32]
    copied, _ = nearest(samples, training)  # [32, 1]
    among, _ = nearest(from_uint8(training), training, count=2)  # [488, 2], the first is the picture itself
    result = {
        "sample to nearest training picture": [round(copied[:, 0].quantile(q).item(), 3) for q in (0.25, 0.5, 0.75)],
        "mean": round(copied.mean().item(), 3),
        "training picture to nearest other": [round(among[:, 1].quantile(q).item(), 3) for q in (0.25, 0.5, 0.75)],
        "mean of these": round(among[:, 1].mean().item(), 3),
        "samples": len(samples),
        "training pictures": len(training),
    }
    print(result)
    (ROOT / "benchmarks" / "results" / "copies.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
