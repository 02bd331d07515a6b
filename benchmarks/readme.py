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
from quality import STUDIES, best_rate, records
from quality_tables import paired, rates_shown, recipe_variants, rows, seeds_of, verdict

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
            seconds = quality.step_seconds(study.size)
            cost = f"{1 / quality.ratio(seconds['ours'], seconds[network]):.2f}"
            for lr in rates_shown(known, study, network):
                runs = list(
                    seeds_of(known, data=study.data, network=network, recipe="default", lr=lr, steps=steps).values()
                )
                lines.append([title, NAMES[network], f"{lr:g}", cost, f"{steps} × {len(runs)}", *scores(runs)])
    return rows(["set", "network", "rate", "time of a step", "steps in equal time × seeds", "MSE", "Frechet"], lines)


def scores(runs):
    """Both scores of runs as cells; runs of an earlier kind of sampling have the first alone."""
    pairs = ((key, digits, [r[key] for r in runs if key in r]) for key, digits in (("mse", 3), ("frechet", 1)))
    return [spread(values, digits) if values else "" for _, digits, values in pairs]


def liquid():
    """What becomes of the longer runs without the parts that are liquid, seed by seed."""
    known, study = records(), STUDIES["longer"][0]
    here = dict(data=study.data, steps=study.steps, recipe="default", lr=study.parts_rate)
    ours = seeds_of(known, **here, network="ours")
    steps = quality.steps_in_equal_time(study, "no cell")
    variants = {
        "gate fixed at 1/2": dict(network="gate 1-2"),
        "no relaxation": dict(network="relaxation off"),
        "no cell at all": dict(network="no cell"),
        f"no cell at all, {steps} steps: equal time": dict(network="no cell", steps=steps),
    }
    level = " and ".join(f"{name} {value}" for name, value in zip(("MSE", "Frechet"), scores(list(ours.values()))))
    lead = f"Ours after {study.steps} steps at {study.size} px, rate {study.parts_rate:g}: {level}."
    return f"{lead}\n\n{differences(known, ours, here, variants)}"


def recipe_differences():
    """What becomes of ours, in short and in longer runs, when it is trained otherwise."""
    known, parts = records(), []
    for name in ("cats", "longer"):
        study = STUDIES[name][0]
        here = dict(data=study.data, steps=study.steps, network="ours", recipe="default")
        here["lr"] = best_rate(known, study, "ours")
        ours, variants = seeds_of(known, **here), dict(recipe_variants(known, study))
        level = " and ".join(f"{name} {value}" for name, value in zip(("MSE", "Frechet"), scores(list(ours.values()))))
        parts.append(f"Ours after {study.steps} steps at {study.size} px, rate {here['lr']:g}: {level}.")
        parts.append(differences(known, ours, here, variants))
    return "\n\n".join(parts)


def differences(known, ours, here, variants):
    """{name: values of its runs} against ours, seed by seed; runs of one seed alone are left out."""
    lines = []
    for title, values in variants.items():
        runs, cells = seeds_of(known, **(here | values)), [title]
        for key, digits in (("mse", 4), ("frechet", 1)):
            found = paired(runs, ours, key)
            low, middle, high = (f"{f(found):+.{digits}f}" if found else "" for f in (min, mean, max))
            cells += [f"{middle} ({low} to {high})", verdict(found)] if found else ["", ""]
        if len(runs) > 1:
            lines.append([*cells, str(len(runs))])
    return rows(["changed", "MSE minus ours", "", "Frechet minus ours", "", "seeds"], lines)


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


def recipes():
    """The runs of benchmarks/recipe.py."""
    found = [json.loads(path.read_text()) for path in sorted(recipe.RESULTS.glob("*.json"))]
    lines = []
    for variant in recipe.VARIANTS:
        values = [r["mse"] for r in found if r["variant"] == variant]
        if values:
            lines.append([variant, spread(values, 4), str(len(values))])
    return rows(["variant", "velocity MSE on held-out pictures", "seeds"], lines)


PARTS = {
    "families": families,
    "liquid": liquid,
    "training": recipe_differences,
    "few steps": few_steps,
    "recipes": recipes,
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
