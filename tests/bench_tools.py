"""Parts of bench.gpu at toy sizes, and a file for the rows of a test."""

from pathlib import Path

import pytest

from bench import gpu
from bench.results import Results, read

ROOT = Path(__file__).parent.parent


@pytest.fixture(name="rows")
def rows_fixture(tmp_path):
    return Results(tmp_path / "rows.jsonl", "cpu", 600, part="test")


def run_part(name: str, folder: Path) -> list[dict]:
    assert gpu.main(["--part", name, "--dry-run", "--out", str(folder)]) == 0
    return read(folder / f"{name}.jsonl")
