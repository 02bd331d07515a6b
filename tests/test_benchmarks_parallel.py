"""The arithmetic behind docs/scaling.md: the ring, the slowest process, and a page that says what the script says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="needs accelerate")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import parallel  # noqa: E402


def test_a_ring_sends_the_bytes_once_between_two_and_twice_among_many():
    assert parallel.ring_seconds(8e9, 2, 8e9, 0.5) == pytest.approx(1 + 2 * 0.5)
    assert parallel.ring_seconds(8e9, 10**6, 8e9, 0) == pytest.approx(2, rel=1e-5)
    assert parallel.ring_seconds(8e9, 1, 8e9, 1) == 0


def test_the_slowest_of_uniform_times_is_p_over_p_plus_one():
    times = np.linspace(0, 1, 1001)
    assert [parallel.slowest([times], p) for p in (1, 2, 8)] == pytest.approx([1 / 2, 2 / 3, 8 / 9], abs=0.01)
    assert parallel.slowest([[1.0], [3.0]], 2) == 3


def test_efficiency_falls_with_the_message_and_never_exceeds_one():
    values = [parallel.efficiency(0.1, 4e8, n, link) for link in ("NVLink", "PCIe 3.0") for n in (2, 8, 64)]
    assert values == sorted(values[:3], reverse=True) + sorted(values[3:], reverse=True)
    assert values[0] < 1 and values[3] < values[0]
    assert parallel.efficiency(0.1, 4e8, 2, "PCIe 3.0") == pytest.approx(
        0.1 / (0.15 + 0.1 * 0.03 / np.pi**0.5), rel=0.01
    )


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    text = "\n".join(parallel.tables(json.loads(parallel.STORED.read_text())))
    assert not [line for line in text.splitlines() if line not in page]
