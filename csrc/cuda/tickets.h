// The order of work in dpo_fused (dpo.cu), as arithmetic without CUDA, so that a test can enumerate it on a CPU.
//
// There are N + B places, numbered pair by pair: its chosen rows, its rejected rows and one place without a row, so that a
// pair without rows is completed too. Each place has a row ticket and a gradient ticket. The tickets come in this order:
// the row tickets of `lead` places, then row and gradient tickets in turn, then the remaining gradient tickets. Both kinds
// come in the order of places, and the gradient ticket of a place follows the row tickets of the next `lead` places, which
// include the rest of its pair.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TICKET_FUNCTION __host__ __device__ __forceinline__
#else
#define TICKET_FUNCTION inline
#endif

namespace dpo_fast {

struct Turn {
  bool is_row;
  int place;
};

// The kind and place of a ticket, for ticket < 2 * places and lead <= places.
TICKET_FUNCTION Turn turn_of(int ticket, int places, int lead) {
  const int turn = ticket - lead;
  if (turn < 0) return {true, ticket};
  if (turn < 2 * (places - lead)) return {turn % 2 == 0, (turn % 2 == 0 ? lead : 0) + turn / 2};
  return {false, ticket - places};
}

// The first place of a pair; cu_rows [2B + 1] holds the first rows of the chosen, then of the rejected sequences.
TICKET_FUNCTION int first_place(const int* cu_rows, int B, int pair) {
  return cu_rows[pair] + (cu_rows[B + pair] - cu_rows[B]) + pair;
}

TICKET_FUNCTION int pair_rows(const int* cu_rows, int B, int pair) {
  return (cu_rows[pair + 1] - cu_rows[pair]) + (cu_rows[B + pair + 1] - cu_rows[B + pair]);
}

struct Place {
  int pair;
  int rows;      // rows of the pair
  int row;       // -1 for the place without a row
  int sequence;  // sequence of the row
};

TICKET_FUNCTION Place place_of(const int* cu_rows, int B, int place) {
  int pair = 0, end = B;
  while (end - pair > 1) {
    const int middle = pair + (end - pair) / 2;
    if (first_place(cu_rows, B, middle) <= place) {
      pair = middle;
    } else {
      end = middle;
    }
  }
  const int index = place - first_place(cu_rows, B, pair);
  const int chosen = cu_rows[pair + 1] - cu_rows[pair], rows = pair_rows(cu_rows, B, pair);
  if (index >= rows) return {pair, rows, -1, pair};
  if (index < chosen) return {pair, rows, cu_rows[pair] + index, pair};
  return {pair, rows, cu_rows[B + pair] + (index - chosen), B + pair};
}

// The lead is the largest pair, its place without a row, and half a grid. All row tickets of a pair are then taken at
// least a grid of tickets before its first gradient ticket, which finds them done and does not wait.
TICKET_FUNCTION int lead_of(int largest_pair, int blocks, int places) {
  const int lead = largest_pair + 1 + (blocks + 1) / 2;
  return lead < places ? lead : places;
}

}  // namespace dpo_fast
