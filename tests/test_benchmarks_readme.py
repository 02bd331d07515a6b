"""The README's figures are those of the committed results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

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
