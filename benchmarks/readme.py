"""The README's figures on quality, from the JSONs that the benchmarks left.

    python benchmarks/readme.py     # writes the tables and sentences between the marks of README.md; `make tables` runs it too

A part of the README between `<!-- figures: NAME -->` and `<!-- end -->` is what PARTS[NAME]() returns.
"""

import json
import re
from pathlib import Path

import quality
from quality import STUDIES, records
from quality_tables import compared, difference_table, liquid_variants, recipe_variants, rows, scores

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
NAMES = {"ours": "**ours**", "unet": "UNet2DModel", "unet-attention": "UNet2DModel with attention"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW", "muon for 3x3 too": "Muon and AdamW"}


def families():
    """Ours and the U-Nets, on both sets, in equal time."""
    known, lines = records(), []
    for name, title in (("larger", "cats, 32 px"), ("fashion", "Fashion-MNIST, 16 px")):
        study = STUDIES[name][0]
        for network, recipe, lr, _, steps, runs in compared(known, study, quality.COMPARED, OPTIMIZERS):
            line = [title, NAMES[network], OPTIMIZERS[recipe], f"{lr:g}", f"{steps} × {len(runs)}", *scores(runs)]
            lines += [line] if runs else []
    return rows(["set", "network", "optimizer", "rate", "steps in equal time × seeds", "MSE", "Frechet"], lines)


def liquid():
    """What becomes of the longer and of the larger runs without the parts that are liquid, seed by seed."""
    known, parts = records(), []
    for name in ("longer", "larger"):
        study = STUDIES[name][0]
        shown = (v for v in liquid_variants(study) if v[0].startswith(("gate 1-2", "relaxation", "no cell")))
        parts.append(difference_table(known, study, shown, "muon", least=2))
    return "\n\n".join(parts)


def recipe_differences():
    """What becomes of ours, in short, longer and larger runs, when it is trained otherwise."""
    known, studies = records(), [STUDIES[name][0] for name in ("cats", "longer", "larger")]
    return "\n\n".join(difference_table(known, study, recipe_variants(known, study), least=2) for study in studies)


def few_steps():
    """Frechet distance by the number of steps, before and after a reflow; Euler's unless it says otherwise."""
    result = json.loads((RESULTS / "few_steps.json").read_text())
    names = {
        "before": "as it is",
        "heun": "as it is, Heun's steps (two evaluations each)",
        "plain": "after plain reflow",
    }
    names["improved"] = "after reflow by [arXiv 2405.20320](https://arxiv.org/abs/2405.20320)"
    counts = {name: result["models"][name]["counts"] for name in names}
    lines = [[names[name], *(f"{score['frechet']:.0f}" for score in counts[name].values())] for name in names]
    return rows(["steps", *counts["before"]], lines)


PARTS = {
    "families": families,
    "liquid": liquid,
    "training": recipe_differences,
    "few steps": few_steps,
}


def filled(text):
    """The README's text with every part made anew. ValueError for a mark that no part belongs to."""

    def part(match):
        if match[1] not in PARTS:
            raise ValueError(f"README.md asks for figures {match[1]!r}; choose one of {', '.join(PARTS)}.")
        return f"<!-- figures: {match[1]} -->\n\n{PARTS[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- figures: ([\w ]+) -->.*?<!-- end -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
