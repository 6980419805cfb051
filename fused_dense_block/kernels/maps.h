// Feature maps, the input of a convolution, and how threads share its rows.
#pragma once

#include <omp.h>
#include <type_traits>

#include "amx.h"
#include "vectors.h"

namespace {

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

// The input of a convolution: relu(norm(x)), pooled or not.
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

// Into the cache, for later: rows of a wide buffer are so far apart that the hardware does not
// foresee them. This is worth a quarter of the time.
template <class T> INLINE void prefetch(T *p, long count) {  // to be written unless T is const
    for (T *end = p + count; p < end; p += 64 / sizeof(T))
        __builtin_prefetch(p, !std::is_const_v<T>, 3);
}
template <class T, bool POOL>
INLINE void prefetch_block(const Map<T> &x, const Shape &s, const Pixels<POOL> &pixels, long r,
                           long channel, long count) {
    for (long end = r + BLOCK; r < end; r++) {
        T *p = x.row(pixels[r]) + channel;
        prefetch(p, POOL ? x.ld + count : count);
        if (POOL) prefetch(p + s.width * x.ld, x.ld + count);
    }
}

// ---- Threads ----

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

}  // namespace
