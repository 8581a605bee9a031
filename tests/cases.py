"""The former place of support/cases.py, for the tests that have not moved yet."""

from support.cases import *  # noqa: F403
