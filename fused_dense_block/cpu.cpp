// The operations of a dense block in training, as CPU kernels: norm-ReLU-convolution, its backward,
// batch statistics, and the last step of a norm's backward; and in evaluation a whole block.
// `cpu.py` compiles and calls them.
//
// A feature map [N, C, H, W] lies in NHWC: a matrix with a row for each pixel and a column for each
// channel. `ld` elements lead from a row to the next, so that some channels of a wider buffer are a
// map, too. Elements are float or bf16; sums are float32, and statistics are combined in double.
//
// In training all convolutions are one matrix product, by tiles of TILE pixels that stay in cache:
//
//   1x1, forward     z = y W                          y = relu(norm(x)), computed tile by tile
//   1x1, backward    dy = dz W', dW = dz' y           both from one visit to x
//   3x3, forward     P = y W with 9 * O columns, then z = the sum of nine shifted slices of P
//   3x3, backward    as 1x1, with nine shifted copies of dz beside each other in place of dz
//
// The copies are on the side of the outputs, which in a DenseNet are few (k), and not on the side
// of the inputs (4k or more). Whatever else there is to do for a pixel (norm, ReLU and its mask,
// pooling, sums) is done while the tile is in cache, and costs little. That is why the convolutions
// are here at all: around those of a library, the same would be passes over memory, which cost as
// much as the convolutions themselves.
//
// Two runs give the same bits: in training each thread has a fixed range of rows, and partial sums
// are added in the order of the threads.

#ifndef __AVX2__  // with vectors of four, all is half as fast as by PyTorch's own operations
#error the kernels need AVX2
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#include <omp.h>
#include <sched.h>
#include <unistd.h>
#include <sys/syscall.h>
#include <immintrin.h>

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
// columns: 24 of the 32 registers of AVX-512, 12 of the 16 of AVX2 (to spill them: 20 times slower),
// and 6 of the 8 of AMX, each of which has 16 rows. STEP words of a row are multiplied at once.
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
template <class T> constexpr long words(long n) {
    return round_up((n + Product<T>::PAIR - 1) / Product<T>::PAIR, STEP);
}
template <class T> constexpr long whole_steps(long n) { return words<T>(n) * Product<T>::PAIR; }

// ---- Vectors: whole, or their first lanes (the others read as 0 and are not written) ----

#ifdef AVX512
typedef __mmask16 Mask;
INLINE Mask first_lanes(long n) { return n >= LANES ? 0xffff : (1u << std::max(n, 0L)) - 1; }
#else
typedef int Mask;
INLINE Mask first_lanes(long n) { return std::clamp(n, 0L, long(LANES)); }
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
    V v = {};
    for (int i = 0; i < mask; i++) memcpy((char *)&v + i * SIZE, (const char *)p + i * SIZE, SIZE);
    return v;
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
    for (int i = 0; i < mask; i++) memcpy((char *)p + i * SIZE, (char *)&v + i * SIZE, SIZE);
#endif
}

INLINE uvec widen(hvec v) { return __builtin_convertvector(v, uvec); }
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
// Each thread has its own; those of the second line are shared by the threads that it starts.
thread_local Buffer input_buffer, gradient_buffer, pairs_buffer, output_buffer, tile_buffer;
thread_local Buffer kernel_buffer, partial_buffer, statistics_buffer, padded_buffer, shared_buffer;

// ---- Maps ----

template <class T> struct Map {
    T *data;
    long ld;
    INLINE T *row(long i) const { return data + i * ld; }
};

struct Norm { const float *mean, *scale, *bias; };  // (x - mean) * scale + bias

struct Shape {
    long images, height, width, channels;  // of x
    long outputs, side;                    // of the convolution: side is 1 or 3
    bool pool;                             // 2x2, before the convolution
    long out_height() const { return pool ? height / 2 : height; }
    long out_width() const { return pool ? width / 2 : width; }
    long rows() const { return images * out_height() * out_width(); }
    long taps() const { return side * side; }
    long columns() const { return taps() * outputs; }
};

// What a convolution reads: relu(norm(x)), pooled or not.
template <class T> struct Input {
    Map<const T> x;
    Norm norm;
    Shape shape;
};

// The rows of x that a tile reads; with pooling, the first of the four that make a pixel.
template <bool POOL> struct Pixels {
    long first, at[POOL ? TILE : 1];
    Pixels(const Shape &s, long row) : first(row) {
        if (!POOL) return;
        long x = row % s.out_width(), line = row / s.out_width();
        long y = line % s.out_height(), image = line / s.out_height();
        for (long r = 0; r < TILE; r++) {
            at[r] = (image * s.height + 2 * y) * s.width + 2 * x;
            if (++x == s.out_width()) x = 0, y++;
            if (y == s.out_height()) y = 0, image++;
        }
    }
    INLINE long operator[](long r) const { return POOL ? at[r] : first + r; }
};

// ---- AMX: registers of 16 rows of 64 bytes, called tiles ----
//
// By inline assembly: the intrinsics of GCC take no constant of a template as a register's number,
// and those of GCC 12 tell the compiler of 8 bytes of the configuration only.

constexpr long TILE_ROWS = 16;

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
                repeat<R>([&](auto r) {
                    tile_load<6>(a + r * TILE_ROWS * lda + k, 4 * lda);
                    tile_multiply_add<r * NV + v, 6, 7>();
                });
            });
    }
    repeat<R * NV>([&](auto i) { tile_store<i>(sums_at(i), 4 * ld); });
}

// rows[j][i] = rows[i][j]: exchanges quarters off the diagonal, then quarters of each quarter.
INLINE void transpose(uvec (&rows)[LANES]) {
#ifdef AVX512
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
#endif
}

// Runs body(thread, team) in a team of threads, and returns their number.
template <class Body> int parallel(int threads, Body body) {
    int team = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team = omp_get_num_threads();
        TilesInUse tiles;
        body(omp_get_thread_num(), team);
    }
    return team;
}

struct Range { long begin, end; };
Range share_of_thread(long n, long multiple, int thread, int threads) {
    long units = (n + multiple - 1) / multiple;
    return {std::min(n, units * thread / threads * multiple),
            std::min(n, units * (thread + 1) / threads * multiple)};
}

// ---- The matrix product ----

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

INLINE uvec pair(hvec low, hvec high) { return widen(low) | (widen(high) << 16); }

// Values of a kernel as a product reads them: one in a word, or a pair.
template <class T> INLINE uvec as_words(vec low, vec high) {
    if (Product<T>::PAIR == 2) return pair(round_to_bf16(low), round_to_bf16(high));
    if (std::is_same_v<T, bf16>) return widen(round_to_bf16(low)) << 16;
    return (uvec)low;
}

