// Contract: ultra_kernels/bitlinear/op.py. Both products have small integers on one side, which are widened tile by tile:
// packed weights, or int8 codes of x. Their scales are factors of the other side.
#include "bitlinear/bitlinear.h"

#include "common/blocks.h"
#include "common/codes.h"
#include "common/parallel.h"

namespace ultra {
namespace ULTRA_ISA {

namespace {

// A task's output: so many rows that widening the right factor, and columns that copying the left one, costs little.
constexpr int64_t kInputRows = 512, kInputColumns = kColumns;
constexpr int64_t kWeightRows = 192, kWeightColumns = 4 * kColumns;

// Scratch memory of a thread.
struct Tiles {
    float *out, *right, *left;

    explicit Tiles(float* scratch) {
        float* at = scratch + thread_index() * floats();
        out = at, at += kWeightRows * kWeightColumns;
        right = at, at += kInner * kColumns;
        left = at;
    }
    static int64_t floats() {
        static_assert(kInputRows * kInputColumns <= kWeightRows * kWeightColumns, "`out` holds either block");
        return kWeightRows * kWeightColumns + kInner * kColumns + kInner * kWeightRows;
    }
};

typedef int8_t vb __attribute__((vector_size(kLanes)));
static inline vf widen(const int8_t* p) {
    vb narrow; memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, vf);
}

// Weights of rows first .. first + rows, columns begin .. begin + columns, as int8 with rows of kColumns; 0 past the matrix.
// `first` and `begin` are multiples of 16.
void unpack(const TernaryMatrix& w, int64_t first, int64_t rows, int64_t begin, int64_t columns, int8_t* to) {
    const int64_t blocks = (w.K + kBlockColumns - 1) / kBlockColumns;
    for (int64_t i = 0; i < rows; i += kLanes) {
        const uint8_t* from = codes_of_vector(w.codes, blocks, (first + i) / kLanes);
        for (int64_t c = 0; c < columns; c += kBlockColumns) {
            const Codes packed = load_codes(from + (begin + c) / kBlockColumns * kBlockBytes);
            vf x[4];
            for (int s = 0; s < kSlots; ++s) {
                const Codes codes = slot(packed, s);
                memcpy(&x[s], &codes, sizeof codes);
            }
            transpose_quads(x);
            for (int q = 0; q < 4; ++q) {
                alignas(64) int8_t bytes[kCodeBytes];
                memcpy(bytes, &x[q], sizeof bytes);
                for (int g = 0; g < kLanes / 4; ++g)
                    for (int b = 0; b < kBlockColumns; ++b)
                        to[(i + 4 * g + q) * kColumns + c + b] = (int8_t)(bytes[g * kBlockColumns + b] - 1);
            }
        }
    }
}

template <typename Word>
void dx_block(const OutputGradient& dy, int64_t m, int64_t rows, const TernaryMatrix& w, int64_t k, const Tiles& tiles,
              float gamma, float* dx) {
    const int64_t columns = at_most(w.K - k, kColumns), step = inner_step<Word>(w.N);
    auto* weights = (int8_t*)tiles.left;  // not used otherwise: dy is read in place
    const auto put = [=](int64_t i, int64_t c, vf x) {
        store_up_to(dx + (m + i) * w.K + k + c, x * gamma, columns - c);
    };
    for (int64_t n = 0; n < w.N; n += step) {
        const int64_t inner = at_most(w.N - n, step);
        unpack(w, n, inner, k, columns, weights);
        const Stripes<Word> right{(Word*)tiles.right, words<Word>(inner), columns};
        fill_words(inner, right, [&](int64_t i, int64_t c) { return widen(weights + i * kColumns + c); });
        const Word* left = (const Word*)dy.data + (m * dy.row + n) / kNumbers<Word>;
        multiply(rows, words<Word>(inner), Factor<Word>{left, dy.row / kNumbers<Word>}, right, 0,
                 part_of_sum(n == 0, n + inner == w.N, tiles.out, kColumns, put));
    }
}

static inline vf widen_up_to(const int8_t* p, int64_t n) {
    if (n >= kLanes) return widen(p);
    int8_t part[kLanes] = {};
    memcpy(part, p, n);
    return widen(part);
}

template <typename Word, typename T>
void dweight_block(const T* dy, int64_t dy_row, int64_t n, int64_t rows, const Int8Rows& x, int64_t k, int64_t K,
                   const Tiles& tiles, float* dweight) {
    const int64_t columns = at_most(K - k, kWeightColumns), step = inner_step<Word>(x.M);
    auto* panels = (Word*)tiles.left;
    for (int64_t m = 0; m < x.M; m += step) {
        const int64_t some = at_most(x.M - m, step), inner = words<Word>(some);
        for (int64_t r = 0; r < rows; r += kPanel)
            fill_words(some, padded(at_most(rows - r, kPanel)), panels + r * inner, kPanel, [&](int64_t i, int64_t c) {
                return load_up_to(dy + (m + i) * dy_row + n + r + c, rows - r - c) * x.step[m + i];
            });
        for (int64_t j = 0; j < columns; j += kColumns) {
            const int64_t few = at_most(columns - j, kColumns);
            const Stripes<Word> right{(Word*)tiles.right, inner, few};
            fill_words(some, right, [&](int64_t i, int64_t c) {
                return widen_up_to(x.codes + (m + i) * K + k + j + c, few - c);
            });
            for (int64_t r = 0; r < rows; r += kPanel) {
                float* corner = dweight + (n + r) * K + k + j;
                const auto put = [=](int64_t i, int64_t c, vf sum) { store_up_to(corner + i * K + c, sum, few - c); };
                multiply(at_most(rows - r, kPanel), inner, Turned<Word>{panels + r * inner, kPanel}, right, 0,
                         part_of_sum(m == 0, m + some == x.M, tiles.out + r * kWeightColumns + j, kWeightColumns,
                                     put));
            }
        }
    }
}

// body(row, rows, column, tiles) for every block of an output.
template <typename Body>
void for_each_block(int64_t rows, int64_t block_rows, int64_t columns, int64_t block_columns, float* scratch,
                    int threads, const Body& body) {
    const int64_t down = (rows + block_rows - 1) / block_rows;
    const int64_t across = (columns + block_columns - 1) / block_columns;
    parallel_for(down * across, threads, [&](int64_t i) {
        const int64_t row = i / across * block_rows;
        body(row, at_most(rows - row, block_rows), i % across * block_columns, Tiles(scratch));
    });
}

template <typename T>
void norm_backward(const float* grad, const T* x, int64_t x_row, const float* rstd, const float* weight, int64_t M,
                   int64_t K, T* dx, float* dweight, float* parts, int threads) {
    const int64_t blocks = row_blocks(M);
    for_row_blocks(M, threads, [&](int64_t begin, int64_t end, int64_t block) {
        float* sums = parts + block * K;
        for (int64_t k = 0; k < K; ++k) sums[k] = 0.0f;
        for (int64_t m = begin; m < end; ++m) {
            const float* g = grad + m * K;
            const T* from = x + m * x_row;
            const float r = rstd[m];
            const auto part = [&](const auto* p, int64_t k) {
                return K - k < kLanes ? load_part(p + k, (int)(K - k)) : load(p + k);
            };
            vf dot = {};
            for (int64_t k = 0; k < K; k += kLanes) dot += part(g, k) * part(weight, k) * part(from, k);
            const float mean = sum(dot) * r * r / (float)K;
            for (int64_t k = 0; k < K; k += kLanes) {
                const vf gk = part(g, k), xk = part(from, k);
                const vf out = (gk * part(weight, k) - xk * mean) * r, dw = part(sums, k) + gk * xk * r;
                if (K - k < kLanes) {
                    store_part(dx + m * K + k, out, (int)(K - k));
                    store_part(sums + k, dw, (int)(K - k));
                } else {
                    store(dx + m * K + k, out);
                    store(sums + k, dw);
                }
            }
        }
    });
    for (int64_t k = 0; k < K; ++k) {
        float sum = 0.0f;
        for (int64_t block = 0; block < blocks; ++block) sum += parts[block * K + k];
        dweight[k] = sum;
    }
}

}  // namespace

bool bitlinear_pairs() { return kPairs; }
int64_t bitlinear_scratch(int threads) { return threads * Tiles::floats(); }

void bitlinear_dx(const OutputGradient& dy, int64_t M, const TernaryMatrix& w, const float* gamma, float* dx,
                  float* scratch, int threads) {
    const auto block = [&](int64_t m, int64_t rows, int64_t k, const Tiles& tiles) {
        if (dy.pairs) dx_block<Pair>(dy, m, rows, w, k, tiles, *gamma, dx);
        else dx_block<float>(dy, m, rows, w, k, tiles, *gamma, dx);
    };
    for_each_block(M, kInputRows, w.K, kInputColumns, scratch, threads, block);
}

void bitlinear_dweight(const OutputGradient& dy, int64_t N, int64_t K, const Int8Rows& x, float* dweight,
                       float* scratch, int threads) {
    if (!x.M) {
        memset(dweight, 0, N * K * sizeof(float));
        return;
    }
    const auto block = [&](int64_t n, int64_t rows, int64_t k, const Tiles& tiles) {
        if (dy.pairs) dweight_block<Pair>((const BF16*)dy.data, dy.row, n, rows, x, k, K, tiles, dweight);
        else dweight_block<float>((const float*)dy.data, dy.row, n, rows, x, k, K, tiles, dweight);
    };
    for_each_block(N, kWeightRows, K, kWeightColumns, scratch, threads, block);
}

void bitlinear_norm_backward(const float* grad, const void* x, int64_t x_row, int dtype, const float* rstd,
                             const float* weight, int64_t M, int64_t K, void* dx, float* dweight, float* parts,
                             int threads) {
    if (dtype == kBFloat16)
        norm_backward(grad, (const BF16*)x, x_row, rstd, weight, M, K, (BF16*)dx, dweight, parts, threads);
    else if (dtype == kFloat16)
        norm_backward(grad, (const FP16*)x, x_row, rstd, weight, M, K, (FP16*)dx, dweight, parts, threads);
    else norm_backward(grad, (const float*)x, x_row, rstd, weight, M, K, (float*)dx, dweight, parts, threads);
}

// FNV-1a over 1024 numbers spread evenly.
uint64_t bitlinear_fingerprint(const void* data, int64_t n, int64_t size) {
    uint64_t hash = 14695981039346656037u;
    const int64_t samples = at_most(n, 1024);
    for (int64_t i = 0; i < samples; ++i) {
        uint32_t bits = 0;
        memcpy(&bits, (const char*)data + i * (n - 1) / (samples > 1 ? samples - 1 : 1) * size, size);
        hash = (hash ^ bits) * 1099511628211u;
    }
    return hash;
}

}  // namespace ULTRA_ISA
}  // namespace ultra
