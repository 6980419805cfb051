// The tiles of AMX in memory, on CPUs that have AVX-512 and its bf16 instructions, for
// g++ -DBF16_AMX -include emulated_tiles.h. A thread that has not configured its tiles ends the
// process.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

#define EMULATED_TILES

namespace {

thread_local uint32_t tiles[8][16][16];
thread_local bool configured = false;

inline uint32_t (&tile(int i))[16][16] {
    if (!configured) abort();
    return tiles[i];
}

struct TilesInUse {
    TilesInUse() { configured = true; }
    ~TilesInUse() { configured = false; }
};

template <int TO> void tile_zero() { memset(tile(TO), 0, sizeof tiles[TO]); }
template <int TO> void tile_load(const void *from, long stride) {
    for (int i = 0; i < 16; i++) memcpy(tile(TO)[i], (const char *)from + i * stride, 64);
}
template <int FROM> void tile_store(void *to, long stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * stride, tile(FROM)[i], 64);
}
template <int SUM, int A, int B> void tile_multiply_add() {
    for (int i = 0; i < 16; i++) {
        __m512 sum = _mm512_loadu_ps(tile(SUM)[i]);
        for (int k = 0; k < 16; k++)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(tile(A)[i][k]),
                                   (__m512bh)_mm512_loadu_si512(tile(B)[k]));
        _mm512_storeu_ps(tile(SUM)[i], sum);
    }
}

bool amx_is_permitted() { return true; }

}  // namespace