// The kernel [O, taps, C] as a matrix with a row for each channel and a column for each (tap, o),
// or its transpose with the taps in reverse, as a product reads it: panel after panel of columns,
// in a panel row after row (or pair of rows). Padded with zeros to whole steps and vectors.
template <class T>
void pack_kernel(const float *kernel, const Shape &s, bool transpose, uint32_t *packed) {
    constexpr int PAIR = Product<T>::PAIR;
    const long rows = transpose ? s.columns() : s.channels, steps = words<T>(rows);
    const long columns = transpose ? s.channels : s.columns();
    // Where in the kernel the values of a row or column begin.
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
                const float *row = kernel + offset(i, !transpose);
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

// ---- relu(norm(x)) ----

struct NormVectors { vec mean, scale, bias; };
INLINE NormVectors load_norm(const Norm &norm, long channel, Mask mask) {
    return {load(norm.mean + channel, mask), load(norm.scale + channel, mask),
            load(norm.bias + channel, mask)};
}

// One vector of channels of one pixel of what is convolved: of x, or the average of four.
template <bool POOL, class T>
INLINE vec norm_relu(const T *x, long ld, long width, const NormVectors &norm, Mask mask) {
    auto one = [&](const T *p) {
        vec v = (load(p, mask) - norm.mean) * norm.scale + norm.bias;
        return unless_negative(v, v);
    };
    if (!POOL) return one(x);
    const T *below = x + width * ld;
    return (one(x) + one(x + ld) + one(below) + one(below + ld)) * 0.25f;
}

// A tile's rows and `count` channels from `first` into y, padded with zeros to whole steps.
template <bool POOL, class T, class E>
INLINE void norm_relu_tile(const Input<T> &in, const Pixels<POOL> &pixels, long n, long first,
                           long count, E *y, long ldy) {
    for_panels(whole_steps<T>(count), [&](auto panel) {
        constexpr int NV = panel.NV;
        Mask mask[NV];
        NormVectors norm[NV];
        for (int v = 0; v < NV; v++) {
            mask[v] = first_lanes(count - panel.first - v * LANES);
            norm[v] = load_norm(in.norm, first + panel.first + v * LANES, mask[v]);
        }
        for (long r = 0; r < n; r++) {
            const T *x = in.x.row(pixels[r]) + first + panel.first;
            for (int v = 0; v < NV; v++)
                store(y + r * ldy + panel.first + v * LANES,
                      norm_relu<POOL>(x + v * LANES, in.x.ld, in.shape.width, norm[v], mask[v]));
        }
    });
}

// Into the cache, for later: rows of a wide buffer are so far apart that the hardware does not
// foresee them. This is worth a quarter of the time.
template <class T> INLINE void prefetch(const T *p, long count) {
    for (const T *end = p + count; p < end; p += 64 / sizeof(T)) __builtin_prefetch(p, 0, 3);
}
template <class T, bool POOL>
INLINE void prefetch_block(const Map<T> &x, const Shape &s, const Pixels<POOL> &pixels, long r,
                           long channel, long count) {
    for (long end = r + BLOCK; r < end; r++) {
        const T *p = x.row(pixels[r]) + channel;
        prefetch(p, POOL ? x.ld + count : count);
        if (POOL) prefetch(p + s.width * x.ld, x.ld + count);
    }
}

// ---- Statistics: of tiles, combined as by Chan, Golub, LeVeque (1979) ----

struct Moments {
    long channels;
    double *count, *mean, *squares;  // squares: sums of squared deviations

    Moments(double *data, long channels)
        : channels(channels), count(data), mean(data + 1), squares(data + 1 + channels) {}

    // Adds those of n other values.
    template <class V> void combine(double n, const V *other_mean, const V *other_squares) const {
        if (n == 0) return;
        const double share = n / (*count + n);
        for (long i = 0; i < channels; i++) {
            double delta = other_mean[i] - mean[i];
            mean[i] += delta * share;
            squares[i] += other_squares[i] + delta * delta * *count * share;
        }
        *count += n;
    }

    // Adds n rows of x, at most TILE, and prefetches as many after them if `more` follow.
    template <class T> void add_tile(const T *x, long ld, long n, bool more = false) const {
        float *tile_mean = tile_buffer.get<float>(2 * round_up(channels, LANES));
        float *tile_squares = tile_mean + round_up(channels, LANES);
        for_panels(channels, [&](auto panel) {
            constexpr int NV = panel.NV;
            const T *p = x + panel.first;
            vec origin[NV], sum[NV] = {}, squares[NV] = {};  // of differences to the first row
            for (int v = 0; v < NV; v++) origin[v] = load(p + v * LANES, panel.mask(v));
            for (long r = 0; r < n; r++) {
                if (more && panel.first == 0) prefetch(x + (r + n) * ld, channels);
                for (int v = 0; v < NV; v++) {
                    vec difference = load(p + r * ld + v * LANES, panel.mask(v)) - origin[v];
                    sum[v] += difference;
                    squares[v] += difference * difference;
                }
            }
            for (int v = 0; v < NV; v++) {
                const vec mean = sum[v] / float(n);
                store(tile_mean + panel.first + v * LANES, origin[v] + mean);
                store(tile_squares + panel.first + v * LANES, squares[v] - sum[v] * mean);
            }
        });
        combine(n, tile_mean, tile_squares);
    }
};

// Runs body(moments, thread, team) in a team of threads, each with moments of its own, of which
// mean and variance are made. If these are null, the moments are of no channels.
template <class Body>
void with_moments(long channels, float *mean, float *variance, int threads, Body body) {
    if (!mean) channels = 0;
    const long size = 1 + 2 * channels;
    double *data = statistics_buffer.get<double>(threads * size);
    int team = parallel(threads, [&](int thread, int team) {
        Moments own(data + thread * size, channels);
        std::fill_n(own.count, size, 0.0);
        body(own, thread, team);
    });
    const Moments all(data, channels);
    for (int t = 1; t < team; t++) {
        const Moments other(data + t * size, channels);
        all.combine(*other.count, other.mean, other.squares);
    }
    for (long i = 0; i < channels; i++) {
        mean[i] = all.mean[i];
        variance[i] = all.squares[i] / *all.count;
    }
}

template <class T>
void map_statistics(Map<const T> x, long rows, long channels, float *mean, float *variance,
                    int threads) {
    with_moments(channels, mean, variance, threads, [&](Moments &moments, int thread, int team) {
        Range range = share_of_thread(rows, 1, thread, team);
        for (long row = range.begin; row < range.end; row += TILE)
            moments.add_tile(x.row(row), x.ld, std::min(TILE, range.end - row), true);
    });
}

// ---- Forward ----

// sums[r][:] = relu(norm(x[row + r])) W for n rows of at most TILE; the columns are padded.
template <class T, bool POOL>
void product_tile(const Input<T> &in, const uint32_t *packed, long row, long n, float *sums,
                  long ld_sums) {
    constexpr int PAIR = Product<T>::PAIR;
    const Shape &s = in.shape;
    const long all_steps = words<T>(s.channels), at_once = WORDS_AT_ONCE<T> * PAIR;
    const long ldy = round_up(whole_steps<T>(std::min(s.channels, at_once)), LANES) + std::max(LANES, STEP * PAIR);
    auto *y = input_buffer.get<typename Product<T>::Element>(TILE * ldy);
    Pixels<POOL> pixels(s, row), next(s, row + TILE);
    for (long first = 0; first < s.channels; first += at_once) {
        long count = std::min(at_once, s.channels - first), steps = words<T>(count);
        norm_relu_tile(in, pixels, n, first, count, y, ldy);
        for_panels(s.columns(), [&](auto panel) {
            const uint32_t *w = packed + panel.first * all_steps + first / PAIR * panel.WIDTH;
            for (long r = 0; r < n; r += BLOCK) {
                if (panel.first == 0) prefetch_block(in.x, s, next, r, first, count);
                multiply_block<T, panel.NV>(y + r * ldy, ldy / PAIR, w, steps,
                                            sums + r * ld_sums + panel.first, ld_sums, first > 0);
            }
        });
    }
}

template <class T, bool POOL>
void forward_1x1(const Input<T> &in, const uint32_t *packed, const Map<T> &z, Range rows,
                 const Moments &moments) {
    const Shape &s = in.shape;
    const long ld = round_up(s.outputs, LANES);
    float *sums = output_buffer.get<float>(TILE * ld);
    for (long row = rows.begin; row < rows.end; row += TILE) {
        long n = std::min(TILE, rows.end - row);
        product_tile<T, POOL>(in, packed, row, n, sums, ld);
        for (long r = 0; r < n; r++)
            for (long o = 0; o < s.outputs; o += LANES)
                store(z.row(row + r) + o, load(sums + r * ld + o), first_lanes(s.outputs - o));
        moments.add_tile(z.row(row), z.ld, n);
    }
}

// z[line, column] = the sum of nine slices of the products of the pixels around it.
template <class T>
INLINE void sum_of_slices(const float *line_products, long ld, const Shape &s, long line, T *z,
                          long ldz) {
    long y = line % s.height, top = y > 0 ? -1 : 0, bottom = y + 1 < s.height ? 1 : 0;
    for (long x = 0; x < s.width; x++)
        for (long o = 0; o < s.outputs; o += LANES) {
            vec sum = {};
            for (long dy = top; dy <= bottom; dy++) {
                const float *p = line_products + (dy * s.width + x) * ld;
                p += (dy + 1) * 3 * s.outputs + o;
                if (x > 0) sum += load(p - ld);
                sum += load(p + s.outputs);
                if (x + 1 < s.width) sum += load(p + ld + 2 * s.outputs);
            }
            store(z + x * ldz + o, sum, first_lanes(s.outputs - o));
        }
}

// For the lines (of pixels) of a range, that may begin and end within an image.
template <class T>
void forward_3x3(const Input<T> &in, const uint32_t *packed, const Map<T> &z, Range lines,
                 const Moments &moments) {
    if (lines.begin == lines.end) return;
    const Shape &s = in.shape;
    const long all_lines = s.images * s.height, ld = round_up(s.columns(), LANES);
    const long at_once = std::max(1L, 256 / s.width), line_size = s.width * ld;
    // Products of two lines of the step before and of those of this step.
    float *products = output_buffer.get<float>((at_once + 2) * line_size + BLOCK * ld);
    long line = std::max(0L, lines.begin - 1), end = std::min(all_lines, lines.end + 1);
    long done = lines.begin;
    while (line < end) {
        long next = std::min(end, line + at_once), n = (next - line) * s.width;
        for (long r = 0; r < n; r += TILE)
            product_tile<T, false>(in, packed, line * s.width + r, std::min(TILE, n - r),
                                   products + 2 * line_size + r * ld, ld);
        // A line of z needs the products of the one after it.
        long ready = next == all_lines ? lines.end : std::min(lines.end, next - 1);
        long first = done;
        for (; done < ready; done++)
            sum_of_slices(products + (done - line + 2) * line_size, ld, s, done,
                          z.row(done * s.width), z.ld);
        for (long row = first * s.width; row < done * s.width; row += TILE)
            moments.add_tile(z.row(row), z.ld, std::min(TILE, done * s.width - row));
        memmove(products, products + (next - line) * line_size, 2 * line_size * sizeof(float));
        line = next;
    }
}

// With `mean` and `variance`, also the statistics of z.
template <class T>
void forward(const Input<T> &in, const float *kernel, Map<T> z, float *mean, float *variance,
             int threads) {
    const Shape &s = in.shape;
    auto *packed = kernel_buffer.get<uint32_t>(words<T>(s.channels)
                                               * round_up(s.columns(), LANES));
    with_moments(s.outputs, mean, variance, threads, [&](Moments &moments, int thread, int team) {
        pack_kernel<T>(kernel, s, false, packed);
        Range lines = share_of_thread(s.images * s.height, 1, thread, team);
        Range rows = share_of_thread(s.rows(), BLOCK, thread, team);
        if (s.side == 3) forward_3x3<T>(in, packed, z, lines, moments);
        else if (s.pool) forward_1x1<T, true>(in, packed, z, rows, moments);
        else forward_1x1<T, false>(in, packed, z, rows, moments);
    });
}

// ---- Backward ----

// The gradient at the outputs z, which may still have to be completed, by what the norm after z
// takes off it: a + (z - mean) * b.
template <class T> struct Gradient {
    Map<const T> dz, z;  // z.data is null if dz is complete
    const float *mean, *a, *b;

    template <class E> void copy(long row, long n, long outputs, E *out, long ld) const {
        const long ahead = 32;  // rows: they may be few channels of a wide buffer
        for_panels(outputs, [&](auto panel) {
            constexpr int NV = panel.NV;
            const long o = panel.first;
            Mask mask[NV];
            vec means[NV] = {}, as[NV] = {}, bs[NV] = {};
            for (int v = 0; v < NV; v++) mask[v] = panel.mask(v);
            if (z.data)
                for (int v = 0; v < NV; v++) {
                    means[v] = load(mean + o + v * LANES, mask[v]);
                    as[v] = load(a + o + v * LANES, mask[v]);
                    bs[v] = load(b + o + v * LANES, mask[v]);
                }
            for (long r = 0; r < n; r++) {
                if (o == 0) {
                    prefetch(dz.row(row + r + ahead), outputs);
                    if (z.data) prefetch(z.row(row + r + ahead), outputs);
                }
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) {
                    const long j = o + v * LANES;
                    vec gradient = load(dz.row(row + r) + j, mask[v]);
                    if (z.data) {
                        vec deviation = load(z.row(row + r) + j, mask[v]) - means[v];
                        gradient -= deviation * bs[v] + as[v];
                    }
                    store(out + r * ld + j, gradient, mask[v]);
                }
            }
        });
    }
};

