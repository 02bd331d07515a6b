"""How good are the pictures, and does the liquid part help: many short runs at tuned rates, one JSON each, resumable.

    python benchmarks/quality.py --root FOLDER [--hours 1]     # the queue: killed and started again it goes on
    python benchmarks/quality.py --root FOLDER --solvers       # quality against the number of sampling steps
    python benchmarks/quality.py --table                       # print the tables and put them into docs/quality.md

FOLDER holds the sets named in SETS. Every network has about 0.9M parameters and its own learning rate: four rates at seed 0, more
by factors of two until the best is not at an end, then seeds 1 and 2 at the best. "Equal time" repeats that rate with as many
steps as our network's time allows; the step times are measured first, in rounds that run every network once, as CPU seconds
of one thread, and kept in step-times.json. Scores are those of the averaged weights: velocity MSE on the last tenth of the
pictures (256 of them, five times), and the Frechet distance by `ld_eval.RandomFeatures` between 320 samples of 10 Euler steps
and the training pictures.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from networks import small_networks
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import ld_eval  # noqa: E402
from ld_data import open_images, to_model_range  # noqa: E402
from ld_utils import to_uint8  # noqa: E402
from liquid_diffusion import RectifiedFlowTrainer, WeightUpdate  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "quality"
DOCS, MARKS = Path(__file__).parent.parent / "docs" / "quality.md", ("<!-- tables -->", "<!-- end of tables -->")
SETS = {"cats": "afhq-cat-128", "fashion": "fashion-mnist"}  # name here -> folder below --root
SIZE, BATCH, STEPS, SEEDS, PICTURES = 16, 32, 150, (0, 1, 2), 5153
RATES = {"dit-2": (1e-3, 2e-3, 4e-3, 8e-3)}  # where the search begins; by fan-in unless the recipe says otherwise
RATES_ELSE = (4e-3, 8e-3, 16e-3, 32e-3)
COMPARED = ("ours", "unet", "unet-attention")
ABLATED = ("gate 1-2", "relaxation off", "gate of the time", "no cell")
ABLATED_TOO = (
    "gate of the picture",
    "one head, no gate",
    "relaxation spec",
    "relaxation only",
    "rho from 3",
    "rho spread, -3 to 3",
    "shift of picture and time",
    "h + gate g",
)


# ---- one run --------------------------------------------------------------------------------------------------------


class MuonAndAdamW:
    """torch's Muon for the 1x1 kernels, as matrices, and AdamW for all else, behind the face of one optimizer."""

    def __init__(self, model, lr, adamw):
        kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[2:] == (1, 1) and p.shape[1] > 1]
        self.kernels = [(p, nn.Parameter(p.data.view(p.shape[:2]))) for p in kernels]  # the same memory, [C_out, C_in]
        matrices = [matrix for _, matrix in self.kernels]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        muons = {id(p) for p in kernels}
        for group in adamw.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in muons]
        self.adamw, self.param_groups = adamw, [*adamw.param_groups, *self.muon.param_groups]

    def step(self):
        for kernel, matrix in self.kernels:
            matrix.grad = kernel.grad.view_as(matrix)
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none=True):
        self.adamw.zero_grad(set_to_none)
        for kernel, _ in self.kernels:
            kernel.grad = None


def with_muon(trainer, lr):
    """Let Muon, at rate lr, take the 1x1 kernels from the trainer's AdamW."""
    update = trainer.update
    update.optimizer = MuonAndAdamW(trainer.model, lr, update.optimizer)
    update.peak_lrs = [*update.peak_lrs, *[lr] * len(update.optimizer.muon.param_groups)]


class SlowStart(WeightUpdate):
    """Warms the rate up over warmup_steps however short the run is, and not over a twentieth of it at most."""

    @property
    def lr_scale(self):
        share = (self.steps + 1) / self.warmup_steps
        return min(1, share) / min(1, max(share, self.steps / self.total_steps / 0.05))

    @lr_scale.setter
    def lr_scale(self, value):
        raise AttributeError("lr_scale follows the warm-up here.")


# name -> options of RectifiedFlowTrainer
RECIPES = {
    "default": dict(by_fan_in=True),
    "one rate for all": dict(by_fan_in=False),
    "times uniform": dict(by_fan_in=True, time_distribution="uniform"),
    "muon": dict(by_fan_in=True),
    "plain": dict(by_fan_in=False, time_distribution="uniform"),
    "short average": dict(by_fan_in=True, ema_gamma=50.0),
    "long average": dict(by_fan_in=True, ema_gamma=5.0),
    "slow start": dict(by_fan_in=True),
}


