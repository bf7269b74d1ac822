"""TRL's own tests of its DPOTrainer, with dpo_fast.integrations.trl's in its place.

python tests/peers/run_trl.py CHECKOUT [pytest options]      # of TRL; trl 1.16 itself is installed

The tests load tiny models and data from a hub: stand-ins of the same names are written into the folder that they run in.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import stand_ins

HERE = Path(__file__).parent


def main() -> int:
    checkout, *options = sys.argv[1:]
    checkout = Path(checkout).resolve()
    path = os.pathsep.join(str(x) for x in (HERE, HERE.parents[1], os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.write(Path(folder))
        test = str(checkout / "tests" / "test_dpo_trainer.py")
        common = ["-q", "-p", "trl_plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(checkout)]
        command = [sys.executable, "-m", "pytest", test, *common, *options]
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
