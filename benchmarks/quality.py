"""How good are the pictures, and does the liquid part help: many short runs at tuned rates, one JSON each, resumable.

    python benchmarks/quality.py --root FOLDER [--study NAME] [--hours 1]     # the queue: started again it goes on
    python benchmarks/quality.py --root FOLDER --solvers       # quality against the number of sampling steps
    python benchmarks/quality_tables.py                        # print the tables and put them into docs/quality.md

FOLDER holds the sets named in SETS; STUDIES says what is compared on which. Every network but "tiny" has about 0.9M parameters, and
each its own learning rate: four rates at seed 0, more by factors of two until the best is not at an end, then seeds 1 and 2 at the
best. "Equal time" repeats that rate with as many steps as our network's time allows; the step times are measured first, in rounds
that run every network once, as CPU seconds of one thread, and kept in step-times-SIZE.json (--times measures them anew, and what
has none is measured first). Scores are those of the averaged weights: velocity MSE on the last tenth of the pictures (256 of them,
five times), and the Frechet distance by `ld_eval.RandomFeatures` between 320 samples and the training pictures. Samples take 10
steps of Heun's method, 20 evaluations: after 10 of Euler's they are too smooth, and a network that leaves some noise in them makes
up for it and scores better than one that has learned more.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from networks import small_networks
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import ld_eval  # noqa: E402
from ld_data import open_images, to_model_range  # noqa: E402
from ld_utils import to_uint8  # noqa: E402
from liquid_diffusion import RectifiedFlowTrainer, WeightUpdate, liquid_diffusion_tiny  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "quality"
SETS = {  # name -> folder, side in pixels
    "cats": ("afhq-cat-128", 16),
    "fashion": ("fashion-mnist", 16),
    "cats at 32 px": ("afhq-cat-128", 32),
    "fashion at 32 px": ("fashion-mnist", 32),
}
BATCH, SEEDS, PICTURES = 32, (0, 1, 2), 5153
SAMPLING = ("heun", 10)
COUNTS = (1, 2, 4, 8, 10, 16, 25, 50)  # of sampling steps
SMALL_SHARE = 3 / 4  # of the steps of a run that grows
RATES = {"dit-2": (1e-3, 2e-3, 4e-3, 8e-3)}  # where the search begins; by fan-in unless the recipe says otherwise
RATES_ELSE = (4e-3, 8e-3, 16e-3, 32e-3)
COMPARED = ("ours", "unet", "unet-attention")
DEFAULT, DENSE = "branches start small", "cell on a dense 3x3"  # what users get; and the cell as a whole block
# each by Muon at its own rate
MATCHED = ("ours", DEFAULT, "resblocks", "small start, resblocks", DENSE, *COMPARED[1:], "dit-2")
# what is changed in the network that users get: its liquid parts; and the rest, widths of the time embedding at equal size, not 24
LIQUID = ("gate 1-2", "relaxation off", "relaxation spec", "relaxation only", "no cell, wider", "gate on the skips")
LIQUID = tuple(f"small start, {part}" for part in LIQUID)
PARTS = (*LIQUID, "small start, output starts at zero", *(f"small start, time embedding of {n}" for n in (8, 64, 48)))
MUONS = dict.fromkeys(("ours", DEFAULT, "no cell", "no cell, wider", "dit-2"), "muon")  # for their dense kernels
MUONS |= dict.fromkeys((*COMPARED[1:], *MATCHED[2:5], f"{DENSE}, gate 1-2"), "muon for 3x3 too")
TIMED = (*COMPARED, "dit-2", "resblocks", "no cell", "relaxation spec")  # by AdamW, and MUONS by Muon
ABLATED = ("gate 1-2", "relaxation off", "gate of the time", "no cell")
ABLATED_TOO = (
    "gate times h",
    "one head, no gate",
    "gate of the picture",
    "gate of the paper",
    "gate of ncps",
    "relaxation spec",
    "relaxation only",
    "h + gate g",
    "shift of picture and time",
    "tanh heads",
    "rho from 3",
    "rho spread, -3 to 3",
)
BLOCKS = ("no mix", "mix in the cell", "no feed-forward", "channel attention")
STARTS = ("branches start small", "output starts at zero", "modulations start at random")


# ---- one run --------------------------------------------------------------------------------------------------------


class SlowStart(WeightUpdate):
    """Warms the rate up over warmup_steps however short the run is, and not over a twentieth of it at most."""

    @property
    def lr_scale(self):
        share = (self.steps + 1) / self.warmup_steps
        return min(1, share) / min(1, max(share, self.steps / self.total_steps / 0.05))

    @lr_scale.setter
    def lr_scale(self, value):
        raise AttributeError("lr_scale follows the warm-up here.")


class Immiscible(RectifiedFlowTrainer):
    """Each picture gets the nearest of four noises, so that paths cross less (arXiv 2406.12303, by the rule of 2505.18521)."""

    def gradients(self, images, noise, t):
        others = torch.randn(3, *images.shape, generator=self.generator)
        choices = torch.cat([noise[None], others])  # [4, B, C, H, W]
        nearest = (choices - images).square().sum((2, 3, 4)).argmin(0)  # [B]
        return super().gradients(images, choices[nearest, torch.arange(len(images))], t)


# name -> options of RectifiedFlowTrainer beside by_fan_in=True
RECIPES = {
    "adamw": {},
    "muon": dict(muon=1),
    "muon for 3x3 too": dict(muon=3),
    "one rate for all": dict(by_fan_in=False),
    "times uniform": dict(time_distribution="uniform"),
    "plain": dict(by_fan_in=False, time_distribution="uniform"),
    "short average": dict(ema_gamma=50.0),
    "long average": dict(ema_gamma=5.0),
    "slow start": {},
    "immiscible": {},
    "growing": dict(muon=1),
}


@dataclass(frozen=True)
class Study:
    """Runs that can be compared: a set, and the number of steps of ours, and of all where steps are equal."""

    data: str
    steps: int

    @property
    def size(self):
        return SETS[self.data][1]

    def __str__(self):
        return f"{self.data}, {self.steps} steps"


@dataclass(frozen=True)
class Run:
    """What is trained: the set, the network, its peak learning rate, the seed, the number of steps, the recipe."""

    data: str
    network: str
    lr: float
    seed: int = 0
    steps: int = 150
    recipe: str = "adamw"

    @property
    def size(self):
        return SETS[self.data][1]

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
    model = liquid_diffusion_tiny() if run.network == "tiny" else small_networks(run.size)[run.network]()
    kind = Immiscible if run.recipe == "immiscible" else RectifiedFlowTrainer
    options = dict(by_fan_in=True, total_steps=run.steps, warmup_steps=50) | RECIPES[run.recipe]
    trainer = kind(model, run.lr, "cpu", seed=run.seed, **options)
    if run.recipe == "slow start":
        trainer.update.__class__ = SlowStart
    return trainer


def fit(trainer, images, seed, steps, label, batch_size=BATCH, small_share=0.0):
    """Train on random batches of images, uint8 [N, 3, H, W], mirrored by chance; the same ones for every trainer.

    small_share: of the steps, the first ones, at half the height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc=label, mininterval=10):
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        batch = to_model_range(batch, "cpu", generator=generator)
        trainer.train_step(F.avg_pool2d(batch, 2) if step < small_share * steps else batch)
    trainer.update.settle()
    return trainer


