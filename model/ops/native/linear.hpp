// Matrices: packed once at load, multiplied with rows of activations.
//
// The outputs are cut into strips of 16, one lane each. A strip of a quantised matrix holds, for
// each group of 32 inputs, the weights ordered so that four consecutive inputs of an output lie in
// one 32-bit lane (what `vpdpbusd` and `vpmaddubsw` multiply and add), and behind all groups their
// scales, and minimums where there are any, as fp16.
//
//   kQ4   weight = scale * q + minimum, q in 0..15: Q4_0 (minimum = -8 scale) and Q4_1
//   kQ8   weight = scale * q,           q in -127..127: Q8_0
//   kBF16, kF32   plain weights, [input][16]; the activations stay fp32
//
// y = sum over groups, in order: scale * d * dot(q, activation) + minimum * (d * sum(activation)),
// where the dot is exact in integers. A row's result never depends on the rows beside it.
#pragma once

#include <algorithm>
#include <cstddef>

#include "rows.hpp"

namespace hw {

constexpr int kStrip = 16;
constexpr int kAhead = 12288;  // bytes of weights to ask for beforehand

enum Kind : int32_t { kQ4 = 0, kQ8 = 1, kBF16 = 2, kF32 = 3 };

struct Matrix {
  int32_t kind, rows, cols, padding;
  const uint8_t* data;  // strips, each strip_bytes long, 64-byte aligned
  const float* bias;    // rows padded to whole strips, or null
};

inline bool is_quantized(const Matrix& m) { return m.kind == kQ4 || m.kind == kQ8; }
inline int num_strips(const Matrix& m) { return (m.rows + kStrip - 1) / kStrip; }

inline size_t strip_bytes(int kind, int cols) {
  const size_t groups = size_t(cols) / kGroup;
  switch (kind) {
    case kQ4: return groups * (256 + 64);
    case kQ8: return (groups * (512 + 32) + 63) / 64 * 64;
    case kBF16: return size_t(cols) * kStrip * 2;
    default: return size_t(cols) * kStrip * 4;
  }
}

// ------------------------------------------------------------------------ packing, once at load

// One row of GGUF blocks into lane `lane` of a strip. Q4_1: fp16 scale, fp16 minimum, 16 bytes: byte
// i has input i in its low half and input i + 16 in its high half. Q8_0: fp16 scale, 32 int8.
inline void pack_q4(const uint8_t* blocks, int cols, int lane, uint8_t* strip) {
  const int groups = cols / kGroup;
  for (int g = 0; g < groups; ++g) {
    const uint8_t* block = blocks + size_t(g) * 20;
    uint8_t* tile = strip + size_t(g) * 256;
    for (int i = 0; i < 32; ++i) {
      const uint8_t q = i < 16 ? block[4 + i] & 15 : block[4 + i - 16] >> 4;
      uint8_t& byte = tile[(i / 8) * 64 + lane * 4 + i % 4];
      byte = uint8_t(i % 8 < 4 ? (byte & 0xf0) | q : (byte & 0x0f) | (q << 4));
    }
    uint8_t* scales = strip + size_t(groups) * 256 + size_t(g) * 64 + lane * 2;
    std::memcpy(scales, block, 2);
    std::memcpy(scales + 32, block + 2, 2);
  }
}

inline void pack_q8(const uint8_t* blocks, int cols, int lane, uint8_t* strip) {
  const int groups = cols / kGroup;
  for (int g = 0; g < groups; ++g) {
    const uint8_t* block = blocks + size_t(g) * 34;
    uint8_t* tile = strip + size_t(g) * 512;
    for (int i = 0; i < 32; ++i) tile[(i / 4) * 64 + lane * 4 + i % 4] = block[2 + i];
    std::memcpy(strip + size_t(groups) * 512 + size_t(g) * 32 + lane * 2, block, 2);
  }
}

// One row of a packed matrix as floats: the embedding of a token.
inline void unpack_row(const Matrix& m, int row, float* out) {
  const uint8_t* strip = m.data + size_t(row / kStrip) * strip_bytes(m.kind, m.cols);
  const int lane = row % kStrip, groups = m.cols / kGroup;
  for (int i = 0; i < m.cols; ++i) {
    const int g = i / kGroup, k = i % kGroup;
    switch (m.kind) {
      case kQ4: {
        const uint16_t* s =
            reinterpret_cast<const uint16_t*>(strip + size_t(groups) * 256) + size_t(g) * 32;
        const uint8_t byte = strip[size_t(g) * 256 + (k / 8) * 64 + lane * 4 + k % 4];
        const int q = k % 8 < 4 ? byte & 15 : byte >> 4;
        out[i] = half_to_float(s[lane]) * float(q) + half_to_float(s[16 + lane]);
        break;
      }
      case kQ8: {
        const uint16_t* s =
            reinterpret_cast<const uint16_t*>(strip + size_t(groups) * 512) + size_t(g) * 16;
        const int8_t q = int8_t(strip[size_t(g) * 512 + (k / 4) * 64 + lane * 4 + k % 4]);
        out[i] = half_to_float(s[lane]) * float(q);
        break;
      }
      case kBF16:
        out[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(strip)[size_t(i) * kStrip + lane]);
        break;
      default:
        out[i] = reinterpret_cast<const float*>(strip)[size_t(i) * kStrip + lane];
    }
  }
}

// --------------------------------------------------------------- exact dots of a group of 32
//
// The 16 x 32 weights of one group times that group of M rows. The results are integers, given as
// floats.

inline int32_t four_bytes(const int8_t* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

#if HW_AVX512

template <int M>
inline void dots_q4(const uint8_t* tile, const QuantGroup* rows, F16* dot) {
  const __m512i low_mask = _mm512_set1_epi8(15);
  __m512i sum[M];
  for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    const __m512i both = _mm512_loadu_si512(tile + step * 64);
    const __m512i low = _mm512_and_si512(both, low_mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_mask);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      sum[m] = _mm512_dpbusd_epi32(sum[m], low, _mm512_set1_epi32(four_bytes(rows[m].q + step * 8)));
      sum[m] =
          _mm512_dpbusd_epi32(sum[m], high, _mm512_set1_epi32(four_bytes(rows[m].q + step * 8 + 4)));
    }
  }
  for (int m = 0; m < M; ++m) dot[m].v = _mm512_cvtepi32_ps(sum[m]);
}

