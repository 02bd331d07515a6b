"""Execute a notebook headless into a run folder, saying what it does: `python run_notebook.py NOTEBOOK`.

The folder is LD_RUN_DIR, or runs/<time>; the executed notebook, samples.png, loss.png and checkpoint.pt are left there.
"""

from __future__ import annotations

import html
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class Narrator(NotebookClient):
    """Prints each section's heading when it is reached, what the cells write, and every ten seconds where the bar stands."""

    last_bar = 0.0

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream":
            print(content["text"], end="", flush=True)
        elif msg["msg_type"] == "comm_msg":
            self.print_bar(content["data"].get("state", {}).get("value"))
        return super().process_message(msg, cell, cell_index)

    def print_bar(self, value):
        """tqdm's notebook bar is a widget; the text at its right end is HTML and holds a count or a rate, so a slash."""
        if isinstance(value, str) and time.monotonic() - self.last_bar > 10:
            text = html.unescape(re.sub(r"<[^>]*>", "", value)).strip()
            if "/" in text:
                print(f"  {text}", flush=True)
                self.last_bar = time.monotonic()

    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("## "):
                    print(f"\n{line.removeprefix('## ')}", flush=True)
        return await super().async_execute_cell(cell, cell_index, **options)


def run(notebook, folder):
    """Execute `notebook` in its own folder, write it to `folder` even if a cell fails, and return the failure or None."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LD_RUN_DIR"] = str(folder.resolve())
    nb = nbformat.read(notebook, as_version=4)
    client = Narrator(nb, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}})
    try:
        client.execute()
    except CellExecutionError as error:
        return error
    finally:
        nbformat.write(nb, folder / notebook.name)
    return None


def main(notebook):
    notebook = Path(notebook)
    folder = Path(os.environ.get("LD_RUN_DIR") or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    failure = run(notebook, folder)
    print(f"\nIn {folder}:")
    for path in sorted(folder.iterdir()):
        if path.is_file():
            print(f"  {path}  ({path.stat().st_size / 1024:,.0f} KiB)")
    if failure:
        print(f"\nThe notebook stopped at an error:\n{failure.ename}: {failure.evalue}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
