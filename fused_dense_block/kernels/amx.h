// AMX: registers of 16 rows of 64 bytes, called tiles, and products of them.
//
// By inline assembly: the intrinsics of GCC take no constant of a template as a register's number,
// and those of GCC 12 tell the compiler of 8 bytes of the configuration only.
#pragma once

#include <type_traits>
#ifdef BF16_AMX
#include <unistd.h>
#include <sys/syscall.h>
#endif

#include "vectors.h"

namespace {

constexpr long TILE_ROWS = 16;

#ifndef EMULATED_TILES  // as tests/emulated_tiles.h does

// All eight tiles are whole. The configuration belongs to a thread, and costs when it is switched.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct TilesInUse {
    TilesInUse() {
        static constexpr TileConfig config;
        if (AMX) asm volatile("ldtilecfg %0" :: "m"(config));
    }
    ~TilesInUse() { if (AMX) asm volatile("tilerelease"); }
};

template <int TO> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" :: "i"(TO)); }
template <int TO> INLINE void tile_load(const void *from, long stride) {
    asm volatile("tileloadd (%1, %2), %%tmm%c0" :: "i"(TO), "r"(from), "r"(stride) : "memory");
}
template <int FROM> INLINE void tile_store(void *to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0, %1)" :: "r"(to), "r"(stride), "i"(FROM) : "memory");
}
template <int SUM, int A, int B> INLINE void tile_multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" :: "i"(SUM), "i"(A), "i"(B));
}

#ifdef BF16_AMX
bool amx_is_permitted() {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

#endif

// Calls body(constant) for the constants 0 to N - 1.
template <int N, class Body> INLINE void repeat(Body body) {
    if constexpr (N > 0) {
        repeat<N - 1>(body);
        body(std::integral_constant<int, N - 1>{});
    }
}

struct Runs { long count, words, stride; };  // of memory; stride: words from a run to the next

// sums = or += a b, for R * 16 rows of a and NV * 16 columns. A row of a is runs of words, `all`
// words in total; b has a row of NV * 16 words for each of them. lda and ld count words.
template <int R, int NV>
INLINE void multiply_tiles(const uint32_t *a, long lda, const Runs &runs, long all,
                           const uint32_t *b, float *sums, long ld, bool add) {
    static_assert(R * NV <= 6);
    const long width = NV * TILE_ROWS;
    auto sums_at = [&](int i) { return sums + i / NV * TILE_ROWS * ld + i % NV * TILE_ROWS; };
    repeat<R * NV>([&](auto i) {
        if (add) tile_load<i>(sums_at(i), 4 * ld);
        else tile_zero<i>();
    });
    for (long run = 0; run < runs.count; run++, a += runs.stride) {
        const long count = std::min(runs.words, all - run * runs.words);
        for (long k = 0; k < count; k += STEP, b += STEP * width)
            repeat<NV>([&](auto v) {
                tile_load<7>(b + v * TILE_ROWS, 4 * width);
                repeat<R>([&](auto i) {  // back and forth: the last rows of a stay loaded
                    constexpr int r = v % 2 ? R - 1 - i : i;
                    if constexpr (v == 0 || i > 0)
                        tile_load<6>(a + r * TILE_ROWS * lda + k, 4 * lda);
                    tile_multiply_add<r * NV + v, 6, 7>();
                });
            });
    }
    repeat<R * NV>([&](auto i) { tile_store<i>(sums_at(i), 4 * ld); });
}

#ifdef BF16_AMX

// rows[j][i] = rows[i][j]: exchanges quarters off the diagonal, then quarters of each quarter.
INLINE void transpose(uvec (&rows)[LANES]) {
#pragma GCC unroll 4
    for (uint32_t size = LANES / 2; size; size /= 2) {
        uvec upper, lower;  // lanes of row i, or LANES + lanes of row i + size
        for (uint32_t lane = 0; lane < LANES; lane++) {
            upper[lane] = lane & size ? LANES + lane - size : lane;
            lower[lane] = lane & size ? LANES + lane : lane + size;
        }
#pragma GCC unroll 16
        for (uint32_t i = 0; i < LANES; i++) {
            if (i & size) continue;
            const __m512i first = (__m512i)rows[i], second = (__m512i)rows[i + size];
            rows[i] = (uvec)_mm512_permutex2var_epi32(first, (__m512i)upper, second);
            rows[i + size] = (uvec)_mm512_permutex2var_epi32(first, (__m512i)lower, second);
        }
    }
}

// Compares a product of small integers, whose sums are exact in any order, with one in float.
bool amx_is_right() {
    constexpr long ROWS = 2 * TILE_ROWS, WORDS = 2 * STEP, COLUMNS = 3 * TILE_ROWS;
    alignas(64) uint16_t a[ROWS][WORDS][2], b[WORDS][COLUMNS][2];
    alignas(64) float sums[ROWS][COLUMNS], expected[ROWS][COLUMNS];
    uint32_t state = 1;
    auto next = [&] { return float((state = state * 1664525 + 1013904223) >> 28) - 8; };
    auto fill = [&](uint16_t *values, long n) {
        for (long i = 0; i < n; i++) {
            const float value = next();
            memcpy(&values[i], (char *)&value + 2, 2);
        }
    };
    auto value = [](uint16_t half) {
        const uint32_t bits = uint32_t(half) << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    };
    fill(a[0][0], sizeof a / 2);
    fill(b[0][0], sizeof b / 2);
    for (long i = 0; i < ROWS; i++)
        for (long j = 0; j < COLUMNS; j++) {
            expected[i][j] = sums[i][j] = next();
            for (long k = 0; k < 2 * WORDS; k++)
                expected[i][j] += value(a[i][k / 2][k % 2]) * value(b[k / 2][j][k % 2]);
        }
    TilesInUse tiles;
    multiply_tiles<2, 3>((uint32_t *)a, WORDS, {1, WORDS, 0}, WORDS, (uint32_t *)b, sums[0],
                         COLUMNS, true);
    return !memcmp(sums, expected, sizeof sums);
}

#endif

}  // namespace
