// The operations of a dense block in training, as CPU kernels: norm-ReLU-convolution, its backward,
// batch statistics, and the last step of a norm's backward; and in evaluation a whole block.
// `library.py` compiles them, and `cpu.py` calls them.
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
// The shifts are on the side of the outputs, which have few channels in a DenseNet (k), not of the
// inputs (4k or more). All other work on a pixel (norm, ReLU and its mask, pooling, sums) is done
// while the tile is in cache, and costs little. Around a library's convolutions it would be passes
// over memory, as expensive as the convolutions; hence our own.
//
// Two runs give the same bits: in training each thread has a fixed range of rows, and partial sums
// are added in the order of the threads.
//
// In kernels/: vectors.h, amx.h, maps.h, product.h, training.h, evaluation.h and stem.h; each one
// includes only those before it.

#include <vector>
#include <omp.h>

#include "kernels/evaluation.h"
#include "kernels/stem.h"
#include "kernels/training.h"

// ---- C interface for Python: compiled once for each MAP, float or bf16 ----

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
long ready() { return amx_is_permitted() && amx_is_right(); }
#endif

// The time of a 1x1 and a 3x3 convolution and their backward, in DenseNet-121's third block.
double seconds(long threads) {
    const long images = 8, side = 14, rows = images * side * side, most = 512;  // channels
    std::vector<MAP> x(rows * most), z(rows * most), total(rows * most);
    std::vector<float> ones(most, 1), sums(most), filters(most * most, 1);
    std::vector<float> d_filters(filters.size());
    const BatchNorm norm = {&ones[0], &ones[0], &ones[0], &ones[0], 0};
    const double start = omp_get_wtime();
    for (long filter_side : {1, 3}) {
        const long channels = filter_side == 1 ? 512 : 128, outputs = filter_side == 1 ? 128 : 32;
        const Shape shape = {images, side, side, channels, outputs, filter_side, false};
        const Map<const MAP> in = {x.data(), channels};
        forward<MAP>(in, norm, shape, filters.data(), {z.data(), outputs}, nullptr, nullptr,
                     threads);
        backward<MAP, false>({{z.data(), outputs}, {}, nullptr, nullptr, nullptr}, in, norm, shape,
                             filters.data(), {}, {total.data(), channels},
                             {&sums[0], &sums[0], d_filters.data(), &sums[0], &sums[0], false},
                             threads);
    }
    return omp_get_wtime() - start;
}

void statistics(const MAP *x, long ldx, long rows, long channels, float *mean, float *variance,
                long threads) {
    map_statistics<MAP>({x, ldx}, rows, channels, mean, variance, threads);
}

// The filters are [O, taps, C].
void norm_relu_conv(const MAP *x, long ldx, const float *mean, const float *variance,
                    const float *weight, const float *bias, float eps, const float *filters,
                    long images, long height, long width, long channels, long outputs, long side,
                    long pool, MAP *z, long ldz, float *z_mean, float *z_variance, long threads) {
    Shape shape = {images, height, width, channels, outputs, side, pool != 0};
    forward<MAP>({x, ldx}, {mean, variance, weight, bias, eps}, shape, filters, {z, ldz}, z_mean,
                 z_variance, threads);
}

void norm_relu_conv_backward(const MAP *dz, long lddz, const MAP *z, long ldz, const float *z_mean,
                             const float *a, const float *b, const MAP *x, long ldx,
                             const float *mean, const float *variance, const float *weight,
                             const float *bias, float eps, const float *filters, long images,
                             long height, long width, long channels, long outputs, long side,
                             long pool, const MAP *before, long ldb, MAP *total, long ldt,
                             float *d_weight, float *d_bias, float *d_filters, float *total_a,
                             float *total_b, long add, long threads) {
    Shape shape = {images, height, width, channels, outputs, side, pool != 0};
    auto run = pool ? backward<MAP, true> : backward<MAP, false>;
    run({{dz, lddz}, {z, ldz}, z_mean, a, b}, {x, ldx}, {mean, variance, weight, bias, eps}, shape,
        filters, {before, ldb}, {total, ldt},
        {d_weight, d_bias, d_filters, total_a, total_b, add != 0}, threads);
}

void complete(const MAP *total, long ldt, const MAP *x, long ldx, const float *mean, const float *a,
              const float *b, MAP *out, long ldo, long rows, long channels, long threads) {
    complete_map<MAP>({{total, ldt}, {x, ldx}, mean, a, b}, {out, ldo}, rows, channels, threads);
}

// ---- Evaluation ----

// The filters are [O, side, side, C]. Returns how many words they take when packed; writes them if
// `packed`.
long pack(const float *filters, long outputs, long side, long channels, uint32_t *packed,
          long threads) {
    const Reads<MAP> reads = {side, channels};
    if (packed) pack_panels<MAP>(filters, outputs, reads, packed, threads);
    return round_up(outputs, LANES) * reads.all_words();
}

// A hash of some values of each of n arrays, which are not empty, at scattered places.
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