template <class T>
void complete_map(const Gradient<T> &gradient, Map<T> out, long rows, long channels, int threads) {
    parallel(threads, [&](int thread, int team) {
        Range range = share_of_thread(rows, 1, thread, team);
        for (long row = range.begin; row < range.end; row += TILE)
            gradient.copy(row, std::min(TILE, range.end - row), channels, out.row(row), out.ld);
    });
}

// For a 3x3 kernel: all of it, with a border of zeros; so lines of width + 2 pixels.
template <class T, class E>
void pad_gradient(const Gradient<T> &gradient, const Shape &s, E *padded) {
    const long size = (s.width + 2) * s.outputs;
#pragma omp for
    for (long line = 0; line < s.images * (s.height + 2); line++) {
        long image = line / (s.height + 2), y = line % (s.height + 2) - 1;
        E *out = padded + line * size;
        if (y < 0 || y == s.height) {
            memset(out, 0, size * sizeof(E));
            continue;
        }
        memset(out, 0, s.outputs * sizeof(E));
        memset(out + size - s.outputs, 0, s.outputs * sizeof(E));
        gradient.copy((image * s.height + y) * s.width, s.width, s.outputs, out + s.outputs,
                      s.outputs);
    }
}

// The gradients at the nine pixels around each of n pixels, line by line: in memory, three runs.
// Zeros follow, to a whole step.
template <class E>
INLINE void neighbours(const E *padded, const Shape &s, long row, long n, E *out, long ld) {
    long x = row % s.width, y = row / s.width % s.height, image = row / s.width / s.height;
    const long line = (s.width + 2) * s.outputs, run = 3 * s.outputs;
    const E *p = padded + (image * (s.height + 2) + y) * line + x * s.outputs;
    for (long r = 0; r < n; r++, out += ld) {
        for (int dy = 0; dy < 3; dy++)
            for (long i = 0; i < run; i += 64 / sizeof(E))  // may write beyond its end, but not ld
                memcpy(out + dy * run + i, p + dy * line + i, 64);
        memset(out + 3 * run, 0, 64);
        p += s.outputs;
        if (++x == s.width) x = 0, y++, p += 2 * s.outputs;
        if (y == s.height) y = 0, p += 2 * line;
    }
}

// Through ReLU and norm: total (+)= g * scale, and sums of g and of g * (x - mean); also the
// convolution's input, into y as a product reads it.
template <class T, bool POOL, int NV>
INLINE void finish_block(const vec (&block)[BLOCK][NV], const Input<T> &in, const Map<T> &total,
                         bool add, const Pixels<POOL> &pixels, long first, long n,
                         const Panel<NV> &panel, const NormVectors *norm, vec *sums,
                         vec *products, uint32_t *y) {
    constexpr int PAIR = Product<T>::PAIR;
    const long width = in.shape.width;
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
        vec sum = sums[v], product = products[v];
        auto one = [&](long i, vec gradient) __attribute__((always_inline)) {
            long j = panel.first + v * LANES;
            vec deviation = load(in.x.row(i) + j, panel.mask(v)) - norm[v].mean;
            vec normed = deviation * norm[v].scale + norm[v].bias;
            vec g = unless_negative(normed, gradient);
            sum += g;
            product += g * deviation;
            vec share = g * norm[v].scale;
            if (add) share += load(total.row(i) + j, panel.mask(v));
            store(total.row(i) + j, share, panel.mask(v));
            return unless_negative(normed, normed);
        };
        auto pixel = [&](int r) __attribute__((always_inline)) {
            const long i = pixels[first + r];
            if (!POOL) return one(i, block[r][v]);
            const vec quarter = block[r][v] * 0.25f;
            vec input = one(i, quarter) + one(i + 1, quarter);
            input += one(i + width, quarter);
            return (input + one(i + width + 1, quarter)) * 0.25f;
        };
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK; r += PAIR) {
            if (first + r >= n) break;
            vec input = pixel(r);
            uvec words = (uvec)input;
            if constexpr (PAIR == 2) {
                vec second = first + r + 1 < n ? pixel(r + 1) : vec{};
                words = pair(round_to_bf16(input), round_to_bf16(second));
            }
            store_bits(y + ((first + r) / PAIR * NV + v) * LANES, words);
        }
        sums[v] = sum, products[v] = product;
    }
}

