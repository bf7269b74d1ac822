"""docs/scale.md: its tables are what bench/scale.py prints, the sizes are the published ones, the configuration is taken."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

from bench import scale  # noqa: E402
from dpo_fast.cli.parse import parse  # noqa: E402
from dpo_fast.ops import WORKSPACE_BYTES  # noqa: E402
from dpo_fast.training.ref_cache import _RECORD  # noqa: E402

DOC = (Path(__file__).parent.parent / "docs/scale.md").read_text()


def test_the_tables_are_those_of_the_script():
    for name, table in scale.tables().items():
        assert f"### {name}\n\n{table}\n" in DOC


def test_the_sizes_are_the_published_ones():
    """Parameters of Llama 3.1 8B and 70B as their model cards' files hold them; the norms are left out."""
    assert scale.LLAMA["8B"].weights == pytest.approx(8_030_261_248, rel=1e-4)
    assert scale.LLAMA["70B"].weights == pytest.approx(70_553_706_496, rel=1e-4)
    assert scale.WORKSPACE == WORKSPACE_BYTES
    assert f"{_RECORD.itemsize} bytes per pair" in DOC


def test_the_configuration_is_one(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # transformers tells accelerate through the environment
    text = re.search(r"```yaml\n(.*?)```", DOC, re.S)[1]
    options = {"model_name_or_path": "m", "dataset_name": "d", "report_to": "none", **yaml.safe_load(text)}
    for argv in ([], ["--fsdp", "true"]):
        args = parse(argv, options)[1]
        assert args.fsdp is True
    assert args.fsdp_plugin_args["fsdp_version"] == 2
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