// The weights are signed and `vpdpbusd` wants them unsigned: q + 128 is q with its top bit turned,
// and 128 * sum(activation) is taken away beforehand.
template <int M>
inline void dots_q8(const uint8_t* tile, const QuantGroup* rows, F16* dot) {
  const __m512i turn = _mm512_set1_epi8(int8_t(-128));
  __m512i sum[M];
  for (int m = 0; m < M; ++m) sum[m] = _mm512_set1_epi32(-128 * rows[m].sum);
#pragma GCC unroll 8
  for (int step = 0; step < 8; ++step) {
    const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(tile + step * 64), turn);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      sum[m] = _mm512_dpbusd_epi32(sum[m], weights,
                                   _mm512_set1_epi32(four_bytes(rows[m].q + step * 4)));
  }
  for (int m = 0; m < M; ++m) dot[m].v = _mm512_cvtepi32_ps(sum[m]);
}

#elif HW_AVX2

// Half a tile: 8 outputs. 8 products of at most 15 * 127, two by two, stay within int16: 8 * 2 * 15
// * 127 = 30480. The steps are unrolled for one row only: with more rows, an unrolled loop needs more
// registers than there are.
template <int M>
inline void half_q4_step(const uint8_t* tile, const QuantGroup* rows, int step, __m256i* sum) {
  const __m256i low_mask = _mm256_set1_epi8(15);
  const __m256i both = _mm256_loadu_si256((const __m256i*)(tile + step * 64));
  const __m256i low = _mm256_and_si256(both, low_mask);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_mask);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const __m256i a = _mm256_set1_epi32(four_bytes(rows[m].q + step * 8));
    const __m256i b = _mm256_set1_epi32(four_bytes(rows[m].q + step * 8 + 4));
    sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(low, a));
    sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(high, b));
  }
}

