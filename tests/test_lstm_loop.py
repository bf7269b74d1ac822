"""The example of an LSTM: what is preferred becomes more frequent round by round, and it stays short."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "lstm_loop.py"


@pytest.mark.slow
def test_what_is_preferred_rises_round_by_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("lstm_loop", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.main(rounds=2)
    assert history[0] < 2
    assert history[0] + 0.3 < history[1] < history[2]


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 100
