// Training: batch statistics, norm-ReLU-convolution and its backward.
#pragma once

#include <cmath>

#include "maps.h"
#include "product.h"
#include "vectors.h"

namespace {

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

// A norm by the statistics of a batch.
struct BatchNorm {
    const float *mean, *variance, *weight, *bias;
    float eps;

    float invstd(long channel) const { return 1 / std::sqrt(variance[channel] + eps); }
    Norm of(long channels) const {
        float *scale = scale_buffer.get<float>(channels);
        for (long c = 0; c < channels; c++) scale[c] = weight[c] * invstd(c);
        return {mean, scale, bias};
    }
};

// ---- Forward ----

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

// sums[r][:] = relu(norm(x[row + r])) W for n rows of at most TILE; the columns are padded.
template <class T, bool POOL>
void product_tile(const Input<T> &in, const uint32_t *packed, long row, long n, float *sums,
                  long ld_sums) {
    constexpr int PAIR = Product<T>::PAIR;
    const Shape &s = in.shape;
    const long all_steps = words_for<T>(s.channels), at_once = WORDS_AT_ONCE<T> * PAIR;
    const long ldy = round_up(whole_steps<T>(std::min(s.channels, at_once)), LANES)
                     + std::max(LANES, STEP * PAIR);
    auto *y = input_buffer.get<typename Product<T>::Element>(TILE * ldy);
    Pixels<POOL> pixels(s, row), next(s, row + TILE);
    for (long first = 0; first < s.channels; first += at_once) {
        long count = std::min(at_once, s.channels - first), steps = words_for<T>(count);
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
void forward(Map<const T> x, const BatchNorm &norm, const Shape &s, const float *filters, Map<T> z,
             float *mean, float *variance, int threads) {
    const Input<T> in = {x, norm.of(s.channels), s};
    auto *packed = filters_buffer.get<uint32_t>(words_for<T>(s.channels)
                                               * round_up(s.columns(), LANES));
    with_moments(s.outputs, mean, variance, threads, [&](Moments &moments, int thread, int team) {
        pack_filters<T>(filters, s, false, packed);
        Range lines = share_of_thread(s.images * s.height, 1, thread, team);
        Range rows = share_of_thread(s.rows(), BLOCK, thread, team);
        if (s.side == 3) forward_3x3<T>(in, packed, z, lines, moments);
        else if (s.pool) forward_1x1<T, true>(in, packed, z, rows, moments);
        else forward_1x1<T, false>(in, packed, z, rows, moments);
    });
}

// ---- Backward ----

// The gradient of the outputs z. While it is pending, it lacks the batch-statistics terms of the
// norm after z (see autograd.py): a + (z - mean) * b is to be subtracted.
template <class T> struct Gradient {
    Map<const T> dz, z;  // z.data is null if dz is not pending
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

// For a 3x3 convolution: all of it, with a border of zeros; so lines of width + 2 pixels.
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

// Through ReLU and norm: total = before + g * scale, and sums of g and of g * (x - mean); also the
// convolution's input, into y as a product reads it. `before.data` may be null, for zeros.
template <class T, bool POOL, int NV>
INLINE void finish_block(const vec (&block)[BLOCK][NV], const Input<T> &in,
                         const Map<const T> &before, const Map<T> &total,
                         const Pixels<POOL> &pixels, long first, long n, const Panel<NV> &panel,
                         const NormVectors *norm, vec *sums, vec *products, uint32_t *y) {
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
            if (before.data) share += load(before.row(i) + j, panel.mask(v));
            store(total.row(i) + j, share, panel.mask(v));
            return unless_negative(normed, normed);
        };
        auto pixel = [&](int r) __attribute__((always_inline)) {
            const long i = pixels[first + r];
            if (!POOL) return one(i, block[r][v]);
            const vec quarter = block[r][v] * 0.25f;
            vec input = {};
#pragma GCC unroll 1  // unrolled, it would take half of the time to compile
            for (int k = 0; k < 4; k++) input += one(i + k / 2 * width + k % 2, quarter);
            return input * 0.25f;
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

// Sums over the rows of a thread; d_filters is [panel of channels, (tap, o), channel of the panel].
struct Partial {
    float *d_filters, *sum_g, *sum_gx;
};

// Columns of the packed filters, the rows of their gradient, in whole blocks.
long whole_columns(const Shape &s) { return round_up(s.columns(), std::max(LANES, BLOCK)); }

// The rows of a tile two by two, as the product for d_filters reads them: words [pair, column], or
// for AMX [column, pair].
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
#ifdef BF16_AMX
            transpose(block);
#endif
            for (long i = 0; i < LANES; i++)
                store_bits(pairs + (AMX ? (column + i) * (TILE / 2) + k : (k + i) * ld + column),
                           block[i]);
        }
}

// `padded` is from pad_gradient, or null for a 1x1 convolution.
template <class T, bool POOL>
void backward_rows(const Input<T> &in, const uint32_t *packed, const Gradient<T> &gradient,
                   const typename Product<T>::Element *padded, const Map<const T> &before,
                   const Map<T> &total, Range rows, const Partial &partial) {
    const Shape &s = in.shape;
    typedef typename Product<T>::Element E;
    constexpr int PAIR = Product<T>::PAIR;
    const long columns = s.columns(), padded_columns = whole_columns(s);
    const long steps = words_for<T>(columns), ld = padded_columns + 64 / sizeof(E);
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
                prefetch_block(total, s, ahead, r, after, width);
                if (before.data && before.data != total.data)
                    prefetch_block(before, s, ahead, r, after, width);
                vec block[BLOCK][NV];
                multiply_block<T>(block, gradients + r * ld, ld / PAIR, packed + channel * steps,
                                  steps);
                finish_block<T>(block, in, before, total, pixels, r, n, panel, norm, sums,
                                products, y);
            }
            for (int v = 0; v < NV; v++) {
                float *sum_g = partial.sum_g + channel + v * LANES;
                float *sum_gx = partial.sum_gx + channel + v * LANES;
                store(sum_g, load(sum_g) + sums[v]);
                store(sum_gx, load(sum_gx) + products[v]);
            }
            const long pixel_words = words_for<T>(n), written = (n + PAIR - 1) / PAIR;
            if (written < pixel_words)
                memset(y + written * WIDTH, 0, (pixel_words - written) * WIDTH * sizeof *y);
            float *d_panel = partial.d_filters + channel * padded_columns;
            for (long column = 0; column < columns; column += BLOCK)
                multiply_block<T, NV, !AMX>(AMX ? pairs + column * (TILE / 2) : pairs + column,
                                            AMX ? TILE / 2 : ld, y, pixel_words,
                                            d_panel + column * WIDTH, WIDTH, true);
        });
    }
}

