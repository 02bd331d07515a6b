"""The README's figures, from the JSONs that the benchmarks left.

    python benchmarks/readme.py     # writes what stands between the marks of README.md; `make tables` runs it too

A part of the README between `<!-- figures: NAME -->` and `<!-- end -->` is what PARTS[NAME]() returns.
"""

import json
import re
from pathlib import Path
from statistics import mean, median, quantiles

import quality
import torch
from quality import STUDIES, curve, records, step_share
from quality_tables import (
    DENSE_VARIANTS,
    compared,
    default_variants,
    difference_table,
    long_table,
    recipe_variants,
    rows,
    scores,
    seeds_of,
)
from reliability import markdown

import liquid_diffusion as ld
from ld_checkpoint import SHIPPED, open_weights

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
NAMES = {
    quality.DEFAULT: "**ours**",
    "relaxation spec": 'ours, `recipe="plain"` but for its rate',
    "unet": "UNet2DModel",
    "unet-attention": "UNet2DModel with attention",
    "dit-2": "DiT of patch 2",
    "resblocks": "our U-Net of plain residual blocks",
    quality.DENSE: '**ours, `recipe="dense"`**',
}
OPTIMIZERS = {"adamw": "AdamW", "plain": "AdamW", "muon": "Muon", "muon for 3x3 too": "Muon"}
SHOWN = {
    "larger": "cats, 32 px",
    "larger fashion": "Fashion-MNIST, 32 px",
    "cats": "cats, 16 px",
    "fashion": "Fashion-MNIST, 16 px",
}
USES = dict(nano="CPUs, tests", tiny="a free T4", small="16 GB", base="24 GB", large="24 GB and up")


def stored(name):
    """What a benchmark left in results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


# ---- what it is -----------------------------------------------------------------------------------------------------


def shipped():
    """How the network that ships was made, and whether it copies."""
    config, _, metadata = open_weights(SHIPPED)
    found = stored("copies")
    (low, _, high), (low_other, _, high_other) = (
        found[f"{what} to nearest {other}"]
        for what, other in (("sample", "training picture"), ("training picture", "other"))
    )
    return (
        f"*{found['samples']} samples of the network that comes with the project (`sample_data/{SHIPPED.name}`): {metadata['preset']}, "
        f"{parameters(metadata['preset']):,} parameters, {metadata['image_size']} px, {int(metadata['steps']):,} steps of "
        f"{metadata['batch_size']} pictures, {metadata['cpu_minutes']} minutes of one CPU core; 50 Euler steps, noise from one seed, "
        f"none chosen. The mean distance to the nearest of the {found['training pictures']} training pictures is {found['mean']:.2f} (quartiles "
        f"{low:.2f} to {high:.2f}), that of a training picture to its nearest other {found['mean of these']:.2f} ({low_other:.2f} to "
        f"{high_other:.2f}; root mean square, pixels in [−1, 1]; `python benchmarks/copies.py`).*"
    )


def samples():
    """What the README's first line left."""
    made = stored("samples")
    return (
        f"*What the first line left after {made['minutes']:g} minutes of {made['machine']}, {made['steps']:,} steps "
        "(`python benchmarks/pictures.py`).*"
    )


def parameters(preset, recipe="measured"):
    """Number of weights of a preset, counted without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in ld.liquid_diffusion(preset, recipe).parameters())


def presets():
    """Every preset with its number of parameters."""
    lines = []
    for name, options in ld.PRESETS.items():
        sizes = (", ".join(map(str, options[key])) for key in ("channels", "blocks"))
        counts = (f"{parameters(name, recipe):,}" for recipe in ("measured", "dense"))
        lines.append([name, *sizes, *counts, USES[name]])
    return rows(["preset", "channels", "blocks", "parameters", '`recipe="dense"`', "meant for"], lines)


# ---- what is true of it ---------------------------------------------------------------------------------------------

# The claim; notebook 01's name for it; the answer, which that notebook must agree with; what is to be added.
CLAIMS = (
    (
        "The cell is CfC",
        "ParallelCfC is the CfC cell: a special case, whose shift sees the time alone",
        "Yes, with 1×1 kernels and tanh heads",
        "A special case: here the shift depends on the time alone",
    ),
    (
        "It solves the LTC equation in closed form",
        "CfC solves the LTC equation analytically",
        "No",
        "The second is the one that the form is derived from; the cell is a learned mixture in that form",
    ),
    ("It needs no ODE solver", "CfC needs no ODE solver", "Yes, the cell; sampling does", ""),
    (
        "Near t = 0 the gate is near 0.5",
        "Near t = 0 the gate is near 1/2",
        "No",
        "It would need a and b to vanish there",
    ),
    ("Near t = 1 the gate saturates", "Near t = 1 the gate saturates", "No", ""),
    (
        "Each region has its own response",
        "The gate depends on the input: each region has its own response",
        "Yes",
        "It does not help, though: see below",
    ),
    (
        "At t = 1, α ≈ 0",
        "When t is large, alpha is near 0: the network relies on the cell",
        "No",
        "It starts at 0.5 (ρ = 0), and its mean stays there",
    ),
    (
        "At t = 0 the input is preserved",
        "At t = 0 the input is preserved: alpha is 1, and more than meant, the cell neither acts nor learns there",
        "Yes, and more than meant: the cell has no say there and learns nothing",
        "The literal formula with its outer residual adds a normalised copy of the input",
    ),
)


def claims():
    """The specification's claims and what the network that ships says to them."""
    found, lines = stored("claims")["findings"], []
    for claim, name, answer, more in CLAIMS:
        if found[name]["holds"] != answer.startswith("Yes"):
            raise ValueError(f"README says {answer!r} of {name!r}, and results/claims.json does not; correct CLAIMS.")
        lines.append([claim, f"{answer}: {found[name]['found']}.{f' {more}.' if more else ''}"])
    return rows(["claim", "answer"], lines)