def scored(run, images, real, samples_folder=None):
    """Train, sample and score one run; real: features of the training pictures. Returns the run's record."""
    training, validation = held_out(images)
    wall, cpu = time.perf_counter(), time.process_time()
    small = SMALL_SHARE if run.recipe == "growing" else 0.0
    trainer = fit(trainer_of(run), training, run.seed, run.steps, run.name, small_share=small)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    average, few = trainer.update.ema.model, validation[:256]
    losses = ld_eval.velocity_mse(average, few, times=5).tolist()
    newest = ld_eval.velocity_mse(trainer.model.eval(), few, times=5).mean().item()
    samples = sample(trainer, run.size)
    if samples_folder:
        samples_folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(samples=samples, weights=average.state_dict()), samples_folder / f"{run.name}.pt")
    return asdict(run) | dict(
        mse=mean(losses), mse_per_time=losses, mse_newest=newest, **ld_eval.compare(real, ld_eval.features(samples)),
        extractor=ld_eval.RandomFeatures.name, validation_pictures=len(few), sampling=SAMPLING,
        parameters=sum(p.numel() for p in average.parameters()), skipped=trainer.update.skipped, batch_size=BATCH,
        image_size=run.size, wall_seconds=wall, cpu_seconds=cpu, machine=machine(),
    )  # fmt: skip


