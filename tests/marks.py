"""Marks cases of a parametrized test as slow, so that only ``pytest -m slow`` runs them."""

import pytest


def some_slow(cases, slow):
    """Returns the cases, with those in ``slow`` marked slow. A slow case repeats what another case tests."""
    assert set(slow) <= set(cases), set(slow) - set(cases)
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]
