// Sixteen lanes of float, whatever the machine: AVX-512, AVX2 with FMA, or plain C++.
//
// Every kernel is written once over this type. A lane is one output or one key, so that sums run
// down the lanes in a fixed order and never across them: the same bits for any number of rows.
// Each fused multiply-add is written as one (`fma`); the compiler may fuse nothing by itself
// (-ffp-contract=off), or the bits would depend on how a template was instantiated.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && !defined(HEADWATER_PORTABLE) && !defined(HEADWATER_AVX2)
#define HW_AVX512 1
#if defined(__AVX512BF16__) && !defined(HEADWATER_NO_BF16)
#define HW_BF16 1
#endif
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(HEADWATER_PORTABLE)
#define HW_AVX2 1
#include <immintrin.h>
#endif

namespace hw {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float tiny = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 64);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#if HW_AVX512

struct F16 {
  __m512 v;
};
inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 abs(F16 a) {
  return {_mm512_castsi512_ps(
      _mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
inline F16 load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
inline F16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// One register of pairs of bf16: the first of each pair, or the second.
using Lanes = F16;
inline Lanes first_of_pairs(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Lanes second_of_pairs(const uint16_t* p) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_and_epi32(_mm512_loadu_si512(p), upper))};
}
inline F16 divide(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// 2^n for n already an integer in [-126, 127]
inline F16 power_of_two(F16 n) {
  const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 23))};
}
inline F16 round(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a < b ? x : y
inline F16 select_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// Bit i says whether lane i of a is over that of b.
inline uint32_t greater_mask(F16 a, F16 b) {
  return uint32_t(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ));
}
// Sixteen floats, rounded to nearest even, as int8.
inline void store_int8(int8_t* p, F16 a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline F16 load_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}

#elif HW_AVX2

struct F16 {
  __m256 lo, hi;
};
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 abs(F16 a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
inline F16 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 widen_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F16 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
struct Lanes {
  __m256 v;
};
inline Lanes splat_lanes(float x) { return {_mm256_set1_ps(x)}; }
inline Lanes load_lanes(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes first_of_pairs(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16))};
}
inline Lanes second_of_pairs(const uint16_t* p) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), upper))};
}
inline F16 divide(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline __m256 power_of_two_8(__m256 n) {
  const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}
inline F16 power_of_two(F16 n) { return {power_of_two_8(n.lo), power_of_two_8(n.hi)}; }
inline F16 round(F16 a) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, how), _mm256_round_ps(a.hi, how)};
}
inline F16 select_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline uint32_t greater_mask(F16 a, F16 b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))) << 8;
}
inline void store_int8(int8_t* p, F16 a) {
  const __m256i words =
      _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(in_order),
                                        _mm256_extracti128_si256(in_order, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}
inline F16 load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

#else

struct F16 {
  float v[16];
};
#define HW_LANES(expression)                    \
  F16 r;                                        \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
inline F16 zero() { HW_LANES(0.0f); }
inline F16 splat(float x) { HW_LANES(x); }
inline F16 load(const float* p) { HW_LANES(p[i]); }
inline void store(float* p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F16 add(F16 a, F16 b) { HW_LANES(a.v[i] + b.v[i]); }
inline F16 mul(F16 a, F16 b) { HW_LANES(a.v[i] * b.v[i]); }
inline F16 max(F16 a, F16 b) { HW_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F16 fma(F16 a, F16 b, F16 c) { HW_LANES(a.v[i] * b.v[i] + c.v[i]); }  // not fused here
inline F16 abs(F16 a) { HW_LANES(__builtin_fabsf(a.v[i])); }
inline F16 load_half(const uint16_t* p) { HW_LANES(half_to_float(p[i])); }
inline F16 load_bf16(const uint16_t* p) { HW_LANES(bf16_to_float(p[i])); }
using Lanes = F16;
inline Lanes first_of_pairs(const uint16_t* p) { HW_LANES(bf16_to_float(p[2 * i])); }
inline Lanes second_of_pairs(const uint16_t* p) { HW_LANES(bf16_to_float(p[2 * i + 1])); }
inline F16 divide(F16 a, F16 b) { HW_LANES(a.v[i] / b.v[i]); }
inline float power_of_two_1(float n) {
  const uint32_t bits = uint32_t(int(n) + 127) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline F16 power_of_two(F16 n) { HW_LANES(power_of_two_1(n.v[i])); }
inline F16 round(F16 a) { HW_LANES(__builtin_rintf(a.v[i])); }
inline F16 select_less(F16 a, F16 b, F16 x, F16 y) {
  HW_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
inline uint32_t greater_mask(F16 a, F16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(a.v[i] > b.v[i]) << i;
  return mask;
}
inline void store_int8(int8_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(__builtin_rintf(a.v[i]));
}
inline F16 load_int8(const int8_t* p) { HW_LANES(float(p[i])); }
#undef HW_LANES

#endif

#if !HW_AVX2
inline Lanes splat_lanes(float x) { return splat(x); }
inline Lanes load_lanes(const float* p) { return load(p); }
#endif
constexpr int kLanes = sizeof(Lanes) / sizeof(float);

// Across the lanes, always in the same order: halves on halves.
#if HW_AVX512 || HW_AVX2
#if HW_AVX512
inline __m256 low_half(F16 a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(F16 a) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}
#else
inline __m256 low_half(F16 a) { return a.lo; }
inline __m256 high_half(F16 a) { return a.hi; }
#endif
inline float sum_lanes(F16 a) {
  const __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(F16 a) {
  const __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum_lanes(F16 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float max_lanes(F16 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
#endif

// 2^x. Cephes' exp2f polynomial on [-0.5, 0.5]; below -126 the result is 0, as softmax wants it.
inline F16 exp2(F16 x) {
  const F16 lowest = splat(-126.0f);
  const F16 clamped = max(x, lowest);
  const F16 n = round(clamped);
  const F16 f = fma(n, splat(-1.0f), clamped);
  F16 p = splat(1.535336188319500e-4f);
  p = fma(p, f, splat(1.339887440266574e-3f));
  p = fma(p, f, splat(9.618437357674640e-3f));
  p = fma(p, f, splat(5.550332471162809e-2f));
  p = fma(p, f, splat(2.402264791363012e-1f));
  p = fma(p, f, splat(6.931472028550421e-1f));
  p = fma(p, f, splat(1.0f));
  return select_less(x, lowest, zero(), mul(p, power_of_two(n)));
}

// e^x for x <= 0 within about one unit in the last place, exactly 1 at 0: Cephes' expf. The
// reduction takes ln 2 off in two parts; the first has few bits, so its product with n is exact.
// Below `kLowestExponent` the result is 0; all others are normal floats.
constexpr float kLowestExponent = -87.3365f;  // ln(2^-126), just above
inline F16 exp(F16 x) {
  const F16 lowest = splat(kLowestExponent);
  const F16 clamped = max(x, lowest);
  const F16 n = round(mul(clamped, splat(1.44269504088896341f)));
  const F16 f = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  F16 p = splat(1.9875691500e-4f);
  p = fma(p, f, splat(1.3981999507e-3f));
  p = fma(p, f, splat(8.3334519073e-3f));
  p = fma(p, f, splat(4.1665795894e-2f));
  p = fma(p, f, splat(1.6666665459e-1f));
  p = fma(p, f, splat(5.0000001201e-1f));
  p = fma(p, mul(f, f), add(f, splat(1.0f)));
  return select_less(x, lowest, zero(), mul(p, power_of_two(n)));
}

}  // namespace hw
