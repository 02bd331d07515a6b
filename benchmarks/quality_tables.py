"""The tables of benchmarks/quality.py, from its JSONs.

    python benchmarks/quality_tables.py     # print them, and put them into docs/quality.md

Brackets hold the range over the seeds. A difference counts as one where every seed agrees on its sign and their mean exceeds
their range.
"""

import json
from pathlib import Path
from statistics import mean

import quality
from quality import STUDIES, best_rate, curve, ranked_rates, records, steps_in_equal_time

DOCS, MARKS = Path(__file__).parent.parent / "docs" / "quality.md", ("<!-- tables -->", "<!-- end of tables -->")
FAMILIES = (*quality.COMPARED, "resblocks", "dit-2")
VARIANTS = (*quality.ABLATED, *quality.ABLATED_TOO, *quality.BLOCKS)


def seeds_of(known, **wanted):
    """{seed: record} of the runs that have these values."""
    return {r["seed"]: r for r in known.values() if all(r[key] == value for key, value in wanted.items())}


def spread(values, sign=""):
    """Mean and range as text, to four digits."""
    if not values:
        return "-"
    low, middle, high = (f"{value:{sign}.4g}" for value in (min(values), mean(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def paired(runs, reference, key):
    """Differences to the reference, seed by seed, for the seeds of which both have the score."""
    both = [(run, reference[seed]) for seed, run in sorted(runs.items()) if seed in reference]
    return [run[key] - other[key] for run, other in both if key in run and key in other]


def verdict(differences):
    """In words: better or worse where every seed says so and the mean exceeds the range of the differences, else neither."""
    if len(differences) < 2:
        return "one seed"
    if abs(mean(differences)) <= max(differences) - min(differences) or min(differences) < 0 < max(differences):
        return "within the spread"
    return "better" if mean(differences) < 0 else "worse"


def rows(head, lines):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]) if lines else ""


def rate_table(known):
    """Velocity MSE at every rate tried, seed 0; the best in bold."""
    curves = {}
    for study, _ in STUDIES.values():
        wanted = dict(data=study.data, steps=study.steps)
        here = {
            (r["network"], r["recipe"]) for r in known.values() if all(r[k] == value for k, value in wanted.items())
        }
        curves |= {(study, *key): curve(known, study, *key) for key in sorted(here)}
    curves = {key: losses for key, losses in curves.items() if len(losses) > 2}
    rates = sorted({lr for losses in curves.values() for lr in losses})
    lines = []
    for key, losses in curves.items():
        cells = [f"{losses[lr]:.4f}" if lr in losses else "" for lr in rates]
        cells[rates.index(best_rate(known, *key))] = f"**{min(losses.values()):.4f}**"
        lines.append([", ".join(map(str, key)), *cells])
    return rows(["study, network, recipe", *(f"{lr:g}" for lr in rates)], lines)


def rates_shown(known, study, network):
    """The best rate by the loss at seed 0, and the next where it was run with more seeds: one seed may choose badly."""
    first, second = ranked_rates(known, study, network)[:2]
    wanted = dict(data=study.data, network=network, recipe="default", lr=second)
    steps = (study.steps, steps_in_equal_time(study, network))
    return [first, second][: 1 + (max(len(seeds_of(known, **wanted, steps=n)) for n in steps) > 1)]


def comparison_table(known, study, networks=FAMILIES):
    """Every family at its own best rates, at equal steps and in equal time."""
    lines = []
    for network in networks:
        if len(curve(known, study, network)) < 2:
            continue
        steps = steps_in_equal_time(study, network)
        for lr in rates_shown(known, study, network):
            here = dict(data=study.data, network=network, recipe="default", lr=lr)
            equal_steps, equal_time = (list(seeds_of(known, **here, steps=n).values()) for n in (study.steps, steps))
            line = [network, f"{(equal_steps + equal_time)[0]['parameters']:,}", f"{lr:g}"]
            for n, runs in ((study.steps, equal_steps), (steps, equal_time)):
                line += [f"{n} x {len(runs)}"]
                line += [spread([r[key] for r in runs if key in r]) for key in ("mse", "frechet")]
            lines.append(line)
    head = ["network", "parameters", "rate", "equal steps x seeds", "MSE", "Frechet"]
    return rows([*head, "equal time: steps x seeds", "MSE", "Frechet"], lines)


def difference_table(known, study, variants, lr=None):
    """Each (name, values of its runs) against ours by the default recipe: differences seed by seed, below 0 is better.

    lr: the rate of those that name none; ours' best if None.
    """
    if not curve(known, study, "ours"):
        return ""
    lr = lr or best_rate(known, study, "ours")
    ours = dict(data=study.data, network="ours", recipe="default", lr=lr, steps=study.steps)
    reference, lines = seeds_of(known, **ours), []
    for name, values in variants:
        runs = seeds_of(known, **(ours | values))
        if runs:
            losses, distances = (paired(runs, reference, key) for key in ("mse", "frechet"))
            line = [name, str(len(losses)), spread(losses, "+"), verdict(losses), spread(distances, "+")]
            lines.append([*line, verdict(distances) if distances else ""])
    head = ["variant", "seeds", "MSE minus ours, mean (range)", "", "Frechet minus ours, mean (range)", ""]
    level = f"rate {lr:g}, " + ", ".join(
        f"{key} {spread([r[key] for r in reference.values() if key in r])}" for key in ("mse", "frechet")
    )
    return f"Ours: {level}, {len(reference)} seeds.\n\n" + rows(head, lines) if lines else ""


def liquid_variants(known, study):
    """(name, values) of the changed networks, at equal steps, and without the cell in equal time."""
    for network in VARIANTS:
        yield network, dict(network=network)
        steps = steps_in_equal_time(study, network)
        yield f"{network}, {steps} steps: equal time", dict(network=network, steps=steps)


def recipe_variants(known, study):
    """(name, values) of the recipes, those with a rate of their own at their best one."""
    for recipe in quality.RECIPES:
        values = dict(recipe=recipe)
        if recipe == "plain":
            yield "plain: the literal specification, 1e-4", values | dict(network="relaxation spec", lr=1e-4)
            if len(curve(known, study, "relaxation spec", recipe)) < 4:  # that one alone: no best rate yet
                continue
            rate = best_rate(known, study, "relaxation spec", recipe)
            yield f"plain, at its best rate, {rate:g}", values | dict(network="relaxation spec", lr=rate)
        elif recipe == "growing":
            for steps in sorted({r["steps"] for r in seeds_of(known, data=study.data, recipe=recipe).values()}):
                yield f"growing, {steps} steps: equal time", values | dict(steps=steps)
        elif recipe != "default":
            losses = curve(known, study, "ours", recipe)
            values |= dict(lr=min(losses, key=losses.get)) if losses else {}
            yield recipe, values
            others = {
                r["steps"]
                for r in known.values()
                if recipe == "muon" and (r["data"], r["recipe"]) == (study.data, recipe)
            }
            for steps in sorted(n for n in others if study.steps / 2 < n < study.steps):
                yield f"{recipe}, {steps} steps: equal time", values | dict(steps=steps)


def unet_table(known, study):
    """The U-Net by other recipes, each at its best rate, against the U-Net by the default one."""
    if not curve(known, study, "unet"):
        return ""
    here = dict(data=study.data, network="unet", steps=study.steps)
    usual = seeds_of(known, **here, recipe="default", lr=best_rate(known, study, "unet"))
    lines = []
    for recipe in ("slow start", "muon for 3x3 too"):
        losses = curve(known, study, "unet", recipe)
        if losses:
            runs = seeds_of(known, **here, recipe=recipe, lr=min(losses, key=losses.get))
            cells = [recipe, f"{min(losses, key=losses.get):g}", str(len(runs))]
            for key in ("mse", "frechet"):
                cells += [spread([r[key] for r in runs.values() if key in r]), spread(paired(runs, usual, key), "+")]
            lines.append(cells)
    return rows(["recipe", "rate", "seeds", "MSE", "minus its default", "Frechet", "minus its default"], lines)


def average_table(known, study):
    """The newest weights against the averaged ones of the same runs."""
    wanted = dict(data=study.data, steps=study.steps, network="ours", recipe="default")
    runs = [r for r in known.values() if all(r[key] == value for key, value in wanted.items())]
    differences = [r["mse_newest"] - r["mse"] for r in runs]
    return f"Newest weights minus averaged ones, MSE: {spread(differences, '+')}, {len(runs)} runs." if runs else ""


def solver_table():
    """Frechet distance against the number of steps, Euler's and Heun's, for each network that was scored so."""
    lines, counts = [], quality.COUNTS
    for path in sorted((quality.RESULTS / "sampling-steps").glob("*.json")):
        study = json.loads(path.read_text())
        for solver in ("euler", "heun"):
            scores = [study["scores"].get(f"{solver} {n}", {}).get("frechet") for n in counts]
            cells = ["" if score is None else f"{score:.3g}" for score in scores]
            lines.append([f"rate {study['lr']:g}, MSE {study['mse']:.4f}", solver, *cells])
    if not lines:
        return ""
    note = f"{study['data']}, {study['steps']} training steps, seed {study['seed']}; as many held-out pictures score "
    table = rows(["network", "Frechet at steps", *map(str, counts)], lines)
    return f"{note}{study['held_out']['frechet']:.3g}.\n\n{table}"


def tables(known):
    """Everything as Markdown."""
    parts = [("Learning rates", rate_table(known)), ("Sampling steps", solver_table())]
    for study, _ in STUDIES.values():
        variants, recipes = (list(make(known, study)) for make in (liquid_variants, recipe_variants))
        parts += [
            (f"{study}: families", comparison_table(known, study)),
            (f"{study}: the liquid part and the block", difference_table(known, study, variants, study.parts_rate)),
            (f"{study}: the recipe", difference_table(known, study, recipes)),
            (f"{study}: the recipe, with the U-Net without attention", unet_table(known, study)),
            (f"{study}: averaged weights", average_table(known, study)),
        ]
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts if text)


def publish(text):
    """Print the tables, and put them between the two marks of docs/quality.md."""
    print(text)
    before, _, after = DOCS.read_text().partition(MARKS[0])
    DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    publish(tables(records()))
