"""The tables of benchmarks/quality.py, from its JSONs.

    python benchmarks/quality_tables.py     # print them, and put them into docs/quality.md

Brackets hold the range over the seeds. A difference counts as one where every seed agrees on its sign and their mean exceeds
their range.
"""

import json
from pathlib import Path
from statistics import mean, median

import long_runs
import quality
from quality import (
    STUDIES,
    best_rate,
    curve,
    ranked_rates,
    records,
    step_seconds,
    steps_in_equal_time,
    steps_while_growing,
)

DOCS, MARKS = Path(__file__).parent.parent / "docs" / "quality.md", ("<!-- tables -->", "<!-- end of tables -->")
DIGITS = dict(mse=4, frechet=1)  # after the point, of the scores
VARIANTS = (*quality.ABLATED, *quality.ABLATED_TOO, "no cell, wider", *quality.BLOCKS, *quality.STARTS)

DENSE_VARIANTS = [("gate 1-2", dict(network=f"{quality.DENSE}, gate 1-2"))]


def seeds_of(known, **wanted):
    """{seed: record} of the runs that have these values."""
    return {r["seed"]: r for r in known.values() if all(r[key] == value for key, value in wanted.items())}


def spread(values, key, sign=""):
    """Mean and range of a score as text."""
    low, middle, high = (f"{f(values):{sign}.{DIGITS[key]}f}" if values else "" for f in (min, mean, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def scores(runs):
    """Both scores of runs as cells; runs of an earlier kind of sampling have the first alone."""
    return [spread([r[key] for r in runs if key in r], key) for key in DIGITS]


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


def rates_shown(known, study, network, recipe="adamw"):
    """The best rate by the loss at seed 0, and the next where it was run with more seeds: one seed may choose badly."""
    first, *others = ranked_rates(known, study, network, recipe)
    wanted = dict(data=study.data, network=network, recipe=recipe)
    steps = (study.steps, steps_in_equal_time(study, network, recipe))
    return [first, *(lr for lr in others[:1] if any(len(seeds_of(known, **wanted, lr=lr, steps=n)) > 1 for n in steps))]


def compared(known, study, networks=quality.MATCHED, recipes=("adamw", "muon", "muon for 3x3 too", "slow start")):
    """(network, recipe, rate, runs in equal steps, steps in equal time, runs in equal time) of what was given a rate of its own."""
    for network in networks:
        for recipe in recipes:
            steps = steps_in_equal_time(study, network, recipe)
            for lr in (
                rates_shown(known, study, network, recipe) if len(curve(known, study, network, recipe)) > 1 else ()
            ):
                here = dict(data=study.data, network=network, recipe=recipe, lr=lr)
                runs = [list(seeds_of(known, **here, steps=n).values()) for n in (study.steps, steps)]
                yield network, recipe, lr, runs[0], steps, runs[1]


def comparison_table(known, study):
    """Every family at its own best rates, at equal steps and in equal time."""
    lines = []
    for network, recipe, lr, equal_steps, steps, equal_time in compared(known, study):
        line = [network, recipe, f"{(equal_steps + equal_time)[0]['parameters']:,}", f"{lr:g}"]
        for n, runs in ((study.steps, equal_steps), (steps, equal_time)):
            line += [f"{n} x {len(runs)}" if runs else "", *scores(runs)]
        lines.append(line)
    head = ["network", "recipe", "parameters", "rate", "equal steps x seeds", "MSE", "Frechet"]
    return rows([*head, "equal time: steps x seeds", "MSE", "Frechet"], lines)


def difference_table(known, study, variants, recipe="adamw", least=1, network="ours"):
    """Each (name, values of its runs) against `network` by this recipe: differences seed by seed, below 0 is better.

    least: of seeds; with fewer a variant is left out.
    """
    if not curve(known, study, network, recipe):
        return ""
    lr = best_rate(known, study, network, recipe)
    whole = dict(data=study.data, network=network, recipe=recipe, lr=lr, steps=study.steps)
    reference, lines = seeds_of(known, **whole), []
    for name, values in variants:
        found = {key: paired(seeds_of(known, **(whole | values)), reference, key) for key in DIGITS}
        if len(found["mse"]) >= least:
            cells = (text for key, d in found.items() for text in (spread(d, key, "+"), verdict(d) if d else ""))
            lines.append([name, str(len(found["mse"])), *cells])
    level = "MSE {}, Frechet {}".format(*scores(list(reference.values())))
    size = f"{study.steps} steps at {study.size} px, rate {lr:g}, {len(reference)} seeds"
    lead = f"{network[0].upper()}{network[1:]} by {recipe} after {size}: {level}."
    head = ["changed", "seeds", "MSE, difference: mean (range)", "", "Frechet, difference: mean (range)", ""]
    return f"{lead}\n\n{rows(head, lines)}" if lines else ""


def liquid_variants(study):
    """(name, values) of the changed networks, at equal steps, and in equal time."""
    for network in VARIANTS:
        yield network, dict(network=network)
    steps = steps_in_equal_time(study, "no cell")
    yield f"no cell, {steps} steps: equal time", dict(network="no cell", steps=steps)


def default_variants(study):
    """(name, values) of the network that users get without its parts, started otherwise, and on growing pictures."""
    for name in (*quality.PARTS, "ours"):
        yield name.replace("ours", "literal start").removeprefix("small start, "), dict(network=name)
    if step_seconds(study.size // 2):
        steps = steps_while_growing(study)
        yield f"growing, {steps} steps: equal time", dict(recipe="growing", steps=steps)


def recipe_variants(known, study):
    """(name, values) of the recipes at their best rates."""
    for recipe in [name for name in quality.RECIPES if name != "adamw"]:
        network = "relaxation spec" if recipe == "plain" else "ours"
        if not seeds_of(known, data=study.data, network=network, recipe=recipe):
            continue
        losses = curve(known, study, network, recipe) or {best_rate(known, study, "ours"): 0}
        values = dict(network=network, recipe=recipe, lr=min(losses, key=losses.get))
        if 1e-4 in losses:
            yield f"{recipe}, rate 0.0001 as specified", values | dict(lr=1e-4)
        yield f"{recipe}, rate {values['lr']:g}", values
        growing = recipe == "growing"
        steps = steps_while_growing(study) if growing else steps_in_equal_time(study, "ours", recipe)
        if steps != study.steps:
            yield f"{recipe}, rate {values['lr']:g}, {steps} steps: equal time", values | dict(steps=steps)


def average_table(known, study):
    """The newest weights against the averaged ones of the same runs."""
    wanted = dict(data=study.data, steps=study.steps, network="ours", recipe="adamw")
    runs = [r for r in known.values() if all(r[key] == value for key, value in wanted.items())]
    differences = [r["mse_newest"] - r["mse"] for r in runs]
    return (
        f"Newest weights minus averaged ones, MSE: {spread(differences, 'mse', '+')}, {len(runs)} runs." if runs else ""
    )


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


def long_table(names=None, recipes=None):
    """The longer runs: distance after each part that was scored, and the loss at the end; what networks and recipes are called."""
    lines, parts = [], [str(n) for n in long_runs.SCORED]
    for r in long_runs.records():
        distances = [f"{r['points'][n]['frechet']:.1f}" if n in r["points"] else "" for n in parts]
        called = [(new or {}).get(r[key], r[key]) for key, new in (("network", names), ("recipe", recipes))]
        scores = [*distances, f"{long_runs.last(r)['mse']:.4f}"]
        lines.append([*called, f"{r['lr']:g}", f"{r['steps']:,}", str(r["seed"]), *scores])
    shares = [f"Frechet at {n}/{long_runs.PARTS}" for n in parts[:-1]]
    table = rows(["network", "recipe", "rate", "steps", "seed", *shares, "at the end", "MSE"], lines)
    held_out = json.loads(long_runs.HELD_OUT.read_text())
    return f"{table}\n\nAs many held-out pictures score {held_out['frechet']:.1f}." if lines else ""


def long_curves():
    """The longer runs as {network, recipe, rate, seed: {CPU minutes: distance}}; minutes by the step times of a quiet machine."""
    step = median(step_seconds(long_runs.STUDY.size)[-1]["ours, adamw"])
    whole = long_runs.STUDY.steps * step / 60
    return {
        f"{r['network']}, {r['recipe']}, {r['lr']:g}, seed {r['seed']}": {
            whole * int(part) / long_runs.PARTS: score["frechet"] for part, score in r["points"].items()
        }
        for r in long_runs.records()
    }


def tables(known):
    """Everything as Markdown."""
    parts = [("Learning rates", rate_table(known)), ("Sampling steps", solver_table())]
    parts.append((f"Longer runs: {long_runs.STUDY.data}, in equal time", long_table()))
    for study, _ in STUDIES.values():
        parts += [
            (f"{study}: families", comparison_table(known, study)),
            *(
                (
                    f"{study}: the liquid part and the block, {recipe}",
                    difference_table(known, study, liquid_variants(study), recipe),
                )
                for recipe in ("adamw", "muon")
            ),
            (
                f"{study}: the network as users get it, and changed",
                difference_table(known, study, default_variants(study), "muon", network=quality.DEFAULT),
            ),
            (
                f"{study}: the cell as the whole block, without its gate",
                difference_table(known, study, DENSE_VARIANTS, "muon for 3x3 too", network=quality.DENSE),
            ),
            (f"{study}: the recipe", difference_table(known, study, recipe_variants(known, study))),
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
