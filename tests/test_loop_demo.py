"""The embedded demonstration of the loop, with fewer questions and a smaller model than it has."""

import pytest

from dpo_fast.loop.demonstration import demonstrate


@pytest.mark.slow
def test_polite_answers_rise_and_the_report_is_named_last(tmp_path, capsys):
    options = {"rounds": 2, "questions": 160, "hidden_size": 64, "sft_epochs": 6}
    shares = demonstrate(str(tmp_path), **options)
    report = tmp_path / "loop" / "report.html"
    assert shares[0] < 0.5
    assert shares[0] < shares[1] < shares[2]
    assert "data:image/png;base64," in report.read_text()
    assert capsys.readouterr().out.rstrip().splitlines()[-1].endswith(report.absolute().as_uri())
    assert (tmp_path / "loop" / "best" / "model.safetensors").exists()
    # A second call computes nothing and shows the same.
    assert demonstrate(str(tmp_path), **options) == shares
