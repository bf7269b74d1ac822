// The functions of one row of logits, vectorised with at::vec. Each instruction set includes this file once, with
// CPU_CAPABILITY set.
//
// A row is read in blocks that fit the first-level cache: first the largest entry of a block, then its exponentials, so
// that memory is read once whatever the order of the entries. Arithmetic is float32.

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
constexpr int64_t kUnit = 2 * Vec::size();  // entries per step: two vectors of float32, one of half precision
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

// exp(x) for x <= 0 to one unit in the last place; NaN gives NaN. Results below the normal numbers are 0 or subnormal.
// exp(x) = 2^n exp(r) with n = round(x / ln 2). ln 2 is split into two parts, so that r is exact. exp(r) is a polynomial of
// degree 6 with the minimax relative error (3e-9) on |r| <= ln(2) / 2.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// exp(r), given x and n.
inline Vec exp_of_rest(Vec x, Vec n) {
  using at::vec::fmadd;
  const Vec r = fmadd(n, Vec(2.12194440e-4f), fmadd(n, Vec(-0.693359375f), x));
  Vec p = fmadd(Vec(1.38145395e-3f), r, Vec(8.36874545e-3f));
  for (float c : {4.16683890e-2f, 0.166665211f, 0.49999994f, 1.0f, 1.0f}) p = fmadd(p, r, Vec(c));
  return p;
}
#endif

#if defined(CPU_CAPABILITY_AVX512)
inline Vec exp_nonpositive(Vec v) {
  // max_ps returns its second operand where one is NaN.
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-104.0f), v);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  return _mm512_scalef_ps(exp_of_rest(x, n), n);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec exp_nonpositive(Vec v) {
  // `least` is the logarithm of the smallest normal number; below it the result is 0.
  const __m256 least = _mm256_set1_ps(-87.33654f), magic = _mm256_set1_ps(12582912.0f);
  const __m256 inside = _mm256_cmp_ps(v, least, _CMP_NLT_UQ);
  const __m256 x = _mm256_max_ps(least, v);
  // The last bits of `shifted` are n.
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(1.44269504f), magic);
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const __m256 p = exp_of_rest(x, _mm256_sub_ps(shifted, magic));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power)), inside);
}
#else
inline Vec exp_nonpositive(Vec v) { return v.exp(); }
#endif

// The transform before the softmax: none, a factor, or a soft cap. `plain` saves the multiplication.
enum class Kind { plain, scaled, capped };

inline Kind kind_of(const Transform& t) { return t.capped ? Kind::capped : t.in == 1 ? Kind::plain : Kind::scaled; }

// in * x, which rises with z.
template <Kind K>
inline Vec times_in(Vec x, const Transform& t) {
  return K == Kind::plain ? x : x * Vec(t.in);
}

// z, but for a soft cap without its factor `out`.
template <Kind K>
inline Vec inner(Vec x, const Transform& t) {
  return K == Kind::capped ? times_in<K>(x, t).tanh() : times_in<K>(x, t);
}