// Sums over the rows of a thread; d_kernel is [panel of channels, (tap, o), channel of the panel].
struct Partial {
    float *d_kernel, *sum_g, *sum_gx;
};

// Columns of the kernel, the rows of its gradient, in whole blocks.
long whole_columns(const Shape &s) { return round_up(s.columns(), std::max(LANES, BLOCK)); }

// The rows of a tile two by two, as the product for d_kernel reads them: [pair, column] in words, for
// AMX [column, pair].
template <class E>
INLINE void pair_rows(const E *rows, long ld, long columns, uint32_t *pairs) {
    auto words_at = [&](long k, long column) {
        const E *first = rows + 2 * k * ld + column;
        return pair(load_bits<hvec>(first), load_bits<hvec>(first + ld));
    };
    for (long column = 0; column < columns; column += LANES)
        for (long k = 0; k < TILE / 2; k += LANES) {
            uvec block[LANES];
            for (long i = 0; i < LANES; i++) block[i] = words_at(k + i, column);
            if (AMX) transpose(block);
            for (long i = 0; i < LANES; i++)
                store_bits(pairs + (AMX ? (column + i) * (TILE / 2) + k : (k + i) * ld + column),
                           block[i]);
        }
}

// `padded` is from pad_gradient, or null for a 1x1 kernel.
template <class T, bool POOL>
void backward_rows(const Input<T> &in, const uint32_t *packed, const Gradient<T> &gradient,
                   const typename Product<T>::Element *padded, const Map<T> &total, bool add,
                   Range rows, const Partial &partial) {
    const Shape &s = in.shape;
    typedef typename Product<T>::Element E;
    constexpr int PAIR = Product<T>::PAIR;
    const long columns = s.columns(), padded_columns = whole_columns(s);
    const long steps = words<T>(columns), ld = padded_columns + 64 / sizeof(E);
    E *gradients = gradient_buffer.get<E>(TILE * ld);
    uint32_t *pairs = PAIR == 1 ? (uint32_t *)gradients
                                : pairs_buffer.get<uint32_t>(TILE / 2 * ld);
    uint32_t *y = input_buffer.get<uint32_t>(TILE * 3 * LANES);
    memset(gradients, 0, TILE * ld * sizeof(E));
    for (long row = rows.begin; row < rows.end; row += TILE) {
        long n = std::min(TILE, rows.end - row);
        Pixels<POOL> pixels(s, row), next(s, row + TILE);
        if (padded) neighbours(padded, s, row, n, gradients, ld);
        else gradient.copy(row, n, s.outputs, gradients, ld);
        memset(gradients + n * ld, 0, (TILE - n) * ld * sizeof(E));
        if constexpr (PAIR == 2) pair_rows(gradients, ld, padded_columns, pairs);
        for_panels(s.channels, [&](auto panel) {
            constexpr int NV = panel.NV, WIDTH = panel.WIDTH;
            const long channel = panel.first;
            NormVectors norm[NV];
            for (int v = 0; v < NV; v++)
                norm[v] = load_norm(in.norm, channel + v * LANES, panel.mask(v));
            vec sums[NV] = {}, products[NV] = {};
            // The panel after this one: the next channels, or the first ones of the next tile.
            const bool last = channel + WIDTH >= s.channels;
            const Pixels<POOL> &ahead = last ? next : pixels;
            const long after = last ? 0 : channel + WIDTH;
            const long width = std::min<long>(WIDTH, s.channels - after);
            for (long r = 0; r < n; r += BLOCK) {
                prefetch_block(in.x, s, ahead, r, after, width);
                if (add) prefetch_block(total, s, ahead, r, after, width);
                vec block[BLOCK][NV];
                multiply_block<T>(block, gradients + r * ld, ld / PAIR, packed + channel * steps,
                                  steps);
                finish_block<T>(block, in, total, add, pixels, r, n, panel, norm, sums, products,
                                y);
            }
            for (int v = 0; v < NV; v++) {
                float *sum_g = partial.sum_g + channel + v * LANES;
                float *sum_gx = partial.sum_gx + channel + v * LANES;
                store(sum_g, load(sum_g) + sums[v]);
                store(sum_gx, load(sum_gx) + products[v]);
            }
            const long pixel_words = words<T>(n), written = (n + PAIR - 1) / PAIR;
            if (written < pixel_words)
                memset(y + written * WIDTH, 0, (pixel_words - written) * WIDTH * sizeof *y);
            float *d_panel = partial.d_kernel + channel * padded_columns;
            for (long column = 0; column < columns; column += BLOCK)
                multiply_block<T, NV, !AMX>(AMX ? pairs + column * (TILE / 2) : pairs + column,
                                            AMX ? TILE / 2 : ld, y, pixel_words,
                                            d_panel + column * WIDTH, WIDTH, true);
        });
    }
}

template <class T, bool POOL>
void backward(const Gradient<T> &gradient, const Input<T> &in, const float *kernel, Map<T> total,
              bool add, float *sum_g, float *sum_gx, float *d_kernel, int threads) {
    typedef typename Product<T>::Element E;
    const Shape &s = in.shape;
    const long channels = round_up(s.channels, LANES), columns = whole_columns(s);
    const long size = channels * (columns + 2);  // of the sums of a thread
    uint32_t *packed = kernel_buffer.get<uint32_t>(words<T>(s.columns()) * channels);
    float *partials = partial_buffer.get<float>(size * threads);
    E *padded = nullptr;
    if (s.side == 3)
        padded = padded_buffer.get<E>(s.images * (s.height + 2) * (s.width + 2) * s.outputs);
    parallel(threads, [&](int thread, int team) {
        if (padded) pad_gradient(gradient, s, padded);
        pack_kernel<T>(kernel, s, true, packed);
        float *mine = partials + size * thread, *vectors = mine + channels * columns;
        memset(mine, 0, size * sizeof(float));
        backward_rows<T, POOL>(in, packed, gradient, padded, total, add,
                               share_of_thread(s.rows(), BLOCK, thread, team),
                               {mine, vectors, vectors + channels});
#pragma omp barrier
        auto sum = [&](long i) {
            float value = 0;
            for (int t = 0; t < team; t++) value += partials[size * t + i];
            return value;
        };
#pragma omp for nowait
        for (long c = 0; c < s.channels; c++) {
            sum_g[c] = sum(channels * columns + c);
            sum_gx[c] = sum(channels * (columns + 1) + c);
        }
        for_panels(s.channels, [&](auto panel) {
            const long first = panel.first, width = panel.WIDTH;
#pragma omp for nowait
            for (long o = 0; o < s.outputs; o++)
                for (long tap = 0; tap < s.taps(); tap++)
                    for (long c = first; c < std::min(first + width, s.channels); c++)
                        d_kernel[((o + 1) * s.taps() - 1 - tap) * s.channels + c] =
                            sum(first * columns + (tap * s.outputs + o) * width + c - first);
        });
    });
}

// ---- Evaluation: a whole dense block, or a transition, in one call ----
//
// Kernels are packed beforehand. A tile of pixels is ROWS pixels by PANEL columns at a time in
// registers, with AMX all of it. What a pixel reads is `count` runs of memory: for a 1x1 kernel the
// normalised input, for a 3x3 kernel the three lines around it in a map with a border of zeros. The
// order of a sum depends on the shape of the kernel alone: not on threads, the batch or the place in
// the map.

