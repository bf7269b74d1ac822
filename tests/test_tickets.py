"""The order of tickets of CUDA's dpo_fused (csrc/cuda/tickets.h), compiled for the CPU and enumerated."""

import ctypes
import pathlib
import random
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")

HEADER = pathlib.Path(__file__).parents[1] / "csrc" / "cuda" / "tickets.h"
# For each ticket: 1 for a row ticket or 0, its place, pair, row and sequence; returns the tickets' number.
SOURCE = """
#include <algorithm>
#include "%s"
using namespace dpo_fast;
extern "C" int list_tickets(const int* cu_rows, int B, int blocks, int* out) {
  int largest = 0;
  for (int pair = 0; pair < B; pair++) largest = std::max(largest, pair_rows(cu_rows, B, pair));
  const int places = cu_rows[2 * B] + B, lead = lead_of(largest, blocks, places);
  for (int ticket = 0; ticket < 2 * places; ticket++) {
    const Turn turn = turn_of(ticket, places, lead);
    const Place place = place_of(cu_rows, B, turn.place);
    for (int x : {int(turn.is_row), turn.place, place.pair, place.rows, place.row, place.sequence}) *out++ = x;
  }
  return 2 * places;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tickets")
    source, built = folder / "tickets.cpp", folder / "tickets.so"
    source.write_text(SOURCE % HEADER)
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def tickets(library, lengths, blocks):
    """Rows of each sequence, B chosen first -> (is_row, place, pair, rows, row, sequence) of each ticket; bounds."""
    bounds = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    B = len(lengths) // 2
    count = 2 * (bounds[-1] + B)
    out = (ctypes.c_int * (6 * count))()
    assert library.list_tickets((ctypes.c_int * len(bounds))(*bounds), B, blocks, out) == count
    return [tuple(out[6 * i : 6 * i + 6]) for i in range(count)], bounds


def some_lengths(seed):
    rng = random.Random(seed)
    B, longest = rng.choice([1, 2, 3, 8, 33]), rng.choice([0, 1, 2, 7, 40])
    return [rng.choice([0, rng.randint(0, longest)]) for _ in range(2 * B)]


CASES = [[0, 0], [1, 0], [0, 1], [3, 2], [0, 0, 0, 5], [5, 0, 0, 0], [2, 0, 0, 1, 0, 3], [0] * 10, [9, 1, 1, 1, 1, 9]]


@pytest.mark.parametrize("blocks", [1, 2, 7, 396, 100000])
@pytest.mark.parametrize("lengths", CASES + [some_lengths(seed) for seed in range(40)], ids=str)
def test_every_row_has_its_two_tickets_in_order(library, lengths, blocks):
    found, bounds = tickets(library, lengths, blocks)
    B = len(lengths) // 2
    expected = []
    for pair in range(B):
        rows = lengths[pair] + lengths[B + pair]
        for sequence in (pair, B + pair):
            expected += [(pair, rows, row, sequence) for row in range(bounds[sequence], bounds[sequence + 1])]
        expected.append((pair, rows, -1, pair))
    # Each kind visits all places once, in order.
    for kind in (1, 0):
        of_kind = [x for x in found if x[0] == kind]
        assert [x[1] for x in of_kind] == list(range(len(expected)))
        assert [x[2:] for x in of_kind] == expected
    # A gradient ticket waits for its pair's row tickets: all of them come before, or it could wait for ever.
    last_row = {x[2]: i for i, x in enumerate(found) if x[0]}
    first_gradient = {x[2]: i for i, x in reversed(list(enumerate(found))) if not x[0]}
    assert all(last_row[pair] < first_gradient[pair] for pair in range(B))
    # And a grid of tickets before, so that it rarely waits at all, unless the rows come to an end.
    row_tickets_left = {i: sum(x[0] for x in found[i:]) for i in first_gradient.values()}
    for pair in range(B):
        if row_tickets_left[first_gradient[pair]]:
            assert first_gradient[pair] - last_row[pair] >= min(blocks, len(found)) // 2


def test_the_place_without_a_row_completes_an_empty_pair(library):
    found, _ = tickets(library, [2, 0, 1, 0], 4)
    assert [x[4] for x in found if x[0]] == [0, 1, 2, -1, -1]
