"""The specification's claims, each put to a test: what notebook 01 finds about the network that ships.

    python benchmarks/claims.py     # a minute; runs notebooks/01_liquid_maths.ipynb, writes benchmarks/results/claims.json

The result is the notebook's own `findings`: claim -> whether it holds, and the figures that say so.
"""

import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ld_checkpoint import code_version  # noqa: E402

NOTEBOOK, RESULT = ROOT / "notebooks" / "01_liquid_maths.ipynb", ROOT / "benchmarks" / "results" / "claims.json"


def findings(notebook):
    """{claim: [yes or no in Markdown, what was found]} of a run of the notebook."""
    nb = nbformat.read(notebook, as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(findings))"))
    NotebookClient(nb, timeout=None, resources={"metadata": {"path": str(notebook.parent)}}).execute()
    return json.loads(nb.cells[-1].outputs[0]["text"])


if __name__ == "__main__":
    found = {claim: dict(holds="yes" in holds, found=text) for claim, (holds, text) in findings(NOTEBOOK).items()}
    RESULT.write_text(json.dumps(dict(findings=found, code=code_version()), indent=1) + "\n")
    for claim, what in found.items():
        print(f"{'yes' if what['holds'] else 'NO ':3}  {claim}: {what['found']}")
