// Evaluation: a whole dense block, or a transition, in one call.
//
// Filters are packed in advance. A tile of pixels is computed in blocks of ROWS pixels by PANEL
// output channels, which fit into the registers; AMX computes the whole tile at once. The inputs of
// an output pixel are contiguous runs: for a 1x1 convolution its normalized channels, for a 3x3
// convolution three lines of a map with a border of zeros. The order of summation depends only on
// the shape of the filters, not on threads, the batch or the position in the map.
#pragma once

#include <atomic>
#include <omp.h>
#include <sched.h>

#include "amx.h"
#include "maps.h"
#include "product.h"
#include "vectors.h"

namespace {

constexpr int ROWS = AMX ? TILE_ROWS : LANES == 16 ? 8 : 6, VECTORS = 2, PANEL = VECTORS * LANES;
constexpr long EVALUATION_TILE = 48;  // pixels, at most TILE; they stay in L2
constexpr long RUN_WORDS = 384;       // of a pixel, at once: such a part of a panel stays in L1

// A convolution and the norm and ReLU before it, in the stem after it. The vectors are padded with
// zeros to whole panels.
struct PackedConv {
    const float *mean, *scale, *bias;
    const uint32_t *filters;  // see pack_panels
    long channels, outputs, side;
    Norm norm() const { return {mean, scale, bias}; }
    long panels() const { return (outputs + PANEL - 1) / PANEL; }
};

// The inputs of a convolution for one output pixel: a contiguous run for each of `side` lines. A
// pixel has `pitch` elements: the channels, rounded up to whole vectors and steps in a map with a
// border, and to pairs in images.
template <class T> struct Reads {
    static constexpr int PAIR = Product<T>::PAIR;
    long side, channels;
    long pitch() const {
        return round_up(channels, side == 3 ? std::max(LANES, STEP * PAIR) : PAIR);
    }
    long run_words() const { return words_for<T>(side * pitch()); }
    long all_words() const { return side * run_words(); }
};

// The filters [O, side, side, C] as panel after panel of columns, in a panel a row for each word.
template <class T>
void pack_panels(const float *filters, long outputs, const Reads<T> &reads, uint32_t *packed,
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
                            filters[(((first + o) * reads.side + y) * reads.side + x)
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
    // Zeros in the border, and everywhere if the pitch has vectors that are not written.
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
                   const uint32_t *filters, long words, float *sums) {
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
        const uint32_t *b = filters + run * runs.words * NV * LANES;
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
        const uint32_t *filters = conv.filters + column * words;
        if constexpr (AMX) {
            with_constant<EVALUATION_TILE / ROWS>(blocks, [&](auto r) {
                with_constant<VECTORS>(width / LANES, [&](auto v) {
                    multiply_tiles<r, v>(rows.at[0], rows.stride, runs, words, filters, sums, width,
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
                                                   std::min(runs.count, run + at_once), filters,
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
            // Small maps together, so that filters that were read serve some more pixels.
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

}  // namespace
