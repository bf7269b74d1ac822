"""Fixtures of several test files, and the profile with which hypothesis looks for longer than CI does (test_fuzz.py)."""

from hypothesis import HealthCheck, settings
from op_tools import backend, missing, recorded, table  # noqa: F401

settings.register_profile(
    "long", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