template <int M>
inline void half_q4(const uint8_t* tile, const QuantGroup* rows, __m256* dot) {
  __m256i sum[M];
  for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_si256();
  if (M == 1) {
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) half_q4_step<M>(tile, rows, step, sum);
  } else {
#pragma GCC unroll 1
    for (int step = 0; step < 4; ++step) half_q4_step<M>(tile, rows, step, sum);
  }
  for (int m = 0; m < M; ++m)
    dot[m] = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[m], _mm256_set1_epi16(1)));
}

// `vpmaddubsw` saturates on unsigned bytes beyond 127: |weight| <= 127 with its sign moved to the
// activation stays within int16 (2 * 127 * 127), but two of them do not.
template <int M>
inline void half_q8_step(const uint8_t* tile, const QuantGroup* rows, int step, __m256i* sum) {
  const __m256i weights = _mm256_loadu_si256((const __m256i*)(tile + step * 64));
  const __m256i size = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const __m256i four = _mm256_set1_epi32(four_bytes(rows[m].q + step * 4));
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four, weights));
    sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
}

template <int M>
inline void half_q8(const uint8_t* tile, const QuantGroup* rows, __m256* dot) {
  __m256i sum[M];
  for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_si256();
  if (M == 1) {
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) half_q8_step<M>(tile, rows, step, sum);
  } else {
#pragma GCC unroll 1
    for (int step = 0; step < 8; ++step) half_q8_step<M>(tile, rows, step, sum);
  }
  for (int m = 0; m < M; ++m) dot[m] = _mm256_cvtepi32_ps(sum[m]);
}

template <int M>
inline void dots_q4(const uint8_t* tile, const QuantGroup* rows, F16* dot) {
  __m256 half[M];
  half_q4<M>(tile, rows, half);
  for (int m = 0; m < M; ++m) dot[m].lo = half[m];
  half_q4<M>(tile + 32, rows, half);
  for (int m = 0; m < M; ++m) dot[m].hi = half[m];
}

template <int M>
inline void dots_q8(const uint8_t* tile, const QuantGroup* rows, F16* dot) {
  __m256 half[M];
  half_q8<M>(tile, rows, half);
  for (int m = 0; m < M; ++m) dot[m].lo = half[m];
  half_q8<M>(tile + 32, rows, half);
  for (int m = 0; m < M; ++m) dot[m].hi = half[m];
}

#else

template <int M>
inline void dots_q4(const uint8_t* tile, const QuantGroup* rows, F16* dot) {
  for (int m = 0; m < M; ++m) {
    int32_t sum[16] = {0};
    for (int step = 0; step < 4; ++step)
      for (int lane = 0; lane < 16; ++lane)
        for (int i = 0; i < 4; ++i) {
          const int both = tile[step * 64 + lane * 4 + i];
          sum[lane] += (both & 15) * rows[m].q[step * 8 + i] + (both >> 4) * rows[m].q[step * 8 + 4 + i];
        }
    for (int lane = 0; lane < 16; ++lane) dot[m].v[lane] = float(sum[lane]);
  }
}

template <int M>
inline void dots_q8(const uint8_t* tile, const QuantGroup* rows, F16* dot) {
  for (int m = 0; m < M; ++m) {
    int32_t sum[16] = {0};
    for (int step = 0; step < 8; ++step)
      for (int lane = 0; lane < 16; ++lane)
        for (int i = 0; i < 4; ++i)
          sum[lane] += int(int8_t(tile[step * 64 + lane * 4 + i])) * rows[m].q[step * 4 + i];
    for (int lane = 0; lane < 16; ++lane) dot[m].v[lane] = float(sum[lane]);
  }
}

#endif

// ------------------------------------------------------------------------ a strip times M rows

// Where the results of some strips and rows go: those of strip and row `first_*` come first in `y`,
// [row][stride]. `pairs`: two rows beside each other are the parts of one.
struct Output {
  float* y;
  int stride, first_strip, first_row;
  bool pairs;
};

inline void put(const Matrix& m, int strip, int row, F16 value, Output out) {
  if (m.bias) value = add(value, load(m.bias + strip * kStrip));
  store(out.y + size_t(row - out.first_row) * out.stride + (strip - out.first_strip) * kStrip, value);
}

