"""TRL's own tests of its DPO trainer, with dpo_fast's trainer in the place of TRL's.

    python tests/peers/run_trl.py CHECKOUT [--peer] [pytest's options]

CHECKOUT is a clone of TRL's repository; nothing of it is copied. `--peer` leaves TRL's own trainer in place, for comparison:
some tests need a GPU, images or a network and fail there too. Models and data are made in a temporary folder that has their
names on the hub (stand_ins.py). docs/trl.md lists the outcome.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    if not arguments or not Path(arguments[0], "tests", "test_dpo_trainer.py").is_file():
        print("usage: python tests/peers/run_trl.py CHECKOUT_OF_TRL [--peer] [pytest's options]", file=sys.stderr)
        return 2
    checkout, *options = arguments
    checkout = Path(checkout).resolve()
    plugin = [] if "--peer" in options else ["-p", "trl_plugin"]
    options = [option for option in options if option != "--peer"]
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder, "hub")
        hub.mkdir()
        making = [sys.executable, "-c", "import pathlib, stand_ins; stand_ins.write(pathlib.Path.cwd())"]
        environment = {
            **os.environ, "HF_HOME": str(Path(folder, "home")), "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), str(checkout), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        subprocess.run(making, cwd=hub, env=environment, check=True, stderr=subprocess.DEVNULL)
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(checkout)]
        target = [f"{checkout}/tests/test_dpo_trainer.py", "-W", "ignore"]
        return subprocess.run([*pytest, *plugin, *options, *target], cwd=hub, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
