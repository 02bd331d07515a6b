"""The README's figures are those of the committed results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality  # noqa: E402
import readme  # noqa: E402


def test_the_readme_shows_the_committed_results():
    text = readme.README.read_text()
    assert all(f"<!-- figures: {name} -->" in text for name in readme.PARTS)
    assert readme.filled(text) == text, "run 'make tables'"


def test_only_what_stands_between_marks_is_changed(monkeypatch):
    monkeypatch.setattr(readme, "PARTS", {"one": lambda: "1", "two": lambda: "2"})
    marked = "a <!-- figures: one -->{}<!-- end --> b\n<!-- figures: two -->{}<!-- end --> c <!-- end -->"
    assert readme.filled(marked.format("old", "older\n\n")) == marked.format("\n\n1\n\n", "\n\n2\n\n")
    with pytest.raises(ValueError, match="figures 'three'; choose one of one, two"):
        readme.filled("<!-- figures: three --> <!-- end -->")


def test_scores_are_rounded_and_carry_their_range():
    assert readme.scores([dict(mse=m) for m in (0.25, 0.26, 0.271)]) == ["0.2603 (0.2500 to 0.2710)", ""]
    assert readme.scores([dict(mse=0.25, frechet=3.14)]) == ["0.2500", "3.1"]


def test_an_answer_that_the_notebook_no_longer_gives_is_not_printed(monkeypatch):
    found = {name: dict(holds=answer.startswith("Yes"), found="f") for _, name, answer, _ in readme.CLAIMS}
    monkeypatch.setattr(readme, "stored", lambda name: dict(findings=found))
    assert readme.claims().count("| ") > 2 * len(found)
    found[readme.CLAIMS[1][1]]["holds"] = True
    with pytest.raises(ValueError, match="README says 'No' of 'CfC solves the LTC equation analytically'"):
        readme.claims()


def test_ours_is_set_against_the_best_that_another_network_reached_in_equal_time(monkeypatch):
    study, known = readme.STUDIES["larger"][0], {}

    def add(network, recipe, lr, steps, scores):
        for seed, frechet in enumerate(scores):
            values = dict(data=study.data, network=network, recipe=recipe, lr=lr, steps=steps, seed=seed)
            known[len(known)] = values | dict(frechet=frechet, mse=frechet / 100, parameters=1)

    def equal(network, recipe):
        return quality.steps_in_equal_time(study, network, recipe)

    for lr in (1e-3, 2e-3):  # a curve, in equal steps
        for network, recipe in ((quality.DEFAULT, "muon"), ("unet", "adamw"), ("unet", "muon for 3x3 too")):
            add(network, recipe, lr, study.steps, [50.0 + 1e3 * lr])
    add(quality.DEFAULT, "muon", 1e-3, equal(quality.DEFAULT, "muon"), [10.0, 12.0])
    add("unet", "adamw", 1e-3, equal("unet", "adamw"), [30.0, 40.0])
    add("unet", "muon for 3x3 too", 1e-3, equal("unet", "muon for 3x3 too"), [12.0, 32.0])
    add("relaxation spec", "plain", 4e-3, study.steps, [44.0, 44.0])
    monkeypatch.setattr(readme, "records", lambda: known)
    lines = readme.equal_time().splitlines()[2:]
    steps = [equal(quality.DEFAULT, "muon"), study.steps, equal("unet", "muon for 3x3 too")]
    names = [readme.NAMES[network] for network in (quality.DEFAULT, "relaxation spec", "unet")]
    hows = ["Muon, 0.001", "AdamW, 0.004", "Muon, 0.001"]
    means, ranges = (11, 44, 22), ("10.0 to 12.0", "44.0 to 44.0", "12.0 to 32.0")
    shares = ["", "-75%, apart", "-50%, ranges overlap"]
    assert len(lines) == 3
    for line, *cells in zip(lines, names, hows, steps, means, ranges, shares):
        name, how, n, m, distances, share = cells
        assert line.startswith(f"| cats, 32 px | {name} | {how} | {n} × 2 | {m / 100:.4f} (")
        assert line.endswith(f" | {m:.1f} ({distances}) | {share} |")


def test_whether_a_goal_was_reached_follows_from_the_figures(monkeypatch):
    lines = {line.split(" | ")[0]: line for line in readme.speeds().splitlines()}
    networks = next(iter(readme.stored("speed").values()))["networks"]
    kept = networks["lean"]["kept MiB"]
    assert lines["| MiB kept, float32"].endswith(f"| {kept:.3g} | {'yes' if kept <= 80 else 'no'} |")
    monkeypatch.setattr(readme, "MEMORY_GOALS", (("MiB kept, float32", "lean", "kept MiB", int(kept) - 1),))
    assert f"| MiB kept, float32 | at most {int(kept) - 1} | {kept:.3g} | no |" in readme.speeds()
