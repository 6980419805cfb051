// Evaluation: ImageNet's stem, from images in any layout.
#pragma once

#include "evaluation.h"

namespace {

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
                E *to = &out[(i + 3) * pitch() + c];  // will be read as words
                if constexpr (std::is_same_v<T, E>) {
                    memcpy(to, &p[i * strides[3]], sizeof(E));
                } else {
                    const uint32_t bits = uint32_t(p[i * strides[3]].bits) << 16;
                    memcpy(to, &bits, sizeof bits);
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
