"""bench.gpu without a GPU: every part at toy sizes, except the training steps (test_bench_steps.py).

The code is the same as on a GPU, except that a stand-in replaces torch.cuda (bench/clock.py).
"""

import dataclasses

import pytest
import torch
from bench_tools import rows_fixture, run_part  # noqa: F401 - the fixture `rows`
from torch._dynamo.testing import CompileCounterWithBackend

from bench import agreement, ceilings, common, gpu, parts
from bench.ops import OPS


def test_ceilings_and_products(tmp_path):
    found = run_part("ceilings", tmp_path)
    assert found[0]["bytes_per_second"] > 0
    assert found[0]["flops_per_second"] == max(found[0]["gemms"].values())
    assert [row["shape"] for row in found[1:]] == ["64 x 16 x 300"]
    assert {key.split(",")[0] for key in found[1]["gemms"]} == {"logits", "dH", "dW"}


def check_ops(found: list[dict], ops: set[str]) -> None:
    assert {row["op"] for row in found} == ops
    assert not [row for row in found if "failed" in row]
    for row in found:
        if "skipped" in row:
            continue
        assert row["seconds"] > 0
        assert row["floor_seconds"] / row["seconds"] == pytest.approx(row["share_of_floor"])
        assert len(row["all_seconds"]) == parts.DRY.repeats


def test_row_kernels(tmp_path):
    found = run_part("rows", tmp_path)
    check_ops(found, {op for op in OPS if not OPS[op].gemms})
    one_launch = {row["system"] for row in found if row["op"].startswith("dpo_loss")}
    assert {"dpo_fast torch", "dpo_fast torch, inplace", "dpo_fast csrc, two launches"} <= one_launch
    assert {row["shape"] for row in found} == {"64 x 300", "32 x 300"}


def test_head(tmp_path):
    check_ops(run_part("head", tmp_path), {op for op in OPS if OPS[op].gemms})


def test_peers_come_with_ours_in_turns(tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PLANS, True, dataclasses.replace(parts.DRY, logits=()))
    found = run_part("peers", tmp_path)
    check_ops(found, {op for op in OPS if OPS[op].gemms})
    assert {"torch eager", "torch.compile", "bare GEMMs"} <= {row["system"] for row in found if "seconds" in row}
    counter = CompileCounterWithBackend("eager")  # the tests after this one must compile again
    torch.compile(torch.sin, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1


def test_programs(tmp_path):
    found = [row for row in run_part("programs", tmp_path) if row["system"] == "dpo_fast csrc"]
    assert not [row for row in found if "failed" in row]
    assert {(row["op"], row["variant"][0]) for row in found} == {
        ("dpo_fused", "3"), ("dpo_fused", "1"), ("residual_", "2"), ("residual_", "1"),
    }  # fmt: skip
    assert all(row["errors"]["from the first"] == 0 for row in found if "seconds" in row)  # a CPU has no such choice


def test_chunks(tmp_path):
    found = run_part("chunks", tmp_path)
    assert not [row for row in found if "failed" in row]
    assert {row["op"] for row in found} == {
        "product logits", "product dH", "product dW", "residual_", "chunks of a frozen head",
        "chunks of a trained head", "chunk",
    }  # fmt: skip
    assert {row["rows"] for row in found if "rows" in row and row["D"] == 16} == {16, 24, 64}


def test_chunk_rows_are_those_of_the_package():
    weight = torch.zeros(300, 8)
    assert ceilings.chunk_rows(64, weight) == (64, 64)


def test_agreement(tmp_path):
    found = run_part("agreement", tmp_path)
    assert not [row for row in found if "failed" in row]
    ours = [row for row in found if "ok" in row]
    assert all(row["ok"] for row in ours)
    assert {row["variant"] for row in ours} >= {
        "padded", "inplace", "two launches", "cu_seqlens on the device", "several groups, cu_seqlens on the CPU",
        "rows past the workspace, cu_seqlens on the device",
    }  # fmt: skip
    assert {name for row in ours for name in row["errors"]} == {"loss", "logps", "logits", "hidden", "weight"}


@pytest.mark.parametrize("sabotage", ["loss", "gradient"])
def test_agreement_finds_what_is_wrong(rows, monkeypatch, sabotage):
    right = agreement.dpo_fast.dpo_loss

    def wrong(logits, *args, **options):
        out = right(logits, *args, **options)
        value = 1.001 * out.loss
        loss = value.detach() + (out.loss - out.loss.detach())
        if sabotage == "gradient":
            loss = out.loss.detach() + (value - value.detach())
        return dataclasses.replace(out, loss=loss)

    monkeypatch.setattr(agreement.dpo_fast, "dpo_loss", wrong)
    agreement.agreement(rows, torch.float32, *parts.DRY.agreement)
    verdicts = {"dpo_loss": set(), "linear_dpo_loss": set()}
    for row in rows.rows:
        if "ok" in row:
            verdicts[row["op"].split()[2]].add(row["ok"])
    assert verdicts == {"dpo_loss": {False}, "linear_dpo_loss": {True}}


def test_every_part_belongs_to_a_stage():
    assert parts.STAGES == ("smoke", "head", "tests")
    assert [name for stage in parts.STAGES for name in parts.names(stage)] == list(parts.PARTS) == parts.names(None)


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["git", ".git"])
def test_a_commit_that_nobody_knows(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert common.commit().startswith("unknown: ")
    assert len(common.commit()) > len("unknown: ")