// Rows row .. row + M - 1, all of one block. `fetch`: the weights are still in memory.
template <int M, bool q4>
inline void strip_quantized(const Matrix& m, int strip, QuantRow first, int row, bool fetch,
                            Output out) {
  const int groups = m.cols / kGroup;
  const size_t tile_bytes = q4 ? 256 : 512;
  const uint8_t* tile = m.data + size_t(strip) * strip_bytes(m.kind, m.cols);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + groups * tile_bytes);
  const QuantGroup* rows = first.first;
  const size_t share = strip_bytes(m.kind, m.cols) / groups;  // of a group, scales and all
  const uint8_t* ahead = tile + kAhead;
  F16 y[M];
  for (int i = 0; i < M; ++i) y[i] = zero();
  for (int g = 0; g < groups; ++g) {
    if (fetch)  // the CPU's own prefetcher stops at each page
      for (size_t line = 0; line < share; line += 64) __builtin_prefetch(ahead + line);
    ahead += share;
    F16 dot[M];
    if (q4) {
      dots_q4<M>(tile, rows, dot);
      const F16 scale = load_half(scales), minimum = load_half(scales + 16);
      for (int i = 0; i < M; ++i) {
        y[i] = fma(dot[i], mul(scale, splat(rows[i].d)), y[i]);
        y[i] = fma(minimum, splat(rows[i].s), y[i]);
      }
    } else {
      dots_q8<M>(tile, rows, dot);
      const F16 scale = load_half(scales);
      for (int i = 0; i < M; ++i) y[i] = fma(dot[i], mul(scale, splat(rows[i].d)), y[i]);
    }
    tile += tile_bytes;
    scales += q4 ? 32 : 16;
    rows += first.stride;
  }
  if (out.pairs)
    for (int i = 0; i + 1 < M; i += 2) put(m, strip, (row + i) / 2, add(y[i], y[i + 1]), out);
  else
    for (int i = 0; i < M; ++i) put(m, strip, row + i, y[i], out);
}

template <int M>
inline void strip_plain(const Matrix& m, int strip, const float* x, int row, Output out) {
  const uint8_t* data = m.data + size_t(strip) * strip_bytes(m.kind, m.cols);
  const uint16_t* narrow = reinterpret_cast<const uint16_t*>(data);
  const float* wide = reinterpret_cast<const float*>(data);
  F16 y[M];
  for (int i = 0; i < M; ++i) y[i] = zero();
  for (int k = 0; k < m.cols; ++k) {
    const F16 weights = m.kind == kBF16 ? load_bf16(narrow + size_t(k) * kStrip)
                                        : load(wide + size_t(k) * kStrip);
    for (int i = 0; i < M; ++i)
      y[i] = fma(weights, splat(x[size_t(row + i) * m.cols + k]), y[i]);
  }
  for (int i = 0; i < M; ++i) put(m, strip, row + i, y[i], out);
}

// One strip times rows [first, last) of `num_rows`, `first` a multiple of 8. `rows` are quantised
// rows or fp32 ones, as the matrix wants.
inline void strip_rows(const Matrix& m, int strip, char* rows, int num_rows, int first, int last,
                       Output out) {
  const float* x = reinterpret_cast<const float*>(rows);
  const bool quantized = is_quantized(m);
  int row = first;
#define HW_ROWS(M)                                                                    \
  for (; row + M <= last; row += M) {                                                 \
    if (!quantized) {                                                                 \
      strip_plain<M>(m, strip, x, row, out);                                          \
      continue;                                                                       \
    }                                                                                 \
    const QuantRow at = quant_row(rows, num_rows, m.cols, row);                       \
    if (m.kind == kQ4) strip_quantized<M, true>(m, strip, at, row, row == 0, out);    \
    else strip_quantized<M, false>(m, strip, at, row, row == 0, out);                 \
  }
#if HW_AVX512
  HW_ROWS(8)
#endif
  HW_ROWS(4)
  HW_ROWS(2)
  HW_ROWS(1)
#undef HW_ROWS
}

}  // namespace hw