constexpr int ROWS = AMX ? TILE_ROWS : LANES == 16 ? 8 : 6, VECTORS = 2, PANEL = VECTORS * LANES;
constexpr long EVALUATION_TILE = 48;  // pixels, at most TILE; they stay in L2
constexpr long RUN_WORDS = 384;       // of a pixel, at once: such a part of a panel stays in L1

// A convolution and the norm and ReLU before it, in the stem after it. The vectors are padded with
// zeros to whole panels.
struct PackedConv {
    const float *mean, *scale, *bias;
    const uint32_t *kernel;  // see pack_panels
    long channels, outputs, side;
    Norm norm() const { return {mean, scale, bias}; }
    long panels() const { return (outputs + PANEL - 1) / PANEL; }
};

// What a convolution reads of a pixel: as many runs as its kernel has lines. From a pixel to the next
// there are `pitch` elements: in a map with a border whole vectors and steps, in images whole pairs.
template <class T> struct Reads {
    static constexpr int PAIR = Product<T>::PAIR;
    long side, channels;
    long pitch() const {
        return round_up(channels, side == 3 ? std::max(LANES, STEP * PAIR) : PAIR);
    }
    long run_words() const { return words<T>(side * pitch()); }
    long all_words() const { return side * run_words(); }
};

// The kernel [O, side, side, C] as panel after panel of columns, in a panel a row for each word.
template <class T>
void pack_panels(const float *kernel, long outputs, const Reads<T> &reads, uint32_t *packed,
                 int threads) {
    constexpr int PAIR = Product<T>::PAIR;
    const long all = reads.all_words(), run_elements = reads.run_words() * PAIR;
    parallel(threads, [&](int thread, int team) {
        Range mine = share_of_thread(all, 1, thread, team);
        for (long first = 0; first < outputs; first += PANEL) {
            const long n = std::min<long>(PANEL, outputs - first), width = round_up(n, LANES);
            for (long k = mine.begin; k < mine.end; k++) {
                float values[2][PANEL] = {};
                for (long i = k * PAIR; i < (k + 1) * PAIR; i++) {
                    const long y = i / run_elements, x = i % run_elements / reads.pitch();
                    const long c = i % run_elements % reads.pitch();
                    for (long o = 0; o < n && x < reads.side && c < reads.channels; o++)
                        values[i % PAIR][o] =
                            kernel[(((first + o) * reads.side + y) * reads.side + x)
                                   * reads.channels + c];
                }
                for (long j = 0; j < width; j += LANES)
                    store_bits(packed + first * all + k * width + j,
                               as_words<T>(load(values[0] + j), load(values[1] + j)));
            }
        }
    });
}

// A map with a border of zeros. The channels of a pixel are padded with zeros to its pitch.
template <class E> struct Bordered {
    E *data;
    long images, height, width, pitch;

    static long elements(long images, long height, long width, long pitch) {
        const long beyond = AMX ? TILE_ROWS : 0;  // pixels that are read, and not used
        return (images * (height + 2) * (width + 2) + beyond) * pitch;
    }
    long lines() const { return images * (height + 2); }
    // The place of a pixel among those of the map and its borders.
    long place(long row) const {
        const long line = row / width, image = line / height;
        return (line + 2 * image + 1) * (width + 2) + row % width + 1;
    }
    // Calls body(row, i, count) for the pixels in each line of n places: from places first + i on.
    template <class Body> INLINE void for_pixels(long first, long n, Body body) const {
        for (long i = 0, count; i < n; i += count) {
            const long line = (first + i) / (width + 2), x = (first + i) % (width + 2);
            const long image = line / (height + 2), y = line % (height + 2);
            count = 1;
            if (x == 0 || x > width || y == 0 || y > height) continue;
            count = std::min(n - i, width + 1 - x);
            body((image * height + y - 1) * width + x - 1, i, count);
        }
    }
    // Pointers to n pixels, by their number without borders.
    INLINE void pixels(long row, long n, E **at) const {
        long x = row % width, y = row / width % height;
        E *p = data + place(row) * pitch;
        for (long r = 0; r < n; r++, p += pitch) {
            at[r] = p;
            if (++x == width) x = 0, y++, p += 2 * pitch;
            if (y == height) y = 0, p += 2 * (width + 2) * pitch;
        }
    }
    // Zeros in the border, and everywhere if the pitch leaves room for more vectors than are written.
    void clear(Range lines, long channels) const {
        const bool all = pitch > round_up(channels, LANES);
        const long size = (width + 2) * pitch;
        for (long line = lines.begin; line < lines.end; line++) {
            E *p = data + line * size;
            if (all || line % (height + 2) % (height + 1) == 0) {
                memset(p, 0, size * sizeof(E));
            } else {
                memset(p, 0, pitch * sizeof(E));
                memset(p + size - pitch, 0, pitch * sizeof(E));
            }
        }
    }
};

