"""Every optimizer follows its dense reference, step by step, across refreshes."""

import pytest

from tests.cases import CASES, Case, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_follows_the_dense_reference(case: Case) -> None:
    ours, theirs = run(case)
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= case.tolerance, f"relative error {error:.2e}"