@dataclass(frozen=True)
class Run:
    """What is trained: the set, the network, its peak learning rate, the seed, the number of steps, the recipe."""

    data: str
    network: str
    lr: float
    seed: int = 0
    steps: int = field(default_factory=lambda: STEPS)
    recipe: str = "default"

    @property
    def name(self):
        words = (self.data, self.network, self.recipe, f"{self.lr:g}", self.steps, self.seed)
        return "-".join(str(word).replace(" ", "_").replace(",", "") for word in words)


def held_out(images):
    """Training pictures and the last tenth, which no run sees."""
    last = len(images) // 10
    return images[:-last], images[-last:]


def trainer_of(run):
    torch.manual_seed(run.seed)
    model = small_networks(SIZE)[run.network]()
    trainer = RectifiedFlowTrainer(
        model, run.lr, "cpu", seed=run.seed, total_steps=run.steps, warmup_steps=50, **RECIPES[run.recipe]
    )
    if run.recipe == "muon":
        with_muon(trainer, run.lr)
    if run.recipe == "slow start":
        trainer.update.__class__ = SlowStart
    return trainer


def fit(trainer, images, seed, steps, label, batch_size=BATCH):
    """Train on random batches of images, uint8 [N, 3, H, W], mirrored by chance; the same ones for every trainer."""
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=label, mininterval=10):
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        trainer.train_step(to_model_range(batch, "cpu", generator=generator))
    trainer.update.settle()
    return trainer


def scored(run, images, real, samples_folder=None):
    """Train, sample and score one run; real: features of the training pictures. Returns the run's record."""
    training, validation = held_out(images)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = fit(trainer_of(run), training, run.seed, run.steps, run.name)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    average, few = trainer.update.ema.model, validation[:256]
    losses = ld_eval.velocity_mse(average, few, times=5).tolist()
    newest = ld_eval.velocity_mse(trainer.model.eval(), few, times=5).mean().item()
    samples = sample(trainer, 10, "euler")
    if samples_folder:
        samples_folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(samples=samples, weights=average.state_dict()), samples_folder / f"{run.name}.pt")
    return asdict(run) | dict(
        mse=mean(losses), mse_per_time=losses, mse_newest=newest, **ld_eval.compare(real, ld_eval.features(samples)),
        extractor=ld_eval.RandomFeatures.name, validation_pictures=len(few), sampling="10 Euler steps",
        parameters=sum(p.numel() for p in average.parameters()), skipped=trainer.update.skipped, batch_size=BATCH,
        image_size=SIZE, wall_seconds=wall, cpu_seconds=cpu, machine=machine(),
    )  # fmt: skip