// Adds the products of the runs from `first` to `last` to the sums [R, NV * LANES].
template <class T, int R, int NV>
void product_block(const uint32_t *const *rows, const Runs &runs, long first, long last,
                   const uint32_t *kernel, long words, float *sums) {
    vec block[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++)
            block[r][v] = first ? load(sums + (r * NV + v) * LANES) : vec{};
    for (long run = first; run < last; run++) {
        const uint32_t *row[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) row[r] = rows[r] + run * runs.stride;
        const uint32_t *b = kernel + run * runs.words * NV * LANES;
        const long count = std::min(runs.words, words - run * runs.words);
#pragma GCC unroll 1
        for (long k = 0; k < count; k++) {
            uvec column[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) column[v] = load_bits<uvec>(b + (k * NV + v) * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                uvec word = uvec{} + row[r][k];
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++)
                    block[r][v] = multiply_add<T>(block[r][v], word, column[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(sums + (r * NV + v) * LANES, block[r][v]);
}

// Calls body(constant) with the constant that equals n, 1 to N.
template <int N, class Body> INLINE void with_constant(long n, Body body) {
    if constexpr (N > 1)
        if (n < N) return with_constant<N - 1>(n, body);
    body(std::integral_constant<int, N>{});
}

// Where the words begin that each pixel of a tile reads. AMX needs them at a fixed stride.
struct PixelRows {
    const uint32_t *at[EVALUATION_TILE];
    long stride = 0;  // words
    PixelRows() = default;
    PixelRows(const void *first, long stride, long n) : stride(stride) {
        for (long r = 0; r < n; r++) at[r] = (const uint32_t *)first + r * stride;
    }
};

// Calls finish(column, width, sums [n, width]) for each panel of a tile of n pixels.
template <class T, class Finish>
INLINE void product_panels(const PixelRows &rows, long n, const Runs &runs, long words,
                           const PackedConv &conv, Range panels, Finish finish) {
    alignas(64) float sums[EVALUATION_TILE * PANEL];
    const long blocks = (n + ROWS - 1) / ROWS, at_once = std::max(1L, RUN_WORDS / runs.words);
    for (long panel = panels.begin; panel < panels.end; panel++) {
        const long column = panel * PANEL;
        const long width = std::min<long>(PANEL, round_up(conv.outputs - column, LANES));
        const uint32_t *kernel = conv.kernel + column * words;
        if constexpr (AMX) {
            with_constant<EVALUATION_TILE / ROWS>(blocks, [&](auto r) {
                with_constant<VECTORS>(width / LANES, [&](auto v) {
                    multiply_tiles<r, v>(rows.at[0], rows.stride, runs, words, kernel, sums, width,
                                         false);
                });
            });
        } else {
            for (long run = 0; run < runs.count; run += at_once)
                for (long block = 0; block < blocks; block++) {
                    // All have nearly the same size: one of 6 and one of 1 would take longer.
                    const long row = n * block / blocks, end = n * (block + 1) / blocks;
                    with_constant<ROWS>(end - row, [&](auto r) {
                        with_constant<VECTORS>(width / LANES, [&](auto v) {
                            product_block<T, r, v>(rows.at + row, runs, run,
                                                   std::min(runs.count, run + at_once), kernel,
                                                   words, sums + row * width);
                        });
                    });
                }
        }
        finish(column, width, sums);
    }
}

// z[row + r][column:] = sums[r] for n rows.
template <class T>
INLINE void store_panel(const Map<T> &z, long row, long n, const PackedConv &conv, long column,
                        long width, const float *sums) {
    const bool whole = column + width <= conv.outputs;
    for (long r = 0; r < n; r++, sums += width)
        for (long j = 0; j < width; j += LANES) {
            T *p = z.row(row + r) + column + j;
            if (whole) store(p, load(sums + j));
            else store(p, load(sums + j), first_lanes(conv.outputs - column - j));
        }
}

// The rows and columns of one member of a team. The grid of members minimizes the largest part.
struct Part { Range rows, panels; };
Part part_of_member(long rows, long panels, int member, int members) {
    auto parts = [](long n, long in) { return (n + in - 1) / in; };
    long best = 1, least = -1;
    for (long across = 1; across <= std::min<long>(members, panels); across++) {
        if (members % across) continue;
        long blocks = parts(parts(rows, ROWS), members / across) * parts(panels, across);
        if (least < 0 || blocks < least) best = across, least = blocks;
    }
    return {share_of_thread(rows, 1, member / best, members / best),
            share_of_thread(panels, 1, member % best, best)};
}

// As norm_relu_tile, for all channels of n pixels, but row by row: rows are so far apart that the
// hardware does not foresee the next one. The vectors of the norm are padded with zeros.
template <bool POOL, class T, class E>
INLINE void norm_relu_rows(const Input<T> &in, const Pixels<POOL> &pixels, long n, E *y, long ldy) {
    const long channels = in.shape.channels, whole = channels / LANES * LANES, ahead = 4;
    const long padded = whole_steps<T>(channels);
    for (long r = 0; r < n; r++) {
        const T *x = in.x.row(pixels[r]);
        const T *later = in.x.row(pixels[POOL ? std::min(r + ahead, n - 1) : r + ahead]);
        prefetch(later, POOL ? in.x.ld + channels : channels);
        if (POOL) prefetch(later + in.shape.width * in.x.ld, in.x.ld + channels);
        auto vector = [&](long c, long lanes) __attribute__((always_inline)) {
            const NormVectors norm = load_norm(in.norm, c, first_lanes(LANES));
            store(y + r * ldy + c, norm_relu<POOL>(x + c, in.x.ld, in.shape.width, norm,
                                                   first_lanes(lanes)));
        };
        for (long c = 0; c < whole; c += LANES) vector(c, LANES);
        for (long c = whole; c < padded; c += LANES) vector(c, channels - c);
    }
}

// Calls body(row, n) for tile after tile of nearly the same size.
template <class Body> INLINE void for_tiles(Range rows, Body body) {
    const long n = rows.end - rows.begin, tiles = (n + EVALUATION_TILE - 1) / EVALUATION_TILE;
    for (long i = 0; i < tiles; i++) {
        const Range tile = share_of_thread(n, AMX ? TILE_ROWS : 1, i, tiles);
        body(rows.begin + tile.begin, tile.end - tile.begin);
    }
}

// Calls finish(row, n, column, width, sums), as above, for the tiles of n pixels from `row` on.
template <class T, bool POOL, class Finish>
void evaluate_1x1(const Input<T> &in, const PackedConv &conv, const Part &part, Finish finish) {
    typedef typename Product<T>::Element E;
    const long words = Reads<T>{1, conv.channels}.all_words();
    const long ld = round_up(whole_steps<T>(conv.channels), LANES) + 64 / sizeof(E);
    const Runs runs = {(words + RUN_WORDS - 1) / RUN_WORDS, RUN_WORDS, RUN_WORDS};
    E *y = input_buffer.get<E>(EVALUATION_TILE * ld);
    for_tiles(part.rows, [&](long row, long n) {
        norm_relu_rows(in, Pixels<POOL>(in.shape, row), n, y, ld);
        product_panels<T>({y, ld / Product<T>::PAIR, n}, n, runs, words, conv, part.panels,
                          [&](long column, long width, const float *sums) {
                              finish(row, n, column, width, sums);
                          });
    });
}

template <class T>
void evaluate_3x3(const Bordered<typename Product<T>::Element> &y, const PackedConv &conv,
                  const Part &part, const Map<T> &z) {
    typedef typename Product<T>::Element E;
    constexpr int PAIR = Product<T>::PAIR;
    const long line = (y.width + 2) * y.pitch;
    const Runs runs = {3, 3 * y.pitch / PAIR, line / PAIR};
    if (part.rows.begin == part.rows.end) return;
    if constexpr (AMX) {  // the places between lines, too: so the stride is fixed
        const Range places = {y.place(part.rows.begin), y.place(part.rows.end - 1) + 1};
        return for_tiles(places, [&](long first, long n) {
            const E *corner = y.data + first * y.pitch - line - y.pitch;
            product_panels<T>({corner, y.pitch / PAIR, n}, n, runs, 3 * runs.words, conv,
                              part.panels, [&](long column, long width, const float *sums) {
                                  y.for_pixels(first, n, [&](long row, long i, long count) {
                                      store_panel(z, row, count, conv, column, width,
                                                  sums + i * width);
                                  });
                              });
        });
    }
    for_tiles(part.rows, [&](long row, long n) {
        E *pixels[EVALUATION_TILE];
        PixelRows rows;
        y.pixels(row, n, pixels);
        for (long r = 0; r < n; r++) rows.at[r] = (const uint32_t *)(pixels[r] - line - y.pitch);
        product_panels<T>(rows, n, runs, 3 * runs.words, conv, part.panels,
                          [&](long column, long width, const float *sums) {
                              store_panel(z, row, n, conv, column, width, sums);
                          });
    });
}

// OpenMP's barrier sleeps with OMP_WAIT_POLICY=passive, 100 times per forward. This one spins for a
// short time and then yields, which lets another member run that has no core of its own.
struct Barrier {
    std::atomic<int> arrived{0};
    std::atomic<long> round{0};
    void wait(int members) {
        if (members == 1) return;
        const long now = round.load();
        if (arrived.fetch_add(1) + 1 == members) {
            arrived = 0;
            round = now + 1;
        }
        for (int i = 0; round.load() == now; i++) {
            if (i < 500) _mm_pause();
            else sched_yield();
        }
    }
};

// One or several threads that compute the same images.
struct Team {
    int member, members;
    Barrier *barrier;
    Range share(long n) const { return share_of_thread(n, 1, member, members); }
    Part part(long rows, const PackedConv &conv) const {
        return part_of_member(rows, conv.panels(), member, members);
    }
    void wait() const { if (barrier) barrier->wait(members); }
};

// The convolutions of a block: layer by layer a 3x3 one, after a 1x1 one or not.
struct Block {
    const PackedConv *convs;
    long count;
    long channels, height, width;  // of the input
    // The most elements that Bordered needs in any layer.
    template <class T> long elements(long images) const {
        long most = 0;
        for (long i = 0; i < count; i++)
            if (convs[i].side == 3) most = std::max(most, Reads<T>{3, convs[i].channels}.pitch());
        return Bordered<T>::elements(images, height, width, most);
    }
};

// features[:, :channels] = x, and each layer appends its channels.
template <class T>
void evaluate_layers(const Block &block, Map<const T> x, Map<T> features, long images,
                     typename Product<T>::Element *buffer, const Team &team) {
    typedef typename Product<T>::Element E;
    const long rows = images * block.height * block.width;
    Range mine = team.share(rows);
    for (long row = mine.begin; row < mine.end; row++)
        memcpy(features.row(row), x.row(row), block.channels * sizeof(T));
    Bordered<E> y = {buffer, images, block.height, block.width, 0};
    long channels = block.channels;
    for (long i = 0; i < block.count; i++) {
        const PackedConv &conv1 = block.convs[i];
        const bool bottleneck = conv1.side == 1;
        const PackedConv &last = bottleneck ? block.convs[++i] : conv1;
        const Shape shape = {images, block.height, block.width, channels, 0, 1, false};
        const Input<T> in = {{features.data, features.ld}, conv1.norm(), shape};
        team.wait();  // the features are complete, and y is not read any more
        const long pitch = Reads<T>{3, last.channels}.pitch();
        if (y.pitch != pitch) {
            y.pitch = pitch;
            y.clear(team.share(y.lines()), last.channels);
            team.wait();
        }
        E *pixels[EVALUATION_TILE];
        if (bottleneck) {
            evaluate_1x1<T, false>(
                in, conv1, team.part(rows, conv1),
                [&](long row, long n, long column, long width, const float *sums) {
                    const Norm norm = last.norm();
                    y.pixels(row, n, pixels);
                    for (long r = 0; r < n; r++, sums += width)
                        for (long j = 0, o = column; j < width; j += LANES, o += LANES) {
                            vec v = (load(sums + j) - load(norm.mean + o)) * load(norm.scale + o)
                                    + load(norm.bias + o);
                            v = keep_lanes(unless_negative(v, v), last.channels - o);
                            store(pixels[r] + o, v);
                        }
                });
        } else {
            for_tiles(mine, [&](long row, long n) {
                y.pixels(row, n, pixels);
                for (long r = 0, next; r < n; r = next) {  // the part of a line
                    for (next = r + 1; next < n && pixels[next] == pixels[next - 1] + y.pitch;)
                        next++;
                    norm_relu_rows(in, Pixels<false>(shape, row + r), next - r, pixels[r],
                                   y.pitch);
                }
            });
        }
        team.wait();
        evaluate_3x3<T>(y, last, team.part(rows, last), {features.data + channels, features.ld});
        channels += last.outputs;
    }
}

// Each thread computes whole images, the same number, without waiting for others. The remaining
// ones, fewer than there are threads, are computed by all threads together.
template <class T>
void evaluate_block(const Block &block, Map<const T> x, Map<T> features, long images, int threads) {
    typedef typename Product<T>::Element E;
    const long pixels = block.height * block.width;
    Barrier barrier;
    auto run = [&](long first, long count, E *buffer, const Team &team) {
        evaluate_layers<T>(block, {x.row(first * pixels), x.ld},
                           {features.row(first * pixels), features.ld}, count, buffer, team);
    };
    // For the remaining images; the team may be smaller than asked for.
    E *shared = shared_buffer.get<E>(block.elements<T>(std::min<long>(images, threads)));
    parallel(threads, [&](int thread, int team) {
        const long whole = images / team * team, own = whole / team;
        if (own) {
            // Small maps together, so that a kernel that was read serves some more pixels.
            const long group = std::clamp(4 * EVALUATION_TILE / pixels, 1L, own);
            E *buffer = padded_buffer.get<E>(block.elements<T>(group));
            for (long i = 0; i < own; i += group)
                run(thread * own + i, std::min(group, own - i), buffer, {0, 1, nullptr});
        }
        if (whole < images) run(whole, images - whole, shared, {thread, team, &barrier});
    });
}

template <class T>
void evaluate_transition(const Input<T> &in, const PackedConv &conv, Map<T> z, int threads) {
    parallel(threads, [&](int thread, int team) {
        evaluate_1x1<T, true>(
            in, conv, part_of_member(in.shape.rows(), conv.panels(), thread, team),
            [&](long row, long n, long column, long width, const float *sums) {
                store_panel(z, row, n, conv, column, width, sums);
            });
    });
}

// ---- Evaluation: ImageNet's stem, from images in any layout ----

// A 7x7 convolution with stride 2 and padding 3, norm, ReLU, and a 3x3 max-pool with stride 2 and
// padding 1. What a pixel of the convolution reads is seven runs of memory.
template <class T> struct Stem {
    typedef typename Product<T>::Element E;

    const PackedConv &conv;  // its norm is the one after it
    const T *x;
    const long *strides;  // of x [N, C, H, W]
    long height, width;
    Map<T> z;

    Reads<T> reads() const { return {7, conv.channels}; }
    long pitch() const { return reads().pitch(); }
    long line_size() const { return (width + 6) * pitch(); }
    // Of the convolution, and of its lines with a border of zeros.
    long lines() const { return (height + 1) / 2; }
    long columns() const { return (width + 1) / 2; }
    long normed_size() const { return (columns() + 2) * round_up(conv.outputs, LANES); }
    long out_height() const { return (lines() + 1) / 2; }
    long out_width() const { return (columns() + 1) / 2; }

    // A line of an image in NHWC, or one of zeros above or below it, with three pixels of zeros
    // on the left and on the right, and channels of zeros to whole pairs.
    void pad_line(long image, long line, E *out) const {
        memset(out, 0, line_size() * sizeof(E));
        if (line < 0 || line >= height) return;
        for (long c = 0; c < conv.channels; c++) {
            const T *p = x + image * strides[0] + c * strides[1] + line * strides[2];
            for (long i = 0; i < width; i++) {
                E &value = out[(i + 3) * pitch() + c];
                if constexpr (std::is_same_v<T, E>) {
                    value = p[i * strides[3]];
                } else {
                    const uint32_t bits = uint32_t(p[i * strides[3]].bits) << 16;
                    memcpy(&value, &bits, sizeof bits);
                }
            }
        }
    }

    // A line of relu(norm(convolution)), from seven padded lines of the image.
    void conv_line(const E *padded, float *normed) const {
        constexpr int PAIR = Product<T>::PAIR;
        const long ld = round_up(conv.outputs, LANES), words = reads().run_words();
        const long row_size = 7 * words * PAIR + 64 / sizeof(E);
        E *copy = nullptr;
        if (AMX) {
            copy = input_buffer.get<E>(EVALUATION_TILE * row_size);
            memset(copy, 0, EVALUATION_TILE * row_size * sizeof(E));
        }
        for_tiles({0, columns()}, [&](long first, long n) {
            const E *source = padded + 2 * first * pitch();
            PixelRows rows(source, 2 * pitch() / PAIR, n);
            Runs runs = {7, words, line_size() / PAIR};
            if (copy) {  // every run with zeros after it, to whole steps
                for (long i = 0; i < 7 * n; i++)
                    memcpy(copy + i / 7 * row_size + i % 7 * words * PAIR,
                           source + i / 7 * 2 * pitch() + i % 7 * line_size(),
                           7 * pitch() * sizeof(E));
                rows = {copy, row_size / PAIR, n};
                runs.stride = words;
            }
            product_panels<T>(
                rows, n, runs, 7 * words, conv, {0, conv.panels()},
                [&](long column, long width, const float *sums) {
                    const Norm norm = conv.norm();
                    float *out = normed + (first + 1) * ld;
                    for (long r = 0; r < n; r++, out += ld, sums += width)
                        for (long j = 0, o = column; j < width; j += LANES, o += LANES) {
                            vec v = (load(sums + j) - load(norm.mean + o)) * load(norm.scale + o)
                                    + load(norm.bias + o);
                            store(out + o, unless_negative(v, v));
                        }
                });
        });
    }

    // z[row], z[row + 1], ...: the maxima over three lines. No value is negative, so that their
    // order is the one of their bits, in which NaN is the largest and the border of zeros is least.
    void pool_line(const float *const (&lines)[3], long row) const {
        const long ld = round_up(conv.outputs, LANES);
        for (long i = 0; i < out_width(); i++)
            for (long o = 0; o < conv.outputs; o += LANES) {
                uvec most = {};
                for (const float *line : lines)
                    for (long j = 2 * i; j < 2 * i + 3; j++) {
                        uvec bits = load_bits<uvec>(line + j * ld + o);
                        most = bits > most ? bits : most;
                    }
                store(z.row(row + i) + o, (vec)most, first_lanes(conv.outputs - o));
            }
    }

    // Some lines of the output of one image.
    void run(long image, Range out) const {
        const long first = std::max(0L, 2 * out.begin - 1), end = std::min(lines(), 2 * out.end);
        const long count = 2 * (end - first) + 5;
        E *padded = padded_buffer.get<E>(count * line_size());
        for (long i = 0; i < count; i++)
            pad_line(image, 2 * first - 3 + i, padded + i * line_size());
        // The last three lines of the convolution, and one of zeros that stands for any border.
        float *normed = output_buffer.get<float>(4 * normed_size());
        memset(normed, 0, 4 * normed_size() * sizeof(float));
        auto at = [&](long line) {
            return normed + (line < 0 || line >= lines() ? 3 : line % 3) * normed_size();
        };
        long next = first;
        for (long line = out.begin; line < out.end; line++) {
            for (; next < std::min(end, 2 * line + 2); next++)
                conv_line(padded + 2 * (next - first) * line_size(), at(next));
            pool_line({at(2 * line - 1), at(2 * line), at(2 * line + 1)},
                      (image * out_height() + line) * out_width());
        }
    }
};

template <class T> void evaluate_stem(const Stem<T> &stem, long images, int threads) {
    const long height = stem.out_height();
    parallel(threads, [&](int thread, int team) {
        Range mine = share_of_thread(images * height, 1, thread, team);
        for (long line = mine.begin, end; line < mine.end; line = end) {
            const long image = line / height;
            end = std::min(mine.end, (image + 1) * height);
            stem.run(image, {line - image * height, end - image * height});
        }
    });
}

}  // namespace

// ---- What Python calls: compiled once for each MAP, float or bf16 ----

extern "C" {

// The instructions of this build, on which the last bits of the results depend.
const char *description() {
#if defined(BF16_AMX)
    return "avx512 amx";
#elif defined(BF16_DOT)
    return "avx512 vdpbf16ps";
#elif defined(AVX512)
    return "avx512 fma";
#else
    return "avx2 fma";
#endif
}

#ifdef BF16_AMX
// Whether the system permits this process to use AMX, and its products are right.
long ready() {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return 0;
    constexpr long pairs = 2 * STEP, columns = 3 * LANES;
    alignas(64) static uint16_t a[BLOCK][2 * pairs], b[pairs][columns][2];
    alignas(64) static float sums[BLOCK][columns], expected[BLOCK][columns];
    uint32_t state = 1;
    // Small integers, whose sums are exact in any order.
    auto next = [&] { return float((state = state * 1664525 + 1013904223) >> 28) - 8; };
    auto bits = [&] {
        const float value = next();
        uint32_t word;
        memcpy(&word, &value, sizeof word);
        return uint16_t(word >> 16);
    };
    auto value = [](uint16_t half) {
        const uint32_t word = uint32_t(half) << 16;
        float value;
        memcpy(&value, &word, sizeof value);
        return value;
    };
    for (auto &row : a) for (uint16_t &half : row) half = bits();
    for (auto &row : b) for (auto &column : row) for (uint16_t &half : column) half = bits();
    for (long i = 0; i < BLOCK; i++)
        for (long j = 0; j < columns; j++) {
            expected[i][j] = sums[i][j] = next();
            for (long k = 0; k < 2 * pairs; k++)
                expected[i][j] += value(a[i][k]) * value(b[k / 2][j][k % 2]);
        }
    TilesInUse tiles;
    multiply_block<bf16, 3>(a, pairs, (uint32_t *)b, pairs, sums[0], columns, true);
    return !memcmp(sums, expected, sizeof sums);
}
#endif

// The time of a 1x1 and a 3x3 convolution and their backward, in DenseNet-121's third block.
double seconds(long threads) {
    const long images = 8, side = 14, channels = 128, outputs = 32, rows = images * side * side;
    std::vector<MAP> x(rows * channels), z(rows * outputs), total(rows * channels);
    std::vector<float> norm(channels, 1), sums(2 * channels), kernel(9 * channels * outputs, 1);
    std::vector<float> d_kernel(kernel.size());
    const double start = omp_get_wtime();
    for (long kernel_side : {1, 3}) {
        const Shape shape = {images, side, side, channels, outputs, kernel_side, false};
        const Input<MAP> in = {{x.data(), channels}, {&norm[0], &norm[0], &norm[0]}, shape};
        forward<MAP>(in, kernel.data(), {z.data(), outputs}, nullptr, nullptr, threads);
        backward<MAP, false>({{z.data(), outputs}, {}, nullptr, nullptr, nullptr}, in,
                             kernel.data(), {total.data(), channels}, false, &sums[0],
                             &sums[channels], d_kernel.data(), threads);
    }
    return omp_get_wtime() - start;
}

void statistics(const MAP *x, long ldx, long rows, long channels, float *mean, float *variance,
                long threads) {
    map_statistics<MAP>({x, ldx}, rows, channels, mean, variance, threads);
}

// The kernel is [O, taps, C].
void norm_relu_conv(const MAP *x, long ldx, const float *mean, const float *scale,
                    const float *bias, const float *kernel, long images, long height, long width,
                    long channels, long outputs, long side, long pool, MAP *z, long ldz,
                    float *z_mean, float *z_variance, long threads) {
    Shape shape = {images, height, width, channels, outputs, side, pool != 0};
    forward<MAP>({{x, ldx}, {mean, scale, bias}, shape}, kernel, {z, ldz}, z_mean, z_variance,
                 threads);
}

void norm_relu_conv_backward(const MAP *dz, long lddz, const MAP *z, long ldz, const float *z_mean,
                             const float *a, const float *b, const MAP *x, long ldx,
                             const float *mean, const float *scale, const float *bias,
                             const float *kernel, long images, long height, long width,
                             long channels, long outputs, long side, long pool, MAP *total,
                             long ldt, long add, float *sum_g, float *sum_gx, float *d_kernel,
                             long threads) {
    Shape shape = {images, height, width, channels, outputs, side, pool != 0};
    auto run = pool ? backward<MAP, true> : backward<MAP, false>;
    run({{dz, lddz}, {z, ldz}, z_mean, a, b}, {{x, ldx}, {mean, scale, bias}, shape}, kernel,
        {total, ldt}, add, sum_g, sum_gx, d_kernel, threads);
}

void complete(const MAP *total, long ldt, const MAP *x, long ldx, const float *mean, const float *a,
              const float *b, MAP *out, long ldo, long rows, long channels, long threads) {
    complete_map<MAP>({{total, ldt}, {x, ldx}, mean, a, b}, {out, ldo}, rows, channels, threads);
}

// ---- Evaluation ----

// The kernel is [O, side, side, C]. Returns how many words it takes when packed; writes them if
// `packed`.
long pack(const float *kernel, long outputs, long side, long channels, uint32_t *packed,
          long threads) {
    const Reads<MAP> reads = {side, channels};
    if (packed) pack_panels<MAP>(kernel, outputs, reads, packed, threads);
    return round_up(outputs, LANES) * reads.all_words();
}

// Sums up some values of each of n arrays, at scattered places.
long sample(const uint32_t *const *arrays, const long *sizes, long n) {
    uint64_t sum = 0;
    for (long i = 0; i < n; i++)
        for (uint64_t j = 0; j < 8; j++)
            sum = (sum ^ arrays[i][j * 0x9e3779b97f4a7c15 % sizes[i]]) * 0x100000001b3;
    return sum;
}

void evaluate_dense_block(const PackedConv *convs, long count, const MAP *x, long ldx, long images,
                          long height, long width, long channels, MAP *features, long ld,
                          long threads) {
    evaluate_block<MAP>({convs, count, channels, height, width}, {x, ldx}, {features, ld}, images,
                        threads);
}

void evaluate_pooled_conv(const PackedConv *conv, const MAP *x, long ldx, long images, long height,
                          long width, MAP *z, long ldz, long threads) {
    Shape shape = {images, height, width, conv->channels, conv->outputs, 1, true};
    evaluate_transition<MAP>({{x, ldx}, conv->norm(), shape}, *conv, {z, ldz}, threads);
}

void evaluate_stem_conv(const PackedConv *conv, const MAP *x, const long *strides, long images,
                        long height, long width, MAP *z, long ldz, long threads) {
    evaluate_stem<MAP>({*conv, x, strides, height, width, {z, ldz}}, images, threads);
}

}  // extern "C"
