// Contract: ultra_kernels/causal_conv1d/op.py
//
// Time is cut into tiles that lie within one sequence; the rows of a tile that lie outside it are zeros, so that no tap
// needs a test. The gradient of the input is the same convolution with mirrored weights.
#include "causal_conv1d/causal_conv1d.h"

#include "common/gates.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

constexpr int64_t kHalo = kConvMaxWidth - 1;
constexpr int64_t kMaxRows = kConvRows + 2 * kHalo;

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls body(begin, end, t, rows) for the tiles of all sequences [begin, end) of one batch row.
template <typename Body> static void for_tiles(const ConvProblem& p, const Body& body) {
    for (int64_t s = 0; s < (p.borders ? p.sequences : 1); ++s) {
        const int64_t begin = p.borders ? p.borders[s] : 0, end = p.borders ? p.borders[s + 1] : p.length;
        for (int64_t t = begin; t < end; t += kConvRows) body(begin, end, t, min_of(kConvRows, end - t));
    }
}

// Rows t .. t + rows of a sequence [begin, end), zeros outside it.
static void load_rows(float* tile, const View& v, int64_t b, int64_t d, int64_t channels, int64_t begin, int64_t end,
                      int64_t t, int64_t rows) {
    const int64_t from = max_of(t, begin), to = max_of(from, min_of(t + rows, end));
    for (int64_t i = 0; i < (from - t) * kConvBlock; ++i) tile[i] = 0.0f;
    load_tile(Tile{tile + (from - t) * kConvBlock, kConvBlock, kLanes}, v, b, d, from, 1, channels, kConvBlock,
              to - from);
    for (int64_t i = (to - t) * kConvBlock; i < rows * kConvBlock; ++i) tile[i] = 0.0f;
}

// y[i] = bias + sum over k of weight[k] * x[i + k], rows and weights kConvBlock wide.
template <int width>
static void convolve(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kLanes) {
        vf w[width], start = bias ? load(bias + c) : splat(0.0f);
        for (int k = 0; k < width; ++k) w[k] = load(weight + k * kConvBlock + c);
        for (int64_t i = 0; i < rows; ++i) {
            vf sum = start;
            for (int k = 0; k < width; ++k) sum += w[k] * load(x + (i + k) * kConvBlock + c);
            store(y + i * kConvBlock + c, sum);
        }
    }
}

// dweight[k] += sum over i of g[i] * x[i + k], dbias += sum over i of g[i].
template <int width>
static void correlate(const float* g, const float* x, float* dweight, float* dbias, int64_t rows, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kLanes) {
        vf dw[width], db = load(dbias + c);
        for (int k = 0; k < width; ++k) dw[k] = load(dweight + k * kConvBlock + c);
        for (int64_t i = 0; i < rows; ++i) {
            vf v = load(g + i * kConvBlock + c);
            db += v;
            for (int k = 0; k < width; ++k) dw[k] += v * load(x + (i + k) * kConvBlock + c);
        }
        for (int k = 0; k < width; ++k) store(dweight + k * kConvBlock + c, dw[k]);
        store(dbias + c, db);
    }
}

// weight[k][lane] and bias[lane] of a block, zeros past the last channel.
static void load_weights(const ConvProblem& p, int64_t d, int64_t channels, float* weight, float* bias) {
    for (int64_t k = 0; k < p.width; ++k)
        for (int64_t c = 0; c < kConvBlock; ++c)
            weight[k * kConvBlock + c] = c < channels ? p.weight[k * p.channels + d + c] : 0.0f;
    for (int64_t c = 0; c < kConvBlock; ++c) bias[c] = p.bias && c < channels ? p.bias[d + c] : 0.0f;
}

