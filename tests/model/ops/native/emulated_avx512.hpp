// AVX-512 on a machine that has none: SIMDe's intrinsics in place of the compiler's, over AVX2.
//
// Included before everything else (`-include`). Afterwards `simd.hpp` believes that it was compiled
// for AVX-512, and each `_mm512_*` it uses is a macro for SIMDe's function of the same meaning
// (github.com/simd-everywhere/simde, a separate work from the kernels and from these checks). The
// conversions that SIMDe 0.7.4 lacks are written here, as Intel's guide describes them. What
// neither has does not compile: "target specific option mismatch".
#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "the emulation stands on AVX2, FMA and F16C"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstring>

namespace emulated {

struct Halves {
  __m256i lo, hi;
};

inline Halves halves(__m512i a) {
  Halves h;
  std::memcpy(&h, &a, 64);
  return h;
}

template <class Whole, class Half>
inline Whole join(Half lo, Half hi) {
  Whole whole;
  std::memcpy(&whole, &lo, 32);
  std::memcpy(reinterpret_cast<char*>(&whole) + 32, &hi, 32);
  return whole;
}

inline __m512i cvtps_epi32(__m512 a) {
  const Halves h = halves(simde_mm512_castps_si512(a));
  return join<__m512i>(_mm256_cvtps_epi32(_mm256_castsi256_ps(h.lo)),
                       _mm256_cvtps_epi32(_mm256_castsi256_ps(h.hi)));
}

inline __m512 cvtepi32_ps(__m512i a) {
  const Halves h = halves(a);
  return join<__m512>(_mm256_cvtepi32_ps(h.lo), _mm256_cvtepi32_ps(h.hi));
}

inline __m512i cvtepi8_epi32(__m128i a) {
  return join<__m512i>(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}

inline __m512i cvtepu16_epi32(__m256i a) {
  return join<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                       _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}

inline __m512 cvtph_ps(__m256i a) {
  return join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                      _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

}  // namespace emulated

#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#define _mm512_cvtps_epi32(a) emulated::cvtps_epi32(a)
#define _mm512_cvtepi32_ps(a) emulated::cvtepi32_ps(a)
#define _mm512_cvtepi8_epi32(a) emulated::cvtepi8_epi32(a)
#define _mm512_cvtepu16_epi32(a) emulated::cvtepu16_epi32(a)
#define _mm512_cvtph_ps(a) emulated::cvtph_ps(a)

// What simd.hpp asks for; only now, or SIMDe would take it for the truth.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512VNNI__ 1
