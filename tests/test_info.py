"""`python -m dpo_fast.info`: what it prints, and that it needs the core install alone."""

import os
import subprocess
import sys

import torch

from dpo_fast import __version__, info
from dpo_fast.backends import resolve


def test_prints_versions_devices_and_back_ends(capsys):
    assert info.main([]) == 0
    sections, title = {}, None
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            name, value = line.split(maxsplit=1)
            sections[title][name] = value.strip()
        else:
            title = line
            sections[title] = {}
    assert list(sections) == ["Versions", "Devices", "Back ends"]
    assert sections["Versions"]["dpo_fast"] == __version__
    assert sections["Versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "cores" in sections["Devices"]["cpu"]
    assert len([name for name in sections["Devices"] if name.startswith("cuda:")]) == torch.cuda.device_count()
    assert sections["Back ends"]["torch"] == "available"


def test_available_back_ends_are_those_of_the_code():
    found = info.available_backends()
    assert list(found) == ["torch", "triton", "csrc"]
    fastest = resolve(None, "cuda" if torch.cuda.is_available() else "cpu").name
    assert found["torch"] is None
    assert found[fastest] is None


def test_versions_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package-of-dpo-fast"))
    found = info.versions()
    assert found["no-such-package-of-dpo-fast"] == "not installed"
    assert found["torch"] != "not installed"


def test_core_install_is_enough():
    blocked = ("transformers", "accelerate", "peft", "datasets", "safetensors", "yaml", "jinja2", "tokenizers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "sys.argv = ['info']; import runpy; runpy.run_module('dpo_fast.info', run_name='__main__')"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Back ends" in done.stdout
    assert "Traceback" not in done.stderr
