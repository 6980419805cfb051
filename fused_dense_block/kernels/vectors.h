// Vectors of the CPU, of float and of bf16, and memory that is kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <immintrin.h>

#ifndef __AVX2__  // with vectors of four, all is half as fast as by PyTorch's own operations
#error the kernels need AVX2
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define AVX512
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

// A build multiplies bf16 in one of three ways: widened to float; with BF16_DOT by vdpbf16ps, which
// sums products of pairs in float; with BF16_AMX by AMX, which does the same for matrices.
#if defined(BF16_DOT) || defined(BF16_AMX)
#define BF16_PAIRS
#if !(defined(AVX512) && defined(__AVX512BF16__))
#error pairs of bf16 need AVX-512 and its bf16 instructions
#endif
#endif
#ifdef BF16_AMX
constexpr bool AMX = true;
#else
constexpr bool AMX = false;
#endif

// A product is accumulated in registers, as a block of BLOCK rows by up to 3 vectors of LANES
// columns: 24 of the 32 registers of AVX-512, 12 of the 16 of AVX2 (to spill them: 20 times
// slower), 6 of the 8 of AMX, which have 16 rows each. STEP words of a row are multiplied at once.
constexpr int BLOCK = AMX ? 32 : LANES / 2, STEP = AMX ? 16 : 1;

constexpr long TILE = 64;            // pixels

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

struct bf16 { uint16_t bits; };

// Words of a tile's rows at once in the forward product, so that they stay in L1. On AVX2, 64 words
// of float took 3 to 20% less time than 128; of bf16, 128 are better.
template <class T> constexpr long WORDS_AT_ONCE = LANES == 8 && sizeof(T) == 4 ? 64 : 128;

// What a product reads, from maps of T. With the dot product a pair of bf16 fills a 32-bit word, as
// a float does: the loops over words are the same for both.
template <class T> struct Product { typedef float Element; static constexpr int PAIR = 1; };
#ifdef BF16_PAIRS
template <> struct Product<bf16> { typedef bf16 Element; static constexpr int PAIR = 2; };
#endif

constexpr long round_up(long n, long multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// How many words hold n values that are summed over, in whole steps; the values in them.
template <class T> constexpr long words_for(long n) {
    return round_up((n + Product<T>::PAIR - 1) / Product<T>::PAIR, STEP);
}
template <class T> constexpr long whole_steps(long n) { return words_for<T>(n) * Product<T>::PAIR; }

// ---- Vectors: whole, or their first lanes (the others read as 0 and are not written) ----

#ifdef AVX512
typedef __mmask16 Mask;
INLINE Mask first_lanes(long n) { return n >= LANES ? 0xffff : (1u << std::max(n, 0L)) - 1; }
#else
typedef int Mask;
INLINE Mask first_lanes(long n) { return std::clamp(n, 0L, long(LANES)); }

// Any number of bytes. They are rare, and inlined they would take a third of the time to compile.
template <class V> __attribute__((noinline)) V load_rest(const void *p, int bytes) {
    V v = {};
    memcpy(&v, p, bytes);
    return v;
}
template <class V> __attribute__((noinline)) void store_rest(void *p, V v, int bytes) {
    memcpy(p, &v, bytes);
}
#endif

template <class V> INLINE V load_bits(const void *p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> INLINE V load_bits(const void *p, Mask mask) {
    constexpr int SIZE = sizeof(V) / LANES;
#ifdef AVX512
    if constexpr (SIZE == 4) return (V)_mm512_maskz_loadu_epi32(mask, p);
    else return (V)_mm256_maskz_loadu_epi16(mask, p);
#else
    if (mask == LANES) return load_bits<V>(p);
    if (mask == LANES / 2) {  // the usual rest, as of growth rate 12
        if constexpr (SIZE == 4) return (V)_mm256_zextsi128_si256(_mm_loadu_si128((__m128i *)p));
        else return (V)_mm_loadl_epi64((__m128i *)p);
    }
    return load_rest<V>(p, mask * SIZE);
#endif
}
template <class V> INLINE void store_bits(void *p, V v) { memcpy(p, &v, sizeof v); }
template <class V> INLINE void store_bits(void *p, V v, Mask mask) {
    constexpr int SIZE = sizeof(V) / LANES;
#ifdef AVX512
    if constexpr (SIZE == 4) _mm512_mask_storeu_epi32(p, mask, (__m512i)v);
    else _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
#else
    if (mask == LANES) return store_bits(p, v);
    if (mask == LANES / 2) {
        if constexpr (SIZE == 4) _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128((__m256i)v));
        else _mm_storel_epi64((__m128i *)p, (__m128i)v);
        return;
    }
    store_rest(p, v, mask * SIZE);
#endif
}

INLINE uvec widen(hvec v) {
#ifdef AVX512
    return (uvec)_mm512_cvtepu16_epi32((__m256i)v);  // GCC 12 makes the other line four instructions
#else
    return __builtin_convertvector(v, uvec);
#endif
}
INLINE hvec round_to_bf16(vec v) {  // to nearest, ties to even; NaN stays NaN
#ifdef BF16_PAIRS
    return (hvec)_mm512_cvtneps_pbh((__m512)v);
#else
    uvec bits = (uvec)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : 0x7fc0 + uvec{}, hvec);
#endif
}

