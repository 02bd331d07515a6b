"""The README's figures on quality, from the JSONs that the benchmarks left.

    python benchmarks/readme.py     # writes the tables and sentences between the marks of README.md; `make tables` runs it too

A part of the README between `<!-- figures: NAME -->` and `<!-- end -->` is what PARTS[NAME]() returns.
"""

import json
import re
from pathlib import Path
from statistics import mean

import quality
import recipe
from quality import STUDIES, records
from quality_tables import paired, rates_shown, rows, seeds_of, verdict

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
NAMES = {"ours": "**ours**", "unet": "UNet2DModel", "unet-attention": "UNet2DModel with attention"}


def spread(values, digits):
    """Mean and range, with this number of digits after the point."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def families():
    """Ours and the U-Nets, on both sets, in equal time."""
    known, lines = records(), []
    for name, title in (("larger", "cats, 32 px"), ("fashion", "Fashion-MNIST, 16 px")):
        study = STUDIES[name][0]
        for network in quality.COMPARED:
            steps = quality.steps_in_equal_time(study, network)
            for lr in rates_shown(known, study, network):
                runs = list(
                    seeds_of(known, data=study.data, network=network, recipe="default", lr=lr, steps=steps).values()
                )
                lines.append([title, NAMES[network], f"{lr:g}", f"{steps} × {len(runs)}", *scores(runs)])
    return rows(["set", "network", "rate", "steps in equal time × seeds", "MSE", "Frechet"], lines)


def scores(runs):
    """Both scores of runs as cells; runs of an earlier kind of sampling have the first alone."""
    pairs = ((key, digits, [r[key] for r in runs if key in r]) for key, digits in (("mse", 3), ("frechet", 1)))
    return [spread(values, digits) if values else "" for _, digits, values in pairs]


def liquid():
    """What becomes of the longer runs without the parts that are liquid, seed by seed."""
    known, study = records(), STUDIES["longer"][0]
    here = dict(data=study.data, steps=study.steps, recipe="default", lr=study.parts_rate)
    ours, lines = seeds_of(known, **here, network="ours"), []
    titles = {"gate 1-2": "gate fixed at 1/2", "relaxation off": "no relaxation", "no cell": "no cell at all"}
    for network, title in titles.items():
        runs, cells = seeds_of(known, **here, network=network), [title]
        for key, digits in (("mse", 4), ("frechet", 1)):
            found = paired(runs, ours, key)
            if found:
                low, middle, high = (f"{value:+.{digits}f}" for value in (min(found), mean(found), max(found)))
                cells += [f"{middle} ({low} to {high})", verdict(found)]
        if runs:
            lines.append([*cells, str(len(runs))])
    level = " and ".join(f"{name} {value}" for name, value in zip(("MSE", "Frechet"), scores(list(ours.values()))))
    table = rows(["changed", "MSE minus ours", "", "Frechet minus ours", "", "seeds"], lines)
    return f"Ours after {study.steps} steps at {study.size} px, rate {study.parts_rate:g}: {level}.\n\n{table}"


def few_steps():
    """Frechet distance by the number of Euler steps, before and after a reflow."""
    result = json.loads((RESULTS / "few_steps.json").read_text())
    names = {"before": "as it is", "plain": "after plain reflow"}
    names["improved"] = "after reflow by [arXiv 2405.20320](https://arxiv.org/abs/2405.20320)"
    counts = {name: result["models"][name]["counts"] for name in names}
    lines = [[names[name], *(f"{score['frechet']:.0f}" for score in counts[name].values())] for name in names]
    return rows(["Euler steps", *counts["before"]], lines)


def recipes():
    """The runs of benchmarks/recipe.py."""
    found = [json.loads(path.read_text()) for path in sorted(recipe.RESULTS.glob("*.json"))]
    lines = []
    for variant in recipe.VARIANTS:
        values = [r["mse"] for r in found if r["variant"] == variant]
        if values:
            lines.append([variant, spread(values, 4), str(len(values))])
    return rows(["variant", "velocity MSE on held-out pictures", "seeds"], lines)


PARTS = {"families": families, "liquid": liquid, "few steps": few_steps, "recipes": recipes}


def filled(text):
    """The README's text with every part made anew. ValueError for a mark that no part belongs to."""

    def part(match):
        if match[1] not in PARTS:
            raise ValueError(f"README.md asks for figures {match[1]!r}; choose one of {', '.join(PARTS)}.")
        return f"<!-- figures: {match[1]} -->\n\n{PARTS[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- figures: ([\w ]+) -->.*?<!-- end -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