def sample(trainer, steps, solver, n=320):
    """n uint8 samples of the averaged weights, always from the same noise."""
    parts = [trainer.sample(64, SIZE, steps, solver, seed=i) for i in range(n // 64)]
    return to_uint8(torch.cat(parts))


def solver_study(images, real, run):
    """Frechet distance of 320 samples at several numbers of steps of two solvers, one trained network; goes on where it was."""
    path = RESULTS / "sampling-steps.json"
    study = json.loads(path.read_text()) if path.exists() else dict(asdict(run), machine=machine(), scores={})
    wanted = [f"{solver} {n}" for n in (1, 2, 4, 8, 16, 25, 50) for solver in ("euler", "heun")]
    if set(wanted) <= set(study["scores"]):
        return
    training, validation = held_out(images)
    trainer = fit(trainer_of(run), training, run.seed, run.steps, run.name)
    study["mse"] = ld_eval.velocity_mse(trainer.update.ema.model, validation[:256], times=5).mean().item()
    study["held_out"] = ld_eval.compare(real, ld_eval.features(validation[:320]))  # what real pictures would score
    for name in tqdm(wanted, desc="solvers"):
        if name not in study["scores"]:
            solver, n = name.split()
            samples = sample(trainer, int(n), solver)
            study["scores"][name] = ld_eval.compare(real, ld_eval.features(samples))
            write(path, study)


def machine():
    return f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"


# ---- the queue ------------------------------------------------------------------------------------------------------


def records():
    """All runs so far, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "records").glob("*.json"))}


def curve(known, data, network, recipe="default"):
    """{rate: velocity MSE} at seed 0; a run that ended in numbers that are not finite counts as infinitely bad."""
    here = [
        r for r in known.values()
        if (r["data"], r["network"], r["recipe"], r["seed"], r["steps"]) == (data, network, recipe, 0, STEPS)
    ]  # fmt: skip
    return {r["lr"]: r["mse"] if r["mse"] == r["mse"] else float("inf") for r in sorted(here, key=lambda r: r["lr"])}


def best_rate(known, data, network, recipe="default"):
    """The rate of the lowest loss."""
    losses = curve(known, data, network, recipe)
    return min(losses, key=losses.get)


def search(data, network, recipe="default", rates=None):
    """Runs at seed 0 until the best of at least four rates has a worse one on either side."""
    for lr in rates or RATES.get(network, RATES_ELSE):
        yield Run(data, network, lr, recipe=recipe)
    while True:
        losses = curve(records(), data, network, recipe)
        best = min(losses, key=losses.get)
        if best not in (min(losses), max(losses)):
            return
        yield Run(data, network, best * 2 if best == max(losses) else best / 2, recipe=recipe)


def steps_in_equal_time(network):
    """Steps that `network` makes while ours makes STEPS."""
    seconds = json.loads((RESULTS / "step-times.json").read_text())["seconds"]
    return round(STEPS * median(ours / other for ours, other in zip(seconds["ours"], seconds[network])))


def in_equal_steps(data, seed, networks=COMPARED):
    """Each network at its own best rate."""
    for network in networks:
        yield Run(data, network, best_rate(records(), data, network), seed)


def in_equal_time(data, seed, networks=COMPARED[1:]):
    """The same rates, in the CPU time that ours takes."""
    for network in networks:
        yield Run(data, network, best_rate(records(), data, network), seed, steps_in_equal_time(network))


def ablated(data, seed, networks=ABLATED):
    """The changed liquid parts, at the rate that is best for ours."""
    for network in networks:
        yield Run(data, network, best_rate(records(), data, "ours"), seed)


def families(data):
    """What there is to compare on a set: rate curves, then the liquid part and the families seed by seed."""
    for network in COMPARED:
        yield from search(data, network)
    for seed in SEEDS:
        yield from in_equal_steps(data, seed, COMPARED[:1])
        yield from slow_starts(data, seed)
        yield from ablated(data, seed, ABLATED[:2])
    for seed in SEEDS:
        yield from in_equal_steps(data, seed)
        yield from ablated(data, seed)
    for seed in SEEDS:
        yield from in_equal_time(data, seed)


def slow_starts(data, seed, networks=COMPARED[:2], lr=16e-3):
    """A longer warm-up, which may let a network bear a higher rate; runs this short have one of eight steps else."""
    for network in networks:
        yield Run(data, network, lr, seed, recipe="slow start")


def family(data, network):
    """One network more."""
    yield from search(data, network)
    for seed in SEEDS:
        yield from in_equal_steps(data, seed, (network,))
        yield from in_equal_time(data, seed, (network,))


def tuned(data, recipe, rates=None):
    """Ours by another recipe, at a rate of its own."""
    yield from search(data, "ours", recipe, rates)
    for seed in SEEDS:
        yield Run(data, "ours", best_rate(records(), data, "ours", recipe), seed, recipe=recipe)


def untuned(data):
    """What leaves the scale of the rate alone, at ours' best one; and the plain recipe of the specification, at its own."""
    for seed in SEEDS:
        yield Run(data, "relaxation spec", 1e-4, seed, recipe="plain")
        for recipe in ("times uniform", "short average", "long average"):
            yield Run(data, "ours", best_rate(records(), data, "ours"), seed, recipe=recipe)


def queue():
    """Every run in order of its worth; what comes later depends on the results before it."""
    yield from families("cats")
    for network in COMPARED:
        yield from search("cats", network, "slow start")
    yield from tuned("cats", "muon")
    yield from families("fashion")
    yield from untuned("cats")
    yield from family("cats", "resblocks")
    yield from family("cats", "dit-2")
    for seed in SEEDS:
        yield from ablated("cats", seed, ABLATED_TOO)
    yield from tuned("cats", "one rate for all", (2e-3, 4e-3, 8e-3, 16e-3))


def step_times(images, rounds=7):
    """CPU seconds of a training step of every network, one of each per round: {network: [rounds]}."""
    batch = to_model_range(images[:BATCH], "cpu", flip=False)
    trainers = {name: trainer_of(Run("cats", name, 1e-4)) for name in small_networks(SIZE)}
    seconds = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.train_step(batch)
    for _ in tqdm(range(rounds), desc="step times"):
        for name, trainer in trainers.items():
            start = time.process_time()
            for _ in range(3):
                trainer.train_step(batch)
            seconds[name].append((time.process_time() - start) / 3)
    return dict(seconds=seconds, machine=machine())


def pictures(root, name):
    """The first PICTURES of a set, uint8 [N, 3, 16, 16]."""
    with open_images(root / SETS[name], image_size=SIZE, max_images=PICTURES) as cache:
        cache.wait()
        return torch.from_numpy(cache.images.copy())


# ---- tables ---------------------------------------------------------------------------------------------------------


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
    """Differences to the reference, seed by seed, for the seeds that both have."""
    return [run[key] - reference[seed][key] for seed, run in sorted(runs.items()) if seed in reference]


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
    keys = sorted({(r["data"], r["network"], r["recipe"]) for r in known.values()})
    curves = {key: curve(known, *key) for key in keys}
    curves = {key: losses for key, losses in curves.items() if len(losses) > 2}
    rates = sorted({lr for losses in curves.values() for lr in losses})
    lines = []
    for key, losses in curves.items():
        cells = [f"{losses[lr]:.4f}" if lr in losses else "" for lr in rates]
        cells[rates.index(best_rate(known, *key))] = f"**{min(losses.values()):.4f}**"
        lines.append([", ".join(key), *cells])
    return rows(["set, network, recipe", *(f"{lr:g}" for lr in rates)], lines)


def comparison_table(known, data, networks=("ours", "unet", "unet-attention", "resblocks", "dit-2")):
    """Every family at its own best rate, at equal steps and in equal time."""
    lines = []
    for network in networks:
        if not curve(known, data, network):
            continue
        lr, steps = best_rate(known, data, network), steps_in_equal_time(network)
        here = dict(data=data, network=network, recipe="default", lr=lr)
        equal_steps, equal_time = (list(seeds_of(known, **here, steps=n).values()) for n in (STEPS, steps))
        lines.append([network, f"{equal_steps[0]['parameters']:,}", f"{lr:g}", str(len(equal_steps))])
        for runs in (equal_steps, equal_time):
            lines[-1] += [spread([r[key] for r in runs]) for key in ("mse", "frechet")]
        lines[-1].insert(6, f"{steps} x {len(equal_time)}")
    head = ["network", "parameters", "rate", "seeds", f"MSE, {STEPS} steps", "Frechet"]
    return rows([*head, "equal time: steps x seeds", "MSE", "Frechet"], lines)


def difference_table(known, data, variants):
    """Each (name, values of its runs) against ours by the default recipe: differences seed by seed, below 0 is better."""
    if not curve(known, data, "ours"):
        return ""
    ours = dict(data=data, network="ours", recipe="default", lr=best_rate(known, data, "ours"), steps=STEPS)
    reference, lines = seeds_of(known, **ours), []
    for name, values in variants:
        runs = seeds_of(known, **(ours | values))
        if runs:
            losses, distances = (paired(runs, reference, key) for key in ("mse", "frechet"))
            line = [name, str(len(losses)), spread(losses, "+"), verdict(losses), spread(distances, "+")]
            lines.append([*line, verdict(distances)])
    head = ["variant", "seeds", "MSE minus ours, mean (range)", "", "Frechet minus ours, mean (range)", ""]
    level = ", ".join(f"{key} {spread([r[key] for r in reference.values()])}" for key in ("mse", "frechet"))
    return f"Ours: {level}, {len(reference)} seeds.\n\n" + rows(head, lines) if lines else ""


def recipe_variants(known, data):
    """(name, values) of the recipes, those with a rate of their own at their best one."""
    for recipe in RECIPES:
        values = dict(recipe=recipe)
        if recipe == "plain":
            values |= dict(network="relaxation spec", lr=1e-4)
        elif curve(known, data, "ours", recipe):
            values |= dict(lr=best_rate(known, data, "ours", recipe))
        if recipe not in ("default", "slow start"):  # that one has a table of its own
            yield recipe, values


def warmup_table(known, data):
    """Runs with the longer warm-up, and the same network's differences to its default recipe at its best rate."""
    lines = []
    for network in COMPARED:
        losses = curve(known, data, network, "slow start")
        if losses:
            here = dict(data=data, network=network, steps=STEPS)
            slow = seeds_of(known, **here, recipe="slow start", lr=min(losses, key=losses.get))
            usual = seeds_of(known, **here, recipe="default", lr=best_rate(known, data, network))
            cells = [network, f"{min(losses, key=losses.get):g}", str(len(slow))]
            for key in ("mse", "frechet"):
                cells += [spread([r[key] for r in slow.values()]), spread(paired(slow, usual, key), "+")]
            lines.append(cells)
    head = ["network", "rate", "seeds", "MSE", "minus its default", "Frechet", "minus its default"]
    return rows(head, lines)


def average_table(known, data):
    """The newest weights against the averaged ones of the same runs."""
    runs = [
        r
        for r in known.values()
        if (r["data"], r["network"], r["recipe"], r["steps"]) == (data, "ours", "default", STEPS)
    ]
    differences = [r["mse_newest"] - r["mse"] for r in runs]
    return f"Newest weights minus averaged ones, MSE: {spread(differences, '+')}, {len(runs)} runs." if runs else ""


def solver_table():
    """Frechet distance against the number of steps, Euler's and Heun's."""
    path = RESULTS / "sampling-steps.json"
    if not path.exists():
        return ""
    study = json.loads(path.read_text())
    counts = sorted({int(name.split()[1]) for name in study["scores"]})
    lines = [
        [solver, *(f"{study['scores'][f'{solver} {n}']['frechet']:.3g}" for n in counts)]
        for solver in ("euler", "heun")
    ]
    note = f"{study['steps']} training steps, velocity MSE {study['mse']:.4f}; held-out pictures score "
    return f"{note}{study['held_out']['frechet']:.3g}.\n\n" + rows(["Frechet at steps", *map(str, counts)], lines)


def tables(known):
    """Everything as Markdown."""
    parts = [("Learning rates", rate_table(known)), ("Sampling steps", solver_table())]
    for data in SETS:
        parts.append((f"{data}: families", comparison_table(known, data)))
        variants = [(name, dict(network=name)) for name in (*ABLATED, *ABLATED_TOO)]
        parts.append((f"{data}: the liquid part", difference_table(known, data, variants)))
        parts.append((f"{data}: the recipe", difference_table(known, data, recipe_variants(known, data))))
        parts.append((f"{data}: a longer warm-up", warmup_table(known, data)))
        parts.append((f"{data}: averaged weights", average_table(known, data)))
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts if text)


def publish(text):
    """Print the tables, and put them between the two marks of docs/quality.md."""
    print(text)
    before, _, after = DOCS.read_text().partition(MARKS[0])
    DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after.partition(MARKS[1])[2]}")