// An optional last argument is a Mask.
template <class... M> INLINE vec load(const float *p, M... m) { return load_bits<vec>(p, m...); }
template <class... M> INLINE vec load(const bf16 *p, M... m) {
    return (vec)(widen(load_bits<hvec>(p, m...)) << 16);
}
template <class... M> INLINE void store(float *p, vec v, M... m) { store_bits(p, v, m...); }
template <class... M> INLINE void store(bf16 *p, vec v, M... m) {
    store_bits(p, round_to_bf16(v), m...);
}

// As torch's threshold: what is compared with NaN passes, so that NaN in the input stays visible.
INLINE vec unless_negative(vec condition, vec v) { return condition <= 0 ? vec{} : v; }

INLINE vec keep_lanes(vec v, long n) {  // the first n; the others become 0
    uvec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return (vec)((uvec)v & (uvec)(lane < uint32_t(std::max(n, 0L))));
}

// Up to 3 vectors of columns, from `first`.
template <int N> struct Panel {
    static constexpr int NV = N, WIDTH = N * LANES;
    long first, columns;
    INLINE Mask mask(int v) const { return first_lanes(columns - first - v * LANES); }
};

// Calls body(panel) for panel after panel of the columns.
template <class Body> INLINE void for_panels(long columns, Body body) {
    for (long first = 0; first < columns;) {
        long vectors = (columns - first + LANES - 1) / LANES;
        if (vectors == 1) {
            body(Panel<1>{first, columns}), first += LANES;
        } else if (vectors == 2 || vectors == 4) {  // 2 + 2 is faster than 3 + 1
            body(Panel<2>{first, columns}), first += 2 * LANES;
        } else {
            body(Panel<3>{first, columns}), first += 3 * LANES;
        }
    }
}

// ---- Memory that is kept: a page that is touched for the first time costs more than its use ----

struct Buffer {
    void *data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
    template <class E> E *get(long count) {
        size_t bytes = count * sizeof(E) + 128;  // whole vectors may be read beyond the last
        if (bytes > size) {
            free(data);
            size = round_up(bytes + bytes / 4, 4096);
            data = aligned_alloc(4096, size);
            if (!data) throw std::bad_alloc();
        }
        return (E *)data;
    }
};
// Each thread has its own. Those from the second line on, and padded_buffer in training, belong to
// the thread that starts a team, and are shared by it.
thread_local Buffer input_buffer, gradient_buffer, pairs_buffer, output_buffer, tile_buffer;
thread_local Buffer filters_buffer, scale_buffer, partial_buffer, statistics_buffer;
thread_local Buffer shared_buffer, padded_buffer;

}  // namespace
