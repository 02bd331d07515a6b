"""Every row of the README's fault table, done to real runs in processes of their own."""

import pytest
from fault_lab import Lab
from faults import FAULTS


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("name", FAULTS)
def test_fault(lab, tmp_path, name):
    row = FAULTS[name](lab, tmp_path / "run")
    assert row.lost and row.said