# ---- quality --------------------------------------------------------------------------------------------------------


def best_in_equal_time(known, study, network):
    """Runs of a network by whichever optimizer and rate gives the lowest mean distance in equal time; [] if there are none."""
    if network == "relaxation spec":
        wanted = dict(data=study.data, network=network, recipe="plain", steps=study.steps)
        rates = curve(known, study, network, "plain")
        found = [list(seeds_of(known, **wanted, lr=lr).values()) for lr in rates]
    else:
        found = [runs for *_, runs in compared(known, study, [network], OPTIMIZERS)]
    found = [[r for r in runs if "frechet" in r] for runs in found]
    return min((runs for runs in found if len(runs) > 1), key=lambda runs: mean(r["frechet"] for r in runs), default=[])


def equal_time():
    """Ours and each other network in equal time, all at their best, and what share of their distance ours is above or below."""
    known, lines = records(), []
    for name, title in SHOWN.items():
        study = STUDIES[name][0]
        ours = best_in_equal_time(known, study, quality.DEFAULT)
        for network in (
            quality.DEFAULT,
            "relaxation spec",
            "unet",
            "unet-attention",
            "dit-2",
            "resblocks",
            quality.DENSE,
        ):
            runs = best_in_equal_time(known, study, network)
            if runs:
                how = f"{OPTIMIZERS[runs[0]['recipe']]}, {runs[0]['lr']:g}"
                line = [title, NAMES[network], how, f"{runs[0]['steps']} × {len(runs)}", *scores(runs)]
                lines.append([*line, "" if network == quality.DEFAULT else against(ours, runs)])
    return rows(["set", "network", "optimizer, rate", "steps × seeds", "MSE", "Frechet", "ours against it"], lines)


def against(ours, theirs):
    """How far the mean distance of ours lies above or below theirs, and whether the ranges over the seeds overlap."""
    share = mean(r["frechet"] for r in ours) / mean(r["frechet"] for r in theirs) - 1
    low, high = (sorted(f(r["frechet"] for r in runs) for f in (min, max)) for runs in (ours, theirs))
    return f"{share:+.0%}, {'apart' if low[1] < high[0] or high[1] < low[0] else 'ranges overlap'}"


def longer():
    """The longer runs."""
    return long_table(NAMES, OPTIMIZERS)


def liquid():
    """What becomes of the network that users get, and of the cell as a block of its own, without what is liquid in them."""
    known, study = records(), STUDIES["larger"][0]
    shown = [v for v in default_variants(study) if v[1].get("network") in quality.LIQUID]
    whole = difference_table(known, study, shown, "muon", least=2, network=quality.DEFAULT)
    return whole + "\n\n" + difference_table(known, study, DENSE_VARIANTS, "muon for 3x3 too", network=quality.DENSE)


def recipe_differences():
    """What becomes of ours in the larger runs when it is trained otherwise: the default, and what it was before Muon."""
    known, study = records(), STUDIES["larger"][0]
    shown = [v for v in default_variants(study) if v[1].get("network") not in quality.LIQUID]
    default = difference_table(known, study, shown, "muon", least=2, network=quality.DEFAULT)
    return default + "\n\n" + difference_table(known, study, recipe_variants(known, study), least=2)


def few_steps():
    """Frechet distance by the number of steps, before and after a reflow; Euler's unless it says otherwise."""
    result = stored("few_steps")
    names = {
        "before": "as it is",
        "heun": "as it is, Heun's steps (two evaluations each)",
        "plain": "after plain reflow",
    }
    names["improved"] = "after reflow by [arXiv 2405.20320](https://arxiv.org/abs/2405.20320)"
    names["improved, heun"] = "the same, Heun's steps"
    models = result["models"]
    lines = [
        [
            names[name],
            *(f"{score['frechet']:.0f}" for score in models[name]["counts"].values()),
            f"{models[name]['S']:.3f}",
        ]
        for name in names
        if name in models
    ]
    low, high = result["chance"]["frechet"]
    how = (
        f"Reflow by Muon on {result['pairs']:,} pairs of {result['pair_steps']} Heun steps, {result['steps']:,} training steps of {result['batch']}; {result['pictures']} pictures, one seed. "
        f"As many training pictures drawn at random score {low:.0f} to {high:.0f}. S is how far paths are from straight."
    )
    return f"{how}\n\n{rows(['steps', *models['before']['counts'], 'S'], lines)}"


