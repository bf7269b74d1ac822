"""The peers themselves, unmodified: each runner of tests/peers/ where its package (and for two, a checkout) is there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runner: package, how to get it, and the variable that names a checkout where the package holds no tests.
RUNNERS = {
    "llamafactory": (
        "llamafactory",
        "pip install llamafactory==0.9.5 (it pins trl 0.24: an environment of its own)",
        None,
    ),
    "axolotl": ("axolotl", "pip install axolotl==0.19.0 (it pins trl 1.9: an environment of its own)", None),
    "torchtune": ("torchtune", "pip install torchtune==0.6.1 torchao==0.15.0 (its recipes want torchvision too)", None),
    "liger": ("liger_kernel", "pip install liger-kernel==0.8.5", "LIGER_CHECKOUT"),
    "cross_entropy": ("torch", "", "CUT_CROSS_ENTROPY_CHECKOUT"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNERS)
def test_the_peer_itself(name):
    package, how, variable = RUNNERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {how}")
    if variable and variable not in os.environ:
        pytest.skip(f"its tests are in no package: {variable}=FOLDER names a checkout")
    checkout = [os.environ[variable]] if variable else []
    command = [sys.executable, str(ROOT / "tests" / "peers" / f"run_{name}.py"), *checkout]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
