"""Which cases of a parametrized test are left to ``pytest -m slow``."""

import pytest


def some_slow(cases, slow):
    """The cases, of which those in ``slow`` are marked so: each repeats a mechanism that one of the others tests."""
    assert set(slow) <= set(cases), set(slow) - set(cases)
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]
