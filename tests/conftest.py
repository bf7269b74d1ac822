"""Fixtures of several test files, the helpers whose asserts show values, and a profile with which hypothesis looks for
longer than CI does (test_fuzz.py)."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from op_tools import backend, missing, recorded, table  # noqa: F401

# Before `datasets` is imported, here or in a process that a test starts: what tests store goes with them.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dpo_fast_datasets_")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# For runs beside others of the same tests (fuzz_tools.py).
settings.register_profile("short")
# pytest does this for test files by itself; it must come before these modules are imported.
pytest.register_assert_rewrite("bench_tools", "cli_tools", "disk_tools", "forest_tools", "kernel_tools", "model_tools")

settings.register_profile(
    "long", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def in_float64(monkeypatch):
    """Makes float32 mean float64 to models, which round some steps to it (norms, gemma2's softmax, routers).

    Without it a difference of 1e-16 before the rounding is one of 1e-7 after it, and no tolerance below that could be
    asked for.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
