"""The two grids at the head of the README: what `make train` leaves on the built-in pictures.

    python benchmarks/pictures.py          # the default five minutes: docs/samples.png, results/samples.json
    python benchmarks/pictures.py --ship   # half an hour of one thread: docs/shipped.png, and the weights in sample_data/

The first is a statement about five minutes, so run it while the machine does nothing else. Look at what comes out before it is
published.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ld_checkpoint import SHIPPED, code_version, load_checkpoint, save_weights  # noqa: E402
from liquid_diffusion import model_from  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ship", action="store_true", help="a longer run, whose weights come with the project")
    ship = parser.parse_args().ship
    options = ["MINUTES=30"] if ship else []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | dict(LD_RUN_DIR=folder) | (dict(OMP_NUM_THREADS="1") if ship else {})
        subprocess.run(["make", "train", "SOURCE=samples", *options], cwd=ROOT, env=environment, check=True)
        state = load_checkpoint(Path(folder) / "checkpoint.pt")
        shutil.copy(Path(folder) / "samples.png", ROOT / "docs" / ("shipped.png" if ship else "samples.png"))
    settings = {
        key: state["settings"][key]
        for key in ("source", "preset", "image_size", "batch_size", "minutes", "seed", "recipe")
    }
    made = settings | dict(steps=state["counts"]["steps"])
    if ship:
        made["cpu_minutes"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / 60)
        save_weights(model_from(state["config"], state["ema"]), SHIPPED, **made)
    else:
        made |= dict(
            machine=f"{os.cpu_count()} CPU cores, {platform.machine()}", torch=torch.__version__, code=code_version()
        )
        (ROOT / "benchmarks" / "results" / "samples.json").write_text(json.dumps(made, indent=1) + "\n")
    print(made)


if __name__ == "__main__":
    main()