// z from u, the result of `inner`.
template <Kind K>
inline Vec outer(Vec u, const Transform& t) {
  return K == Kind::capped ? u * Vec(t.out) : u;
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

// v in the first n lanes and `rest` in the others.
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

// Calls f(a, b, n) for every step of x[0, size); of the entries in the two vectors the first n count.
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

template <typename T, Kind K, bool STATISTICS>
inline RowSums reduce(const T* x, int64_t V, const Transform& t) {
  float top = kLowest;
  Vec total_a(0), total_b(0), weighted(0), squares(0);
  double plain = 0;
  for (int64_t start = 0; start < V; start += kBlock) {
    const int64_t size = std::min(kBlock, V - start);
    Vec top_a(kLowest), top_b(kLowest);
    each_unit(x + start, size, [&](Vec a, Vec b, int64_t n) {
      top_a = at::vec::maximum(top_a, first(times_in<K>(a, t), n, kLowest));
      top_b = at::vec::maximum(top_b, first(times_in<K>(b, t), n - Vec::size(), kLowest));
    });
    // z rises with in * x, so the transform of the largest entry is enough.
    const Vec most(largest_of(at::vec::maximum(top_a, top_b)));
    const float block_top = first_of(K == Kind::capped ? outer<K>(most.tanh(), t) : most);
    if (!(block_top <= top)) {
      const float shrink = top == kLowest ? 0.0f : std::exp(top - block_top);
      // With a shrink of 0 the earlier words no longer count; their sum may become infinite, and 0 times that is NaN.
      if (STATISTICS && shrink != 0) weighted = weighted + (total_a + total_b) * Vec(top - block_top);
      total_a = total_a * Vec(shrink);
      total_b = total_b * Vec(shrink);
      weighted = weighted * Vec(shrink);
      squares = squares * Vec(shrink * shrink);
      top = block_top;
    }
    if (top == kLowest) {
      plain = kLowest;
      continue;
    }
    const Vec shift(top);
    Vec sum(0);
    each_unit(x + start, size, [&](Vec a, Vec b, int64_t n) {
      const Vec za = outer<K>(inner<K>(a, t), t), zb = outer<K>(inner<K>(b, t), t);
      const Vec da = za - shift, db = zb - shift;
      const Vec ea = first(exp_nonpositive(da), n, 0);
      const Vec eb = first(exp_nonpositive(db), n - Vec::size(), 0);
      total_a = total_a + ea;
      total_b = total_b + eb;
      if (STATISTICS) {
        // A masked word has z = -inf and e = 0; their product must be 0.
        const Vec least(std::numeric_limits<float>::lowest());
        weighted = weighted + ea * at::vec::maximum(da, least) + eb * at::vec::maximum(db, least);
        squares = squares + ea * ea + eb * eb;
        sum = sum + first(za, n, 0) + first(zb, n - Vec::size(), 0);
      }
    });
    plain += sum_of(sum);
  }
  return {top, sum_of(total_a + total_b), sum_of(weighted), sum_of(squares), float(plain)};
}

template <typename T, Kind K>
inline void gradient(const T* x, T* out, int64_t V, const Transform& t, float shift, float factor) {
  const Vec minus(shift), times(factor), one(1);
  const auto slope = [&](Vec v) {
    const Vec u = inner<K>(v, t);
    const Vec g = exp_nonpositive(outer<K>(u, t) - minus) * times;
    return K == Kind::capped ? g * (one - u * u) : g;
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

template <typename T, Kind K>
RowSums reduce_kind(const T* row, int64_t V, const Transform& t, bool statistics) {
  return statistics ? reduce<T, K, true>(row, V, t) : reduce<T, K, false>(row, V, t);
}

template <typename T>
RowSums reduce_row(const void* x, int64_t V, const Transform& t, bool statistics) {
  const T* row = static_cast<const T*>(x);
  switch (kind_of(t)) {
    case Kind::plain: return reduce_kind<T, Kind::plain>(row, V, t, statistics);
    case Kind::scaled: return reduce_kind<T, Kind::scaled>(row, V, t, statistics);
    default: return reduce_kind<T, Kind::capped>(row, V, t, statistics);
  }
}

template <typename T>
void gradient_row(const void* x, void* out, int64_t V, const Transform& t, float shift, float factor) {
  const Kind kind = kind_of(t);
  const auto run = kind == Kind::plain ? gradient<T, Kind::plain>
                   : kind == Kind::scaled ? gradient<T, Kind::scaled> : gradient<T, Kind::capped>;
  run(static_cast<const T*>(x), static_cast<T*>(out), V, t, shift, factor);
}

template <typename T>
float distance_of(const void* x, const Transform& t, float shift) {
  const Vec word(float(*static_cast<const T*>(x)));
  const Vec z = t.capped ? outer<Kind::capped>(inner<Kind::capped>(word, t), t) : inner<Kind::scaled>(word, t);
  return first_of(z - Vec(shift));
}

// One table per type of logits, in the order of rows.h.
const RowKernels kRows[3] = {
    {reduce_row<float>, gradient_row<float>, distance_of<float>},
    {reduce_row<at::BFloat16>, gradient_row<at::BFloat16>, distance_of<at::BFloat16>},
    {reduce_row<at::Half>, gradient_row<at::Half>, distance_of<at::Half>},
};

}  // namespace CPU_CAPABILITY
}  // namespace dpo_fast