def sample(flow, size, solver=SAMPLING[0], steps=SAMPLING[1], n=320):
    """n uint8 samples, of a trainer's averaged weights, always from the same noise."""
    parts = [flow.sample(64, size, steps, solver, seed=i) for i in range(n // 64)]
    return to_uint8(torch.cat(parts))


def solver_study(images, real, run, kept=None):
    """Distances of 320 samples at several numbers of steps of two solvers, one trained network; goes on where it was.

    kept: a folder with the weights of runs, or None to train again.
    """
    path = RESULTS / "sampling-steps" / f"{run.name}.json"
    study = json.loads(path.read_text()) if path.exists() else dict(asdict(run), machine=machine(), scores={})
    wanted = [f"{solver} {n}" for n in COUNTS for solver in ("euler", "heun")]
    if set(wanted) <= set(study["scores"]):
        return
    training, validation = held_out(images)
    file = kept / f"{run.name}.pt" if kept else None
    if file and file.exists():
        trainer = trainer_of(run)
        trainer.update.ema.model.load_state_dict(torch.load(file, weights_only=True)["weights"])
    else:
        trainer = fit(trainer_of(run), training, run.seed, run.steps, run.name)
    study["mse"] = ld_eval.velocity_mse(trainer.update.ema.model, validation[:256], times=5).mean().item()
    study["held_out"] = ld_eval.compare(real, ld_eval.features(validation[:320]))  # what real pictures would score
    for name in tqdm(wanted, desc="solvers"):
        if name not in study["scores"]:
            solver, n = name.split()
            samples = sample(trainer, run.size, solver, int(n))
            study["scores"][name] = ld_eval.compare(real, ld_eval.features(samples))
            write(path, study)


def machine():
    return f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"


# ---- the queue ------------------------------------------------------------------------------------------------------


def records():
    """All runs so far, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "records").glob("*.json"))}


def curve(known, study, network, recipe="adamw"):
    """{rate: velocity MSE} at seed 0; a run that ended in numbers that are not finite counts as infinitely bad."""
    wanted = dict(data=study.data, steps=study.steps, network=network, recipe=recipe, seed=0)
    here = [r for r in known.values() if all(r[key] == value for key, value in wanted.items())]
    return {r["lr"]: r["mse"] if r["mse"] == r["mse"] else float("inf") for r in sorted(here, key=lambda r: r["lr"])}


def ranked_rates(known, study, network, recipe="adamw"):
    """The rates that were tried, from the lowest loss to the highest."""
    losses = curve(known, study, network, recipe)
    return sorted(losses, key=losses.get)


def best_rate(known, study, network, recipe="adamw"):
    """The rate of the lowest loss."""
    return ranked_rates(known, study, network, recipe)[0]


def search(study, network, recipe="adamw", rates=None):
    """Runs at seed 0 until the best of at least four rates has a worse one on either side."""
    for lr in rates or RATES.get(network, RATES_ELSE):
        yield Run(study.data, network, lr, 0, study.steps, recipe)
    while True:
        losses = curve(records(), study, network, recipe)
        best = min(losses, key=losses.get)
        if best not in (min(losses), max(losses)):
            return
        yield Run(study.data, network, best * 2 if best == max(losses) else best / 2, 0, study.steps, recipe)


def step_seconds(size):
    """Groups of {"network, recipe": [CPU seconds of a step, by rounds]}, each measured by itself; see step_times."""
    path = RESULTS / f"step-times-{size}.json"
    return [group["seconds"] for group in json.loads(path.read_text())["groups"]] if path.exists() else []


def step_share(size, network, recipe="adamw", base="ours, adamw"):
    """A step's CPU time as a share of that of `base`: the median of the ratios within rounds of the first group that has both.

    A recipe that was not timed counts as AdamW, and a network as ours.
    """
    for name in (f"{network}, {recipe}", f"{network}, adamw"):
        for group in step_seconds(size):
            if name in group and base in group:
                return median(a / b for a, b in zip(group[name], group[base]))
    return 1.0


def steps_in_equal_time(study, network, recipe="adamw"):
    """Steps that `network` makes while ours makes the study's with AdamW."""
    return round(study.steps / step_share(study.size, network, recipe))


def steps_while_growing(study):
    """Steps by Muon, SMALL_SHARE of them at half the size, in the time of the study's with AdamW."""
    large, small = (median(step_seconds(size)[0]["ours, adamw"]) for size in (study.size, study.size // 2))
    muon = step_share(study.size, "ours", "muon") * large, step_share(study.size // 2, "ours", "muon") * small
    return round(study.steps * large / ((1 - SMALL_SHARE) * muon[0] + SMALL_SHARE * muon[1]))


def by_recipe(study, recipe, seed):
    """Ours by another recipe, at the rate that is best with AdamW."""
    return Run(study.data, "ours", best_rate(records(), study, "ours"), seed, study.steps, recipe)


def in_equal_steps(study, seed, networks=COMPARED):
    """Each network at its own best rate."""
    for network in networks:
        yield Run(study.data, network, best_rate(records(), study, network), seed, study.steps)


def in_equal_time(study, seed, networks=COMPARED[1:]):
    """The same rates, in the CPU time that ours takes."""
    for network in networks:
        steps = steps_in_equal_time(study, network)
        yield Run(study.data, network, best_rate(records(), study, network), seed, steps)


def ablated(study, seed, networks=ABLATED, recipe="adamw"):
    """The changed networks, at the rate that is best for ours."""
    for network in networks:
        yield Run(study.data, network, best_rate(records(), study, "ours", recipe), seed, study.steps, recipe)


def parts(study, seed, network=DEFAULT, changed=PARTS):
    """By Muon, a network and what is left of it without its liquid parts, at the rate that is best for it whole."""
    rate = best_rate(records(), study, network, MUONS[network])
    for name in (network, *changed):
        yield Run(study.data, name, rate, seed, study.steps, MUONS[network])


def grown(study, seed):
    """Small pictures first, by Muon, in the time of pictures that are large from the start."""
    rate = best_rate(records(), study, DEFAULT, "muon")
    yield Run(study.data, DEFAULT, rate, seed, steps_while_growing(study), "growing")


def families(study, networks=COMPARED):
    """The networks a user would pick, rate by rate, then seed by seed; in equal time at the next best rate too."""
    for network in networks:
        yield from search(study, network)
    for seed in SEEDS:
        yield from in_equal_steps(study, seed, [network for network in networks if network == "ours"])
    for seed in SEEDS:
        yield from in_equal_time(study, seed, [network for network in networks if network != "ours"])
    for seed in SEEDS:
        yield from in_equal_steps(study, seed, networks)
    for seed in SEEDS:
        for network in networks:
            rates = ranked_rates(records(), study, network)
            yield Run(study.data, network, rates[1], seed, steps_in_equal_time(study, network))


def slow_starts(study, seed, networks=COMPARED[:2], lr=16e-3):
    """A longer warm-up, which may let a network bear a higher rate; runs of 150 steps have one of eight else."""
    for network in networks:
        yield Run(study.data, network, lr, seed, study.steps, "slow start")


def tuned(study, recipe, rates=None, network="ours"):
    """By another recipe, at a rate of its own."""
    yield from search(study, network, recipe, rates)
    for seed in SEEDS:
        yield Run(study.data, network, best_rate(records(), study, network, recipe), seed, study.steps, recipe)


def with_muon(study, networks=MATCHED):
    """Muon for the dense kernels, at rates of its own: in the time of ours with AdamW, and ours in equal steps too."""
    for network in networks:
        yield from search(study, network, MUONS[network])
    for seed in SEEDS:
        for network in networks:
            rate = best_rate(records(), study, network, MUONS[network])
            steps = steps_in_equal_time(study, network, MUONS[network])
            for n in (steps, study.steps) if network in ("ours", DEFAULT) else (steps,):
                yield Run(study.data, network, rate, seed, n, MUONS[network])


def literal(study, seed):
    """Two parts of the plain recipe by themselves, at the rate of ours."""
    yield from ablated(study, seed, ("relaxation spec",))
    yield by_recipe(study, "times uniform", seed)


def untuned(study):
    """What leaves the scale of the rate alone, at ours' best one; and the literal specification."""
    for seed in SEEDS:
        yield Run(study.data, "relaxation spec", 1e-4, seed, study.steps, "plain")
        for recipe in ("times uniform", "short average", "long average", "immiscible"):
            yield by_recipe(study, recipe, seed)


def short(study):
    """What there is to compare in short runs; each set has its own part."""
    yield from families(study)
    yield from with_muon(study)
    for seed in SEEDS:
        yield from slow_starts(study, seed)
        yield from ablated(study, seed)
    if study.data == "cats":
        yield from untuned(study)
        yield from tuned(study, "plain", (1e-3, 2e-3, 4e-3, 8e-3), "relaxation spec")
        yield from families(study, ("resblocks",))
        yield from families(study, ("dit-2",))
        yield from search(study, "tiny", "muon")  # does a rate that was found for nano serve the next preset?
        for network in BLOCKS + STARTS + ABLATED_TOO:
            for seed in SEEDS:
                yield from ablated(study, seed, (network,))
        for network in COMPARED[:2]:
            yield from tuned(study, "slow start", network=network)
        yield from tuned(study, "one rate for all", (2e-3, 4e-3, 8e-3, 16e-3))


def longer(study):
    """What was close, or won, in short runs; and rates once more."""
    yield from search(study, "ours")
    for seed in SEEDS:
        yield from in_equal_steps(study, seed, ("ours",))
    yield from with_muon(study, ("ours", DEFAULT))
    for seed in SEEDS:
        yield from parts(study, seed)
    for seed in SEEDS:
        yield from literal(study, seed)
        yield by_recipe(study, "slow start", seed)
    yield from tuned(study, "plain", (2e-3, 4e-3, 8e-3, 16e-3), "relaxation spec")


def large(study):
    """The networks a user would pick, the liquid parts, growing pictures; and the cell as a block of its own."""
    yield from families(study)
    yield from with_muon(study)
    for seed in SEEDS:
        yield from parts(study, seed)
    for seed in SEEDS:
        yield from parts(study, seed, DENSE, (f"{DENSE}, gate 1-2",))
    for seed in SEEDS:
        yield from grown(study, seed)
    yield from tuned(study, "plain", (2e-3, 4e-3, 8e-3, 16e-3), "relaxation spec")
    for seed in SEEDS:
        yield from literal(study, seed)
        yield from ablated(study, seed, ("gate 1-2", "no cell"))


def large_fashion(study):
    """What a user would pick, at the size of the larger cats; and the gate once more."""
    yield from with_muon(study, (DEFAULT, *COMPARED[:0:-1]))
    for seed in SEEDS:
        yield from parts(study, seed, changed=PARTS[:1])


# name -> the study, and the generator of its runs in order of their worth; what comes later depends on the results before it
STUDIES = {
    "cats": (Study("cats", 150), short),
    "fashion": (Study("fashion", 150), short),
    "longer": (Study("cats", 600), longer),
    "larger": (Study("cats at 32 px", 300), large),
    "larger fashion": (Study("fashion at 32 px", 300), large_fashion),
}


def queue(names=tuple(STUDIES)):
    """Every run of these studies."""
    for name in names:
        study, runs = STUDIES[name]
        yield from runs(study)


def step_times(images, names):
    """CPU seconds of a training step of each "network, recipe", measured together; see timed."""
    build, trainers = small_networks(images.shape[-1]), {}
    for name in names:
        network, recipe = name.rsplit(", ", 1)
        options = dict(total_steps=100, by_fan_in=True) | RECIPES[recipe]
        trainers[name] = RectifiedFlowTrainer(build[network](), 1e-4, "cpu", **options)
    return dict(seconds=timed(trainers, images), machine=machine())


def untimed(size, again=False):
    """Every "network, recipe" that is compared in equal time and has no step times yet, with ours for a yardstick."""
    names = [f"{network}, adamw" for network in TIMED] + [f"{network}, {recipe}" for network, recipe in MUONS.items()]
    known = {} if again else set().union(*step_seconds(size))
    new = [name for name in names if name not in known]
    return new and list(dict.fromkeys(["ours, adamw", *new]))


def timed(trainers, images, rounds=7):
    """CPU seconds of a training step on images, uint8 [N, 3, H, W], one of each trainer per round: {name: [rounds]}."""
    batch = to_model_range(images[:BATCH], "cpu", flip=False)
    seconds = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.train_step(batch)
    for _ in tqdm(range(rounds), desc="step times"):
        for name, trainer in trainers.items():
            start = time.process_time()
            for _ in range(3):
                trainer.train_step(batch)
            seconds[name].append((time.process_time() - start) / 3)
    return seconds


def pictures(root, name):
    """The first PICTURES of a set, uint8 [N, 3, H, W]."""
    folder, size = SETS[name]
    with open_images(root / folder, image_size=size, max_images=PICTURES) as cache:
        cache.wait()
        return torch.from_numpy(cache.images.copy())


def write(path, record):
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def ready(root, names, again=False):
    """(pictures, features of the training pictures) by set, for the sets of these studies; their step times are measured."""
    sets = {}
    for data in dict.fromkeys(STUDIES[name][0].data for name in names):
        images = pictures(root, data)
        sets[data] = images, ld_eval.features(held_out(images)[0])
        size = SETS[data][1]
        names = untimed(size, again)
        if names:
            path = RESULTS / f"step-times-{size}.json"
            before = json.loads(path.read_text())["groups"] if path.exists() and not again else []
            write(path, dict(groups=[*before, step_times(images, names)]))
    return sets


def work(sets, names, hours, samples_folder):
    """Do the queue's runs that have no JSON yet, or one without distances, until the time is up."""
    end = time.monotonic() + 3600 * hours
    for run in queue(names):
        path = RESULTS / "records" / f"{run.name}.json"
        if path.exists() and "frechet" in json.loads(path.read_text()):
            continue
        if time.monotonic() > end:
            return
        write(path, scored(run, *sets[run.data], samples_folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="folder of the sets")
    parser.add_argument("--study", choices=STUDIES, action="append", help="one study, or several; all if left out")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--keep", type=Path, help="folder for the samples and weights of every run")
    for name, meaning in (
        ("times", "instead of the queue: measure the times of a step anew"),
        ("solvers", "instead of the queue: score two of its networks at 1 to 50 sampling steps"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["longer"] if arguments.solvers else arguments.study or tuple(STUDIES)
    sets = ready(arguments.root, names, again=arguments.times)
    if arguments.solvers:
        study = STUDIES["longer"][0]
        for lr in (4e-3, 16e-3):
            solver_study(*sets[study.data], Run(study.data, "ours", lr, 0, study.steps), arguments.keep)
        return
    if not arguments.times:
        work(sets, names, arguments.hours, arguments.keep)


if __name__ == "__main__":
    main()