template <int width> static void forward(const ConvProblem& p, const View& y, int threads) {
    const int64_t blocks = (p.channels + kConvBlock - 1) / kConvBlock;
    parallel_for(p.batch * blocks, threads, [&](int64_t task) {
        const int64_t b = task / blocks, d = task % blocks * kConvBlock, channels = min_of(kConvBlock, p.channels - d);
        float weight[width * kConvBlock], bias[kConvBlock];
        float in[kMaxRows * kConvBlock], result[kConvRows * kConvBlock];
        load_weights(p, d, channels, weight, bias);
        for_tiles(p, [&](int64_t begin, int64_t end, int64_t t, int64_t rows) {
            load_rows(in, p.x, b, d, channels, begin, end, t + p.first, rows + width - 1);
            convolve<width>(in, weight, bias, result, rows, channels);
            if (p.silu)
                for (int64_t i = 0; i < rows * kConvBlock; i += kLanes) {
                    vf v = load(result + i);
                    store(result + i, v * sigmoid(v));
                }
            store_tile(Tile{result, kConvBlock, kLanes}, y, b, d, t, 1, channels, rows);
        });
    });
}

template <int width>
static void backward(const ConvProblem& p, const View& dy, const View& dx, float* dweight, float* dbias, int threads) {
    constexpr int64_t halo = width - 1;
    const int64_t last = p.first + halo;  // a tap reads from t + first to t + last
    // One task owns its channels over all of batch and time: no partial sums.
    parallel_for((p.channels + kConvBlock - 1) / kConvBlock, threads, [&](int64_t task) {
        const int64_t d = task * kConvBlock, channels = min_of(kConvBlock, p.channels - d);
        float weight[width * kConvBlock], mirrored[width * kConvBlock], bias[kConvBlock];
        float dw[width * kConvBlock], db[kConvBlock];
        float x[kMaxRows * kConvBlock], g[kMaxRows * kConvBlock], result[kMaxRows * kConvBlock];
        load_weights(p, d, channels, weight, bias);
        for (int64_t i = 0; i < width * kConvBlock; ++i) {
            mirrored[i] = weight[(halo - i / kConvBlock) * kConvBlock + i % kConvBlock];
            dw[i] = 0.0f;
        }
        for (int64_t c = 0; c < kConvBlock; ++c) db[c] = 0.0f;
        for (int64_t b = 0; b < p.batch; ++b)
            for_tiles(p, [&](int64_t begin, int64_t end, int64_t t, int64_t rows) {
                // outputs t - last .. t + rows - first depend on the inputs of this tile, and those on rows of x
                load_rows(g, dy, b, d, channels, begin, end, t - last, rows + halo);
                load_rows(x, p.x, b, d, channels, begin, end, t - halo, rows + 2 * halo);
                if (p.silu) {
                    convolve<width>(x, weight, bias, result, rows + halo, channels);
                    for (int64_t i = 0; i < (rows + halo) * kConvBlock; i += kLanes) {
                        vf v = load(result + i), s = sigmoid(v);
                        store(g + i, load(g + i) * s * (1.0f + v * (1.0f - s)));
                    }
                }
                correlate<width>(g + last * kConvBlock, x + last * kConvBlock, dw, db, rows, channels);
                convolve<width>(g, mirrored, nullptr, result, rows, channels);
                store_tile(Tile{result, kConvBlock, kLanes}, dx, b, d, t, 1, channels, rows);
            });
        for (int64_t c = 0; c < channels; ++c) {
            dbias[d + c] = db[c];
            for (int64_t k = 0; k < width; ++k) dweight[k * p.channels + d + c] = dw[k * kConvBlock + c];
        }
    });
}

#define ULTRA_EACH_WIDTH(call)                                                                                        \
    switch (p.width) {                                                                                                \
        case 2: { constexpr int W = 2; call; break; }                                                                 \
        case 3: { constexpr int W = 3; call; break; }                                                                 \
        case 4: { constexpr int W = 4; call; break; }                                                                 \
        case 5: { constexpr int W = 5; call; break; }                                                                 \
        case 6: { constexpr int W = 6; call; break; }                                                                 \
        case 7: { constexpr int W = 7; call; break; }                                                                 \
        default: { constexpr int W = 8; call; break; }                                                                \
    }

void conv_forward(const ConvProblem& p, const View& y, int threads) { ULTRA_EACH_WIDTH(forward<W>(p, y, threads)) }

void conv_backward(const ConvProblem& p, const View& dy, const View& dx, float* dweight, float* dbias, int threads) {
    ULTRA_EACH_WIDTH(backward<W>(p, dy, dx, dweight, dbias, threads))
}

}  // namespace ULTRA_ISA
}  // namespace ultra
