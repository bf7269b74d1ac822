// The functions of one row of logits on a CPU. rows_kernel.h holds them once; rows_{default,avx2,avx512}.cpp compile them
// for three instruction sets.
#pragma once

#include <cstdint>

namespace dpo_fast {

// The transform before the softmax: z = out * tanh(in * x) where logits are soft-capped, otherwise z = in * x.
struct Transform {
  float in, out;
  bool capped;
};

// Sums over a row of V words, with e = exp(z - top).
struct RowSums {
  float top, total;                // the largest z, and the sum of e
  float weighted, squares, plain;  // sums of e * (z - top), of e * e and of z; only with statistics
};

struct RowKernels {
  RowSums (*reduce)(const void* x, int64_t V, const Transform& t, bool statistics);
  // out = factor * exp(z - shift) * (1 - tanh^2 where capped); out may be x. shift is at least the largest z.
  void (*gradient)(const void* x, void* out, int64_t V, const Transform& t, float shift, float factor);
  // z - shift of one word, computed as in the two functions above.
  float (*distance)(const void* x, const Transform& t, float shift);
};

// Each returns three tables: for float32, bfloat16 and float16.
const RowKernels* rows_default();
const RowKernels* rows_avx2();
const RowKernels* rows_avx512();

// The instruction set that runs here: DEFAULT, AVX2 or AVX512.
const char* instruction_set();

}  // namespace dpo_fast
