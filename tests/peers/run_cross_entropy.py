"""Cut Cross Entropy's own forward and backward tests on the processor, with ours under its name.

python tests/peers/run_cross_entropy.py CHECKOUT [pytest options]     # of ml-cross-entropy; the package is not needed

The tests ask for CUDA: a copy of them that says "cpu" is what runs, with the implementations that are not asked for left out.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from dpo_fast.integrations.cross_entropy import linear_cross_entropy

FILES = ("test_cce_loss_forward.py", "test_cce_loss_backward.py")


def main() -> int:
    checkout, *options = sys.argv[1:]
    sys.path.insert(0, checkout)
    import cut_cross_entropy

    cut_cross_entropy.linear_cross_entropy = linear_cross_entropy
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            text = (Path(checkout) / "tests" / name).read_text()
            text = text.replace('device="cuda"', 'device="cpu"').replace("@skip_no_cuda\n", "")
            text = text.replace("torch.cuda.manual_seed", "torch.manual_seed").replace(
                "not torch.cuda.is_available()", "False"
            )
            text = text.replace(
                '"z_loss", [True, False]', '"z_loss", [False]'
            )  # It needs return_lse, which ours refuses.
            (Path(folder) / name).write_text(text)
        common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", folder]
        return pytest.main([folder, *common, "-k", "not torch_compile and not cce_exact", *options])


if __name__ == "__main__":
    sys.exit(main())
