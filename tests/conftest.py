"""Fixtures of several test files, and the profile with which hypothesis looks for longer than CI does (test_fuzz.py)."""

import atexit
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from op_tools import backend, missing, recorded, table  # noqa: F401

# Before `datasets` is imported, here or in a process that a test starts: what tests store goes with them.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dpo_fast_datasets_")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# For runs beside others of the same tests (fuzz_tools.py).
settings.register_profile("short")
settings.register_profile(
    "long", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
