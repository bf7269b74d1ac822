// One row of logits, vectorised with at::vec; included once for each instruction set, with CPU_CAPABILITY set.
//
// A row is read in blocks that fit the first-level cache: the largest entry of a block, then its exponentials, so that
// memory is read once whatever the order of the entries. Arithmetic and sums are float32.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "rows.h"

namespace dpo_fast {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kUnit = 2 * Vec::size();  // entries a step: two vectors of float32, one of half precision
constexpr int64_t kBlock = 2048;            // entries whose maximum and exponentials are taken together
constexpr float kLowest = -std::numeric_limits<float>::infinity();

template <typename T>
inline std::pair<Vec, Vec> load_unit(const T* x) {
  auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(x));
  return {a, b};
}

template <>
inline std::pair<Vec, Vec> load_unit<float>(const float* x) {
  return {Vec::loadu(x), Vec::loadu(x + Vec::size())};
}

template <typename T>
inline void store_unit(T* out, Vec a, Vec b) {
  at::vec::convert_from_float<T>(a, b).store(out);
}

template <>
inline void store_unit<float>(float* out, Vec a, Vec b) {
  a.store(out);
  b.store(out + Vec::size());
}

// exp(x) of x <= 0 to one unit in the last place, 0 where float32 has no such number, NaN of NaN.
// exp(x) = 2^n exp(r) with n = round(x / ln 2); ln 2 in two parts, so that r is exact; exp(r) by a polynomial of degree 6,
// the minimax of the relative error (3e-9) on |r| <= ln(2) / 2.
#if defined(CPU_CAPABILITY_AVX512)
inline Vec exp_nonpositive(Vec v) {
  // The second operand comes back where one is NaN.
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-104.0f), v);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.38145395e-3f), r, _mm512_set1_ps(8.36874545e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16683890e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166665211f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.49999994f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec exp_nonpositive(Vec v) {
  const __m256 least = _mm256_set1_ps(-87.0f), magic = _mm256_set1_ps(12582912.0f);
  const __m256 inside = _mm256_cmp_ps(v, least, _CMP_NLT_UQ);
  const __m256 x = _mm256_max_ps(least, v);
  // The last bits of `shifted` are n.
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(1.44269504f), magic);
  const __m256 n = _mm256_sub_ps(shifted, magic);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(1.38145395e-3f), r, _mm256_set1_ps(8.36874545e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.16683890e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.166665211f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.49999994f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_and_ps(p, inside);
}
#else
inline Vec exp_nonpositive(Vec v) { return v.exp(); }
#endif

// tanh(in * x) where logits are capped, in * x where not; z is `out` times the first, or the second.
template <bool CAPPED>
inline Vec inner(Vec x, const Transform& t) {
  x = x * Vec(t.in);
  return CAPPED ? x.tanh() : x;
}

template <bool CAPPED>
inline Vec transformed(Vec x, const Transform& t) {
  return CAPPED ? inner<true>(x, t) * Vec(t.out) : inner<false>(x, t);
}

inline float sum_of(Vec v) {
  float lanes[Vec::size()], total = 0;
  v.store(lanes);
  for (float lane : lanes) total += lane;
  return total;
}

inline float first_of(Vec v) {
  float lanes[Vec::size()];
  v.store(lanes);
  return lanes[0];
}

// The first n lanes, `rest` in the others.
inline Vec first(Vec v, int64_t n, float rest) {
  return n >= Vec::size() ? v : n <= 0 ? Vec(rest) : Vec::set(Vec(rest), v, n);
}

inline float largest_of(Vec v) {
  float lanes[Vec::size()];
  v.store(lanes);
  float top = lanes[0];
  for (float lane : lanes) top = lane > top || lane != lane ? lane : top;
  return top;
}

// f(a, b, n) for every step of x[0, size): the first n of two vectors count.
template <typename T, typename F>
inline void each_unit(const T* x, int64_t size, F f) {
  int64_t i = 0;
  for (; i + kUnit <= size; i += kUnit) {
    const auto [a, b] = load_unit(x + i);
    f(a, b, kUnit);
  }
  if (i < size) {
    T rest[kUnit] = {};
    std::memcpy(rest, x + i, (size - i) * sizeof(T));
    const auto [a, b] = load_unit(rest);
    f(a, b, size - i);
  }
}

template <typename T, bool CAPPED, bool STATISTICS>
inline RowSums reduce(const T* x, int64_t V, const Transform& t) {
  float top = kLowest;
  Vec total_a(0), total_b(0), weighted(0), squares(0);
  double plain = 0;
  for (int64_t start = 0; start < V; start += kBlock) {
    const int64_t size = std::min(kBlock, V - start);
    Vec top_a(kLowest), top_b(kLowest);
    each_unit(x + start, size, [&](Vec a, Vec b, int64_t n) {
      top_a = at::vec::maximum(top_a, first(a * Vec(t.in), n, kLowest));
      top_b = at::vec::maximum(top_b, first(b * Vec(t.in), n - Vec::size(), kLowest));
    });
    // z rises with in * x.
    const Vec most(largest_of(at::vec::maximum(top_a, top_b)));
    const float block_top = first_of(CAPPED ? most.tanh() * Vec(t.out) : most);
    if (!(block_top <= top)) {
      const float shrink = top == kLowest ? 0.0f : std::exp(top - block_top);
      if (STATISTICS && top != kLowest) weighted = weighted + (total_a + total_b) * Vec(top - block_top);
      total_a = total_a * Vec(shrink);
      total_b = total_b * Vec(shrink);
      weighted = weighted * Vec(shrink);
      squares = squares * Vec(shrink * shrink);
      top = block_top;
    }
    if (top == kLowest) continue;
    const Vec shift(top);
    Vec sum(0);
    each_unit(x + start, size, [&](Vec a, Vec b, int64_t n) {
      const Vec za = transformed<CAPPED>(a, t), zb = transformed<CAPPED>(b, t);
      const Vec ea = first(exp_nonpositive(za - shift), n, 0);
      const Vec eb = first(exp_nonpositive(zb - shift), n - Vec::size(), 0);
      total_a = total_a + ea;
      total_b = total_b + eb;
      if (STATISTICS) {
        // A masked word has z = -inf and e = 0; their product is 0.
        const Vec least(std::numeric_limits<float>::lowest());
        weighted = weighted + ea * at::vec::maximum(za - shift, least) + eb * at::vec::maximum(zb - shift, least);
        squares = squares + ea * ea + eb * eb;
        sum = sum + first(za, n, 0) + first(zb, n - Vec::size(), 0);
      }
    });
    plain += sum_of(sum);
  }
  return {top, sum_of(total_a + total_b), sum_of(weighted), sum_of(squares), float(plain)};
}

template <typename T, bool CAPPED>
inline void gradient(const T* x, T* out, int64_t V, const Transform& t, float shift, float factor) {
  const Vec minus(-shift), times(factor), one(1);
  const auto slope = [&](Vec v) {
    const Vec u = inner<CAPPED>(v, t);
    const Vec g = exp_nonpositive((CAPPED ? u * Vec(t.out) : u) + minus) * times;
    return CAPPED ? g * (one - u * u) : g;
  };
  each_unit(x, V, [&](Vec a, Vec b, int64_t n) {
    const Vec ga = slope(a), gb = slope(b);
    if (n == kUnit) {
      store_unit(out, ga, gb);
    } else {
      T rest[kUnit];
      store_unit(rest, ga, gb);
      std::memcpy(out, rest, n * sizeof(T));
    }
    out += n;
  });
}

template <typename T>
RowSums reduce_row(const void* x, int64_t V, const Transform& t, bool statistics) {
  const T* row = static_cast<const T*>(x);
  if (t.capped) return statistics ? reduce<T, true, true>(row, V, t) : reduce<T, true, false>(row, V, t);
  return statistics ? reduce<T, false, true>(row, V, t) : reduce<T, false, false>(row, V, t);
}

template <typename T>
void gradient_row(const void* x, void* out, int64_t V, const Transform& t, float shift, float factor) {
  const auto run = t.capped ? gradient<T, true> : gradient<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(out), V, t, shift, factor);
}

// By Dtype.
const RowKernels kRows[3] = {
    {reduce_row<float>, gradient_row<float>},
    {reduce_row<at::BFloat16>, gradient_row<at::BFloat16>},
    {reduce_row<at::Half>, gradient_row<at::Half>},
};

}  // namespace CPU_CAPABILITY
}  // namespace dpo_fast
