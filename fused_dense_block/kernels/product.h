// The matrix product of training, and filters as it reads them.
#pragma once

#include "amx.h"
#include "maps.h"
#include "vectors.h"

namespace {

template <class T> INLINE vec multiply_add(vec sum, uvec a, uvec b) {
#ifdef BF16_DOT
    if constexpr (std::is_same_v<T, bf16>)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + (vec)a * (vec)b;
}

// block[r][:] += sum over k of a(r, k) * b[k][:], where a(r, k) is a[r * lda + k], or
// a[k * lda + r] if TRANSPOSED; k counts words.
template <class T, int NV, bool TRANSPOSED>
INLINE void multiply(vec (&block)[BLOCK][NV], const void *a_words, long lda, const void *b_words,
                     long count) {
    const uint32_t *a = (const uint32_t *)a_words, *b = (const uint32_t *)b_words;
    for (long k = 0; k < count; k++) {
        uvec row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) row[v] = load_bits<uvec>(b + (k * NV + v) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK; r++) {
            uvec word = uvec{} + a[TRANSPOSED ? k * lda + r : r * lda + k];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) block[r][v] = multiply_add<T>(block[r][v], word, row[v]);
        }
    }
}

template <int NV> INLINE void load_block(vec (&block)[BLOCK][NV], const float *p, long ld) {
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) block[r][v] = p ? load(p + r * ld + v * LANES) : vec{};
}
template <int NV> INLINE void store_block(const vec (&block)[BLOCK][NV], float *p, long ld) {
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) store(p + r * ld + v * LANES, block[r][v]);
}

// block = a b
template <class T, int NV>
INLINE void multiply_block(vec (&block)[BLOCK][NV], const void *a, long lda, const uint32_t *b,
                           long count) {
    if constexpr (AMX) {
        multiply_tiles<BLOCK / TILE_ROWS, NV>((const uint32_t *)a, lda, {1, count, 0}, count, b,
                                              (float *)block, NV * LANES, false);
    } else {
        load_block(block, nullptr, 0);
        multiply<T, NV, false>(block, a, lda, b, count);
    }
}

// BLOCK rows of sums = or += a b
template <class T, int NV, bool TRANSPOSED = false>
INLINE void multiply_block(const void *a, long lda, const uint32_t *b, long count, float *sums,
                           long ld, bool add) {
    if constexpr (AMX) {
        multiply_tiles<BLOCK / TILE_ROWS, NV>((const uint32_t *)a, lda, {1, count, 0}, count, b,
                                              sums, ld, add);
    } else {
        vec block[BLOCK][NV];
        load_block(block, add ? sums : nullptr, ld);
        multiply<T, NV, TRANSPOSED>(block, a, lda, b, count);
        store_block(block, sums, ld);
    }
}

INLINE uvec pair(hvec low, hvec high) {
#ifdef AVX512
    uvec order;  // of 16-bit values, two in a word
    for (int i = 0; i < LANES; i++) order[i] = i | (LANES + i) << 16;
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
    return (uvec)_mm512_permutexvar_epi16((__m512i)order, both);
#else
    return widen(low) | (widen(high) << 16);
#endif
}

// Values of filters as a product reads them: one in a word, or a pair.
template <class T> INLINE uvec as_words(vec low, vec high) {
    if (Product<T>::PAIR == 2) return pair(round_to_bf16(low), round_to_bf16(high));
    if (std::is_same_v<T, bf16>) return widen(round_to_bf16(low)) << 16;
    return (uvec)low;
}

// The filters [O, taps, C] as a matrix with a row for each channel and a column for each (tap, o),
// or its transpose with the taps in reverse, as a product reads it: panel after panel of columns,
// in a panel row after row (or pair of rows). Padded with zeros to whole steps and vectors.
template <class T>
void pack_filters(const float *filters, const Shape &s, bool transpose, uint32_t *packed) {
    constexpr int PAIR = Product<T>::PAIR;
    const long rows = transpose ? s.columns() : s.channels, steps = words_for<T>(rows);
    const long columns = transpose ? s.channels : s.columns();
    // Where in the filters the values of a row or column begin.
    auto offset = [&](long i, bool is_channel) {
        if (is_channel) return i;
        long tap = i / s.outputs, o = i % s.outputs;
        return (o * s.taps() + (transpose ? s.taps() - 1 - tap : tap)) * s.channels;
    };
    for_panels(columns, [&](auto panel) {
        constexpr int NV = panel.NV, WIDTH = panel.WIDTH;
        const long first = panel.first, width = std::min<long>(WIDTH, columns - first);
        long offsets[WIDTH];
        for (long j = 0; j < width; j++)
            offsets[j] = offset(first + j, transpose);
        float values[2][WIDTH] = {};
#pragma omp for nowait
        for (long k = 0; k < steps; k++) {
            for (long i = k * PAIR; i < (k + 1) * PAIR; i++) {
                const float *row = filters + offset(i, !transpose);
                for (long j = 0; j < width; j++)
                    values[i % PAIR][j] = i < rows ? row[offsets[j]] : 0;
            }
            for (int v = 0; v < NV; v++) {
                vec low = load(values[0] + v * LANES), high = load(values[1] + v * LANES);
                store_bits(packed + first * steps + (k * NV + v) * LANES, as_words<T>(low, high));
            }
        }
    });
#pragma omp barrier
}

}  // namespace
