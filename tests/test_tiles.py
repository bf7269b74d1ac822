"""Rows at a time: tiles, chunks and workspaces in whole steps; columns of coefficients; sums of sequences."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_tools import HALF

from dpo_fast.backends import eager
from dpo_fast.backends.sequences import segment_ids, segment_sum
from dpo_fast.ops import WORKSPACE_BYTES
from dpo_fast.ops.tiles import as_columns, workspace_rows


@given(n=st.integers(0, 70_000), limit=st.integers(0, 9000))
def test_chunks_are_whole_steps_and_leave_no_single_row(n, limit):
    rows = eager.whole_steps(limit) or eager.ROW_STEP
    parts = eager.chunks(n, rows)
    assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])][: len(parts)]
    assert parts[-1][1] == n if n else not parts
    sizes = [b - a for a, b in parts]
    assert all(0 < size <= rows for size in sizes)
    assert all(size % 128 == 0 for size in sizes[:-1]) or (rows == 128 and sizes[-2:] == [127, 2])
    assert sum(size < rows for size in sizes) <= 2
    assert 1 not in sizes or n == 1


@given(
    v=st.integers(1, 1 << 21), dtype=st.sampled_from([*HALF, torch.float32]), device=st.sampled_from(["cpu", "cuda"])
)
def test_tiles_are_whole_steps_that_fit(v, dtype, device):
    rows = eager.tile_rows(v, dtype, device)
    most = eager.TILE_BYTES[device] // (v * dtype.itemsize)
    assert rows % 128 == 0
    assert rows % 256 == 0 or rows == 128
    assert most - 255 <= rows <= max(most, 128)


@given(n=st.integers(0, 20_000), limit=st.integers(0, 9000))
def test_a_workspace_keeps_everything_or_whole_steps(n, limit):
    kept = eager.rows_within(n, limit)
    assert kept <= min(n, limit)
    assert kept == n or kept % 128 == 0 or (kept, n) == (127, 129)
    assert n - kept != 1 or n == 1
    assert kept == n or limit - kept < 256 + 128


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_coefficients_as_columns_keep_their_digits(dtype):
    """The bias gradient is one product with them: in half precision two columns hold a float32's first 16 bits."""
    wide = eager.wide_dtype(dtype)
    coef = torch.randn(300, 1, dtype=wide, generator=torch.Generator().manual_seed(0))
    columns = as_columns(coef, dtype)
    assert columns.dtype == dtype
    error = (columns.double().sum(1, keepdim=True) - coef.double()).abs() / coef.double().abs()
    assert error.max() <= (2**-15 if dtype in HALF else 0)


def test_rows_of_the_reference_shape():
    """V 128256 in bf16 on a GPU: 1,024 rows of a frozen output layer at a time, 4,096 of a trained one."""
    assert eager.tile_rows(128256, torch.bfloat16, "cuda") == 1024
    assert (
        eager.rows_within(16384, workspace_rows(torch.empty(128256, 0, dtype=torch.bfloat16), WORKSPACE_BYTES)) == 4096
    )
    assert eager.chunks(0, 1024) == []
    assert eager.chunks(2500, 1024) == [(0, 1024), (1024, 2048), (2048, 2500)]
    assert eager.chunks(2049, 1024) == [(0, 1024), (1024, 1920), (1920, 2049)]


def test_segment_sums():
    values = torch.randn(20)
    cu = torch.tensor([0, 0, 3, 3, 11, 20, 20], dtype=torch.int32)
    expected = torch.stack([values[a:b].double().sum() for a, b in itertools.pairwise(cu.tolist())]).float()
    assert torch.equal(segment_sum(values, cu), expected)
    assert segment_ids(cu, 20).tolist() == [1] * 3 + [3] * 8 + [4] * 9
    assert segment_sum(values[:0], cu * 0).eq(0).all()
