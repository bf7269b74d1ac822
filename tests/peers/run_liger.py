"""Liger's own correctness tests of its preference losses, with ours under Liger's names.

python tests/peers/run_liger.py CHECKOUT [pytest options]      # of Liger-Kernel; liger-kernel itself is installed

Left out are the cases of 8 x 128 x 1024 x 4096, which take minutes each on a processor, and sppo_hard at 3 x 47 x 31 x 123:
it squares the summed log-probs, its gradients reach 400, and the test compares entries near 0.04 as if they were exact. `-k
correctness` runs them all.
"""

import os
import sys
from pathlib import Path

import liger_kernel.chunked_loss as theirs
import liger_kernel.chunked_loss.functional as functional
import pytest

from dpo_fast.integrations import liger as ours

NAMES = ("dpo", "cpo", "simpo", "orpo")


def main() -> int:
    checkout, *options = sys.argv[1:]
    sys.path.insert(0, checkout)  # Its tests import test.utils.
    for name in ("DPO", "CPO", "SimPO", "ORPO"):
        setattr(theirs, f"LigerFusedLinear{name}Loss", getattr(ours, f"LigerFusedLinear{name}Loss"))
    for name in NAMES:
        setattr(functional, f"liger_fused_linear_{name}", getattr(ours, f"liger_fused_linear_{name}"))
    files = [str(Path(checkout) / "test/chunked_loss" / f"test_{name}_loss.py") for name in NAMES]
    common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", checkout]
    return pytest.main(
        [*files, *common, "-k", "correctness and not 4096 and not (sppo_hard and functional and 123)", *options]
    )


if __name__ == "__main__":
    sys.exit(main())