def write(path, record):
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def work(root, hours, samples_folder, solvers):
    """Do the queue's runs that have no JSON yet, until the time is up."""
    end, sets = time.monotonic() + 3600 * hours, {name: pictures(root, name) for name in SETS}
    real = {name: ld_eval.features(held_out(images)[0]) for name, images in sets.items()}
    if not (RESULTS / "step-times.json").exists():
        write(RESULTS / "step-times.json", step_times(sets["cats"]))
    if solvers:
        return solver_study(sets["cats"], real["cats"], Run("cats", "ours", best_rate(records(), "cats", "ours")))
    for run in queue():
        path = RESULTS / "records" / f"{run.name}.json"
        if path.exists():
            continue
        if time.monotonic() > end:
            return
        write(path, scored(run, sets[run.data], real[run.data], samples_folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="folder of the sets")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of training, where steps are equal; a comparison of its own"
    )
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--keep", type=Path, help="folder for the samples and weights of every run")
    parser.add_argument(
        "--solvers", action="store_true", help="instead of the queue: score one network at 1 to 50 steps"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the tables of what was run so far, for docs/quality.md too"
    )
    arguments = parser.parse_args()
    globals()["STEPS"] = arguments.steps
    if arguments.table:
        return publish(tables(records()))
    torch.set_num_threads(1)
    work(arguments.root, arguments.hours, arguments.keep, arguments.solvers)


if __name__ == "__main__":
    main()
