"""The checks that bench.gpu makes before it measures: the build, chosen tests, compute-sanitizer. What fails is a row."""

import subprocess
import sys

import pytest
from bench_tools import ROOT, rows_fixture  # noqa: F401 - the fixture `rows`

from bench import checks


@pytest.mark.slow
def test_tests_and_a_test_that_is_not_there(rows):
    checks.run_tests(rows, (*checks.DRY, "tests/test_packing.py::test_no_such_thing"), 120, "smoke tests")
    missing, counts = rows.rows
    assert missing["failed"] == "there is no such test: tests/test_packing.py::test_no_such_thing"
    assert (counts["passed"], counts["red"]) == (1, 0)
    assert "failed" not in counts


def test_red_tests_are_rows(rows, tmp_path):
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_red.py"
    path.write_text("def test_a():\n    assert 1 == 2\n\ndef test_b():\n    pass\n")
    checks.run_tests(rows, ["-c", "/dev/null", "--rootdir", str(tmp_path), str(path)], 120, "GPU tests")
    red, counts = rows.rows
    assert "test_a" in red["failed"]
    assert (counts["passed"], counts["red"]) == (1, 1)
    assert any("assert 1 == 2" in text for text in counts["last_lines"])


def test_tests_side_by_side_are_counted(rows, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_red.py"
    path.write_text("import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_a(x):\n    assert x == 'c'\n")
    checks.run_tests(rows, ["-c", "/dev/null", "--rootdir", str(tmp_path), "-n", "2", str(path)], 120, "GPU tests")
    red, counts = rows.rows
    assert red["test"].endswith("test_a[a b]")
    assert (counts["passed"], counts["red"]) == (1, 1)


def test_a_test_that_hangs_is_left_behind(rows, tmp_path):
    """The arguments are those of pytest; the program here says what pytest would."""
    program = tmp_path / "pytest_.py"
    program.write_text(
        "import sys, time\n"
        "for test in (x for x in sys.argv if '::' in x):\n"
        "    if 'hangs' in test:\n"
        "        time.sleep(600)\n"
        "    print(test, 'PASSED [ 50%]', flush=True)\n"
    )
    tests = ["tests/x.py::a", "tests/x.py::hangs", "tests/x.py::b", "tests/x.py::c"]
    checks.run_tests(rows, tests, 60, "smoke tests", 2, [sys.executable, str(program)])
    assert [row["passed"] for row in rows.rows if "passed" in row] == [1, 2]
    assert [row["test"] for row in rows.rows if "test" in row] == ["tests/x.py::hangs"]


@pytest.mark.slow
def test_the_chosen_tests_exist():
    """On a GPU a test of a back end is called "csrc on cuda"; a CPU has the same test of plain torch."""
    files = sorted({test.split("::")[0] for test in checks.SMOKE})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for test in checks.SMOKE:
        assert test.replace("csrc on cuda", "torch").replace("triton on cuda", "torch") in out, test
    assert 30 <= len(checks.SMOKE) <= 45


def test_without_compute_sanitizer(rows):
    checks.sanitize(rows, 60, checks.DRY, tool=["no-such-sanitizer"])
    assert [row["op"] for row in rows.rows] == ["compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert all("no-such-sanitizer" in row["failed"] for row in rows.rows)


def test_a_build_that_fails_is_a_row(rows):
    checks.build(rows, 60, [sys.executable, "-c", "print('nvcc: no'); raise SystemExit(1)"])
    (row,) = rows.rows
    assert row["failed"] == "exit status 1"
    assert row["last_lines"] == ["nvcc: no"]
    assert row["back_ends"]["torch"] is None


def test_a_build_says_why_cuda_failed_although_the_rest_was_built(rows):
    code = "print('x.cu(3): error: no such thing')\nfor k in range(99): print('gcc', k)\nraise SystemExit(1)"
    checks.build(rows, 60, [sys.executable, "-c", code])
    assert rows.rows[0]["last_lines"] == ["x.cu(3): error: no such thing"]


def test_no_build_takes_what_is_there(rows):
    checks.build(rows, 0, [sys.executable, "-c", "raise SystemExit(1)"])
    assert rows.rows[0]["back_ends"]["torch"] is None
    assert rows.rows[0].get("failed") == rows.rows[0]["back_ends"]["csrc"]