// Gradients of the parameters; a and b of the pending gradient of x.
struct Gradients {
    float *d_weight, *d_bias, *d_filters, *a, *b;
    bool add;  // to a and b
};

template <class T, bool POOL>
void backward(const Gradient<T> &gradient, Map<const T> x, const BatchNorm &norm, const Shape &s,
              const float *filters, Map<const T> before, Map<T> total, const Gradients &out,
              int threads) {
    typedef typename Product<T>::Element E;
    threads = std::min<long>(threads, (s.rows() + BLOCK - 1) / BLOCK);  // others would have no rows
    const Input<T> in = {x, norm.of(s.channels), s};
    const float count = s.images * s.height * s.width;
    const long channels = round_up(s.channels, LANES), columns = whole_columns(s);
    const long size = channels * (columns + 2);  // of the sums of a thread
    uint32_t *packed = filters_buffer.get<uint32_t>(words_for<T>(s.columns()) * channels);
    float *partials = partial_buffer.get<float>(size * threads);
    E *padded = nullptr;
    if (s.side == 3)
        padded = padded_buffer.get<E>(s.images * (s.height + 2) * (s.width + 2) * s.outputs);
    parallel(threads, [&](int thread, int team) {
        if (padded) pad_gradient(gradient, s, padded);
        pack_filters<T>(filters, s, true, packed);
        float *mine = partials + size * thread, *vectors = mine + channels * columns;
        memset(mine, 0, size * sizeof(float));
        backward_rows<T, POOL>(in, packed, gradient, padded, before, total,
                               share_of_thread(s.rows(), BLOCK, thread, team),
                               {mine, vectors, vectors + channels});
#pragma omp barrier
        auto sum = [&](long i) {  // over the threads, of LANES values
            vec values = {};
            for (int t = 0; t < team; t++) values += load(partials + size * t + i);
            return values;
        };
#pragma omp for nowait
        for (long first = 0; first < s.channels; first += LANES) {
            const vec sum_g = sum(channels * columns + first);
            const vec sum_gx = sum(channels * (columns + 1) + first);
            for (long c = first; c < std::min(first + LANES, s.channels); c++) {
                const float invstd = norm.invstd(c), share = in.norm.scale[c] / count;
                out.d_bias[c] = sum_g[c - first];
                out.d_weight[c] = sum_gx[c - first] * invstd;
                out.a[c] = (out.add ? out.a[c] : 0) + share * out.d_bias[c];
                out.b[c] = (out.add ? out.b[c] : 0) + share * invstd * out.d_weight[c];
            }
        }
        for_panels(s.channels, [&](auto panel) {
            const long first = panel.first, width = panel.WIDTH;
#pragma omp for nowait
            for (long o = 0; o < s.outputs; o++)
                for (long tap = 0; tap < s.taps(); tap++) {
                    const long row = first * columns + (tap * s.outputs + o) * width;
                    float *to = out.d_filters + ((o + 1) * s.taps() - 1 - tap) * s.channels + first;
                    for (int v = 0; v < panel.NV; v++)
                        store(to + v * LANES, sum(row + v * LANES), panel.mask(v));
                }
        });
    });
}

}  // namespace