def muon_cost():
    """What Muon adds to a step of ours."""
    more = {size: step_share(size, "ours", "muon") - 1 for size in (16, 32)}
    return (
        f"A step with Muon takes {more[32]:.0%} longer at 32 px and {more[16]:.0%} at 16 px (`nano`, one CPU thread)."
    )


# ---- data, faults, speed --------------------------------------------------------------------------------------------


def data():
    """Throughput of the cache."""
    result = stored("data")
    lines = []
    for figure in result["figures"]:
        if figure["goal"]:
            low, middle, high = (
                f"{figure[key]:,.{0 if figure['median'] > 100 else 2}f}" for key in ("low", "median", "high")
            )
            values = f"{middle} {figure['unit']}" + (f" ({low} to {high})" if figure["n"] > 1 else "")
            goal = figure["goal"] + ("" if figure["reached"] else ": not reached")
            lines.append([figure["figure"], values, str(figure["n"]), goal])
    head = f"Ratios interleaved in one run, {result['machine']['cpus']} shared CPU cores (load {result['machine']['load']:.1f})."
    return f"{head}\n\n{rows(['figure', 'median (range)', 'n', 'goal'], lines)}"


def faults():
    """What a run survives, and what that costs."""
    return markdown(stored("reliability")).rpartition("\n\n")[0]


SPEED = {
    "plain": "plain formulas",
    "lean": "**ours**",
    "checkpointing": "ours, checkpointing",
    "compiled": "ours, torch.compile per block",
    "unet-attention": "UNet2DModel with attention",
    "unet": "UNet2DModel without",
    "dit-2": "DiT patch 2",
    "dit-4": "DiT patch 4",
}
# what is aimed at; the step, the network and the one it is compared with; the least ratio
SPEED_GOALS = (
    ("ours trains faster than the plain formulas", "train", "lean", "plain", 2.0),
    ("compiled, the same", "train", "compiled", "plain", 2.3),
    ("ours trains faster than the U-Net with attention", "train", "lean", "unet-attention", 1.8),
    ("than the one without", "train", "lean", "unet", 1.0),
    ("ours samples faster than the U-Net with attention", "sample", "lean", "unet-attention", 2.5),
    ("checkpointing costs at most a fifth of the speed", "train", "checkpointing", "lean", 0.8),
)
MEMORY_GOALS = (
    ("MiB kept, float32", "lean", "kept MiB", 80),
    ("MiB kept, half", "lean", "kept MiB, half", 45),
    ("MiB kept, half, checkpointing", "checkpointing", "kept MiB, half", 20),
)


def faster(result, step, name, other):
    """How many times as fast as `other`: median and quartiles over the rounds, as text, and the median."""
    ratios = [r[step][other] / r[step][name] for r in result["rounds"]]
    low, _, high = quantiles(ratios, n=4)
    middle = median(ratios)
    return (f"{middle:.2f} ({low:.2f} to {high:.2f})" if name != other else "1.00"), middle


def speeds():
    """Operations, kept bytes and speed of tiny and of others of its size, at 64 and at 128 px; and the goals."""
    parts = []
    for key, result in stored("speed").items():
        networks, lines = result["networks"], []
        for name, title in SPEED.items():
            if name in networks:
                n = networks[name]
                kept = f"{n['kept MiB']:.3g} / {n['kept MiB, half']:.3g}"
                ratios = [faster(result, "train", name, other)[0] for other in ("plain", "unet-attention", "unet")]
                sampling = faster(result, "sample", name, "unet-attention")[0]
                size = f"{title}, {n['parameters'] / 1e6:.2f}M"
                lines.append([size, f"{n['GMAC']:.2f}", kept, *ratios, sampling])
        loads = [r["load"] for r in result["rounds"]]
        how = f"{key}, {len(result['rounds'])} rounds, load {min(loads):.1f} to {max(loads):.1f}, {result['machine']}:"
        head = ["network", "GMAC", "kept for backward, MiB a picture, float32 / half", "train against plain"]
        head += ["against U-Net with attention", "against U-Net without", "sampling against U-Net with attention"]
        parts.append(f"{how}\n\n{rows(head, lines)}")
    result, lines = next(iter(stored("speed").values())), []
    for title, step, name, other, goal in SPEED_GOALS:
        text, middle = faster(result, step, name, other)
        lines.append([title, f"at least {goal:g}", text, "yes" if middle >= goal else "no"])
    for title, name, key, goal in MEMORY_GOALS:
        value = result["networks"][name][key]
        lines.append([title, f"at most {goal}", f"{value:.3g}", "yes" if value <= goal else "no"])
    return "\n\n".join([*parts, "Goals, at 64 px:", rows(["goal", "", "measured", "reached"], lines)])


PARTS = {
    "shipped": shipped,
    "samples": samples,
    "presets": presets,
    "claims": claims,
    "equal time": equal_time,
    "longer": longer,
    "liquid": liquid,
    "training": recipe_differences,
    "few steps": few_steps,
    "muon": muon_cost,
    "data": data,
    "faults": faults,
    "speed": speeds,
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
