"""Puts the project's folder on the path, here and in the kernels that notebooks are run in, and gives each one thread.

Threads of small tensors wait for one another: on a busy machine two of them took several times as long as one.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
