// Contract: ultra_kernels/ternary/op.py. Packed codes go through registers, once for every two rows of x. With AVX-512 a
// step of 2 rows × 2 vectors of the matrix has 10 loads for 16 products; 4 × 1 has 17 and is 15 % slower, and unpacking
// codes into cache first is 5 % slower.
#include "ternary/ternary.h"

#include "common/codes.h"
#include "common/parallel.h"

namespace ultra {
namespace ULTRA_ISA {

namespace {

constexpr int64_t kVectorsOfTask = 64;
constexpr int64_t kWorkOfThread = 1 << 19;  // products that repay waking another thread

int64_t blocks_of(int64_t K) { return (K + kBlockColumns - 1) / kBlockColumns; }
int64_t vectors_of(int64_t N) { return (N + kLanes - 1) / kLanes; }
int64_t bytes_of(int64_t N, int64_t K) { return (N + kPanelRows - 1) / kPanelRows * blocks_of(K) * kBlockBytes; }

int threads_for(int64_t products, int threads) {
    const int64_t most = 1 + products / kWorkOfThread;
    return threads < most ? threads : (int)most;
}

// ---- where sums go: vector v of row m; of one past the matrix nothing is stored -------------------------------------
struct Integers {
    int32_t* y;
    int64_t N;

    void operator()(int64_t m, int64_t v, vi sum) const {
        int32_t* at = y + m * N + v * kLanes;
        const int64_t left = N - v * kLanes;
        if (left >= kLanes) memcpy(at, &sum, sizeof sum);
        else for (int i = 0; i < left; ++i) at[i] = sum[i];
    }
};

template <typename T> struct Scaled {
    T* y;
    int64_t N;
    const float* step;
    float scale;
    const float* bias;

    void operator()(int64_t m, int64_t v, vi sum) const {
        T* at = y + m * N + v * kLanes;
        const int64_t left = N - v * kLanes;
        vf out = __builtin_convertvector(sum, vf) * (step[m] * scale);
        if (left >= kLanes) {
            store(at, bias ? out + load(bias + v * kLanes) : out);
        } else {
            if (bias) out += load_part(bias + v * kLanes, (int)left);
            store_part(at, out, (int)left);
        }
    }
};

// ---- products -------------------------------------------------------------------------------------------------------
struct Rows {
    const int8_t* x;
    int64_t row, M, K;
    const int32_t* sums;  // of each row
    // The last rows, from which one may read up to a whole block; codes past K are 0, whatever they multiply.
    int64_t copied;
    const int8_t* copies;

    const int8_t* at(int64_t m) const {
        const int64_t copy = m + copied - M;
        return copy < 0 ? x + m * row : copies + copy * blocks_of(K) * kBlockColumns;
    }
};

// Rows begin .. end of x, and the matrix that they are multiplied with.
struct Group {
    int64_t begin, end;
    TernaryMatrix w;
};

// Sums over sections short enough for narrow ones: add(begin, end, sums) adds those of a section, `unscaled` ends them.
template <int rows, int vectors, int slots, typename Add, typename Out>
static inline void sum_sections(const Rows& x, int64_t m, int64_t first, int64_t length, int64_t section, const Add& add,
                                const Out& out) {
    vi whole[rows][vectors];
    for (int64_t begin = 0; begin < length || begin == 0; begin += section) {
        Partial sum[rows][vectors][slots] = {};
        add(begin, length - begin > section ? begin + section : length, sum);
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < vectors; ++v) {
                if (begin == 0) whole[r][v] = vi{} - x.sums[m + r];
                for (int s = 0; s < slots; ++s) whole[r][v] += total(sum[r][v][s]) >> 2 * s;
            }
        if (length - begin <= section) break;
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) out(m + r, first + v, whole[r][v]);
}

template <int rows, int vectors, typename Out>
static void multiply_rows(const Rows& x, int64_t m, const TernaryMatrix& w, int64_t first, const Out& out) {
    constexpr int kSums = kScaledSlots ? kSlots : 1;
    const int64_t blocks = blocks_of(w.K);
    const uint8_t* codes[vectors];
    for (int v = 0; v < vectors; ++v) codes[v] = codes_of_vector(w.codes, blocks, first + v);
    const int8_t* from[rows];
    for (int r = 0; r < rows; ++r) from[r] = x.at(m + r);
    const auto add = [&](int64_t begin, int64_t end, Partial(&sum)[rows][vectors][kSums]) {
        for (int64_t j = begin; j < end; ++j) {
            Codes packed[vectors];
            for (int v = 0; v < vectors; ++v) packed[v] = load_codes(codes[v] + j * kBlockBytes);
#pragma GCC unroll 4
            for (int s = 0; s < kSlots; ++s) {
                Codes c[vectors];
                for (int v = 0; v < vectors; ++v) c[v] = scaled_slot(packed[v], s);
                for (int r = 0; r < rows; ++r) {
                    const Quad quad = splat_quad(from[r] + j * kBlockColumns + 4 * s);
                    for (int v = 0; v < vectors; ++v) multiply_add(sum[r][v][kScaledSlots ? s : 0], c[v], quad);
                }
            }
        }
    };
    sum_sections<rows, vectors, kSums>(x, m, first, blocks, kMostScaledQuads / (kSlots / kSums), add, out);
}

// `rows` rows from m, vectors begin .. end, as many at a time as give enough independent sums.
template <int rows, typename Out>
static void multiply_vectors(const Rows& x, int64_t m, const TernaryMatrix& w, int64_t begin, int64_t end,
                             const Out& out) {
    constexpr int kVectors = rows == 1 ? 4 : 2;
    int64_t v = begin;
    for (; v + kVectors <= end; v += kVectors) multiply_rows<rows, kVectors>(x, m, w, v, out);
    for (; v < end; ++v) multiply_rows<rows, 1>(x, m, w, v, out);
}

// Without scaled slots shifts and masks are a third of the work: from kUnpackedFrom rows on they are done once for
// kUnpackedRows rows, a section of a panel at a time.
constexpr int64_t kUnpackedFrom = 6, kUnpackedRows = 32, kUnpackedBlocks = 64;

template <int rows>
static void add_unpacked(const Rows& x, int64_t m, int64_t column, const uint8_t* codes, int64_t quads,
                         vi (*sums)[kVectorsOfPanel]) {
    const int8_t* from[rows];
    for (int r = 0; r < rows; ++r) from[r] = x.at(m + r) + column;
    for (int v = 0; v < kVectorsOfPanel; v += 2) {
        for (int64_t begin = 0; begin < quads; begin += kMostQuads) {
            const int64_t end = quads - begin > kMostQuads ? begin + kMostQuads : quads;
            Partial sum[rows][2] = {};
            for (int64_t k = begin; k < end; ++k) {
                const Codes a = load_codes(codes + k * kBlockBytes + v * kCodeBytes);
                const Codes b = load_codes(codes + k * kBlockBytes + (v + 1) * kCodeBytes);
                for (int r = 0; r < rows; ++r) {
                    const Quad quad = splat_quad(from[r] + 4 * k);
                    multiply_add(sum[r][0], a, quad);
                    multiply_add(sum[r][1], b, quad);
                }
            }
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < 2; ++i) sums[r][v + i] += total(sum[r][i]);
        }
    }
}

template <typename Out>
static void multiply_unpacked(const Rows& x, const Group& group, int64_t panel, const Out& out) {
    const TernaryMatrix& w = group.w;
    const int64_t blocks = blocks_of(w.K);
    alignas(64) uint8_t codes[kUnpackedBlocks * kSlots * kBlockBytes];
    for (int64_t m = group.begin; m < group.end; m += kUnpackedRows) {
        const int64_t rows = group.end - m < kUnpackedRows ? group.end - m : kUnpackedRows;
        vi sums[kUnpackedRows][kVectorsOfPanel];
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < kVectorsOfPanel; ++v) sums[r][v] = vi{} - x.sums[m + r];
        for (int64_t begin = 0; begin < blocks; begin += kUnpackedBlocks) {
            const int64_t count = blocks - begin < kUnpackedBlocks ? blocks - begin : kUnpackedBlocks;
            for (int v = 0; v < kVectorsOfPanel; ++v) {
                const uint8_t* from = codes_of_vector(w.codes, blocks, panel * kVectorsOfPanel + v);
                for (int64_t j = 0; j < count; ++j) {
                    const Codes packed = load_codes(from + (begin + j) * kBlockBytes);
                    for (int s = 0; s < kSlots; ++s) {
                        const Codes c = slot(packed, s);
                        memcpy(codes + (j * kSlots + s) * kBlockBytes + v * kCodeBytes, &c, sizeof c);
                    }
                }
            }
            int64_t r = 0;
            for (; r + 4 <= rows; r += 4)
                add_unpacked<4>(x, m + r, begin * kBlockColumns, codes, count * kSlots, sums + r);
            for (; r < rows; ++r) add_unpacked<1>(x, m + r, begin * kBlockColumns, codes, count * kSlots, sums + r);
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < kVectorsOfPanel; ++v) out(m + r, panel * kVectorsOfPanel + v, sums[r][v]);
    }
}

// Vectors begin .. end of a group's matrix.
template <typename Out>
static void multiply_group(const Rows& x, const Group& group, int64_t begin, int64_t end, const Out& out) {
    if constexpr (!kScaledSlots) {
        if (group.end - group.begin >= kUnpackedFrom) {
            for (int64_t v = begin; v < end; v += kVectorsOfPanel)
                multiply_unpacked(x, group, v / kVectorsOfPanel, out);
            return;
        }
    }
    int64_t m = group.begin;
    for (; m + 2 <= group.end; m += 2) multiply_vectors<2>(x, m, group.w, begin, end, out);
    if (m < group.end) multiply_vectors<1>(x, m, group.w, begin, end, out);
}

// Calls run(group, begin, end) for parts of the vectors of each of `groups` matrices, each N × K, in parallel.
template <typename Run>
static void parallel_parts(int64_t groups, int64_t M, int64_t N, int64_t K, int threads, const Run& run) {
    const int64_t vectors = vectors_of(N);
    if (!M || !vectors) return;
    threads = threads_for(M * N * K, threads);
    int64_t each = (vectors / 4 + threads - 1) / threads * 4;  // of a task
    if (each > kVectorsOfTask) each = kVectorsOfTask;
    if (each < 4) each = 4;
    if (!kScaledSlots && M >= kUnpackedFrom) each = kVectorsOfPanel;
    const int64_t parts = (vectors + each - 1) / each;
    parallel_for(groups * parts, threads, [&](int64_t i) {
        const int64_t begin = i % parts * each;
        run(i / parts, begin, begin + each < vectors ? begin + each : vectors);
    });
}

int32_t sum_of(const int8_t* x, int64_t K) {
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += x[k];
    return sum;
}

// What a product needs beside x. The sums of few rows find place on the stack.
struct Workspace {
    static constexpr int64_t kOnStack = 16;
    int32_t few[kOnStack];

    static int64_t bytes_of_sums(int64_t M) { return M > kOnStack ? (4 * M + 63) / 64 * 64 : 0; }
    // Reading 16 columns of another row than the last ends in the row after it, unless rows are shorter than that.
    static int64_t copied(int64_t row, int64_t M, int64_t K) {
        return K % kBlockColumns == 0 ? 0 : row < kBlockColumns || M == 0 ? M : 1;
    }
    static int64_t bytes(int64_t row, int64_t M, int64_t K) {
        return bytes_of_sums(M) + copied(row, M, K) * blocks_of(K) * kBlockColumns;
    }

    Rows prepare(const int8_t* x, int64_t row, int64_t M, int64_t K, char* scratch, int threads) {
        int32_t* sums = M > kOnStack ? (int32_t*)scratch : few;
        const int64_t block = 64;
        parallel_for((M + block - 1) / block, threads_for(M * K / 8, threads), [&](int64_t i) {
            for (int64_t m = i * block; m < M && m < (i + 1) * block; ++m) sums[m] = sum_of(x + m * row, K);
        });
        auto* copies = (int8_t*)scratch + bytes_of_sums(M);
        const int64_t count = copied(row, M, K), width = blocks_of(K) * kBlockColumns;
        for (int64_t i = 0; i < count; ++i) {
            memcpy(copies + i * width, x + (M - count + i) * row, K);
            memset(copies + i * width + K, 0, width - K);
        }
        return {x, row, M, K, sums, count, copies};
    }
};

// ---- rounding -------------------------------------------------------------------------------------------------------
// The largest |x|, NaN if there is one: ordered as integers, the bits of NaN are above those of infinity.
struct Largest {
    vi bits = {};
    void operator()(vf x) {
        const vi a = as_int(x) & 0x7fffffff, greater = a > bits;
        bits = (greater & a) | (~greater & bits);
    }
    float value() const {
        int32_t most = 0;
        for (int i = 0; i < kLanes; ++i) most = bits[i] > most ? bits[i] : most;
        return bits_to_float((uint32_t)most);
    }
};

static inline void store_bytes(int8_t* p, vi x, int n) {
    typedef int8_t vb __attribute__((vector_size(kLanes)));
    const vb narrow = __builtin_convertvector(x, vb);
    if (n >= kLanes) memcpy(p, &narrow, sizeof narrow);
    else for (int i = 0; i < n; ++i) p[i] = narrow[i];
}

// One row; `at(k)` and `part(k, n)` give x, or norm(x).
template <typename Load, typename Part>
static float quantize_row(int64_t K, const Load& at, const Part& part, int8_t* codes) {
    Largest largest;
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) largest(at(k));
    if (k < K) largest(part(k, (int)(K - k)));
    const float found = largest.value(), absmax = found < 1e-5f ? 1e-5f : found;
    const float inverse = 1.0f / absmax * 127.0f;  // as torch has 127 / absmax
    for (k = 0; k + kLanes <= K; k += kLanes) store_bytes(codes + k, round_to_int(at(k) * inverse), kLanes);
    if (k < K) store_bytes(codes + k, round_to_int(part(k, (int)(K - k)) * inverse), (int)(K - k));
    return absmax / 127.0f;
}

template <typename T>
static void quantize_rows(const T* x, int64_t row, int64_t K, const float* weight, const Int8Rows& to, float* rstd,
                          int threads) {
    const int64_t block = 16;
    parallel_for((to.M + block - 1) / block, threads_for(to.M * K / 4, threads), [&](int64_t i) {
        for (int64_t m = i * block; m < to.M && m < (i + 1) * block; ++m) {
            const T* from = x + m * row;
            int8_t* codes = to.codes + m * K;
            const auto load_x = [&](int64_t k) { return load(from + k); };
            const auto part_x = [&](int64_t k, int n) { return load_part(from + k, n); };
            if (!weight) {
                to.step[m] = quantize_row(K, load_x, part_x, codes);
                continue;
            }
            vf squares = {};
            int64_t k = 0;
            for (; k + kLanes <= K; k += kLanes) squares += load_x(k) * load_x(k);
            if (k < K) squares += part_x(k, (int)(K - k)) * part_x(k, (int)(K - k));
            const float r = 1.0f / __builtin_sqrtf(sum(squares) / (float)K + 1e-6f);
            rstd[m] = r;
            to.step[m] = quantize_row(
                K, [&](int64_t c) { return load_x(c) * r * load(weight + c); },
                [&](int64_t c, int n) { return part_x(c, n) * r * load_part(weight + c, n); }, codes);
        }
    });
}

}  // namespace

int64_t ternary_scratch(int64_t M, int64_t K) { return Workspace::bytes(K, M, K); }

void ternary_matmul(const int8_t* x, int64_t x_row, int64_t M, const TernaryMatrix& w, int32_t* y, char* scratch,
                    int threads) {
    Workspace space;
    const Rows rows = space.prepare(x, x_row, M, w.K, scratch, threads);
    parallel_parts(1, M, w.N, w.K, threads, [&](int64_t, int64_t begin, int64_t end) {
        multiply_group(rows, {0, M, w}, begin, end, Integers{y, w.N});
    });
}

void ternary_quantize_rows(const void* x, int64_t x_row, int dtype, int64_t K, const float* norm_weight,
                           const Int8Rows& to, float* rstd, int threads) {
    if (dtype == kBFloat16) quantize_rows((const BF16*)x, x_row, K, norm_weight, to, rstd, threads);
    else if (dtype == kFloat16) quantize_rows((const FP16*)x, x_row, K, norm_weight, to, rstd, threads);
    else quantize_rows((const float*)x, x_row, K, norm_weight, to, rstd, threads);
}

namespace {

template <typename T>
void product(const Int8Rows& x, const TernaryGroups& of, const TernaryMatrix& w, const float* scale, const float* bias,
             T* y, char* scratch, int threads) {
    Workspace space;
    const Rows rows = space.prepare(x.codes, w.K, x.M, w.K, scratch, threads);
    parallel_parts(of.count, x.M, w.N, w.K, threads, [&](int64_t e, int64_t begin, int64_t end) {
        const Group group{e ? of.ends[e - 1] : 0, of.ends[e], {w.codes + e * bytes_of(w.N, w.K), w.N, w.K}};
        const Scaled<T> out{y, w.N, x.step, scale[e], bias ? bias + e * w.N : nullptr};
        multiply_group(rows, group, begin, end, out);
    });
}

}  // namespace

void ternary_product(const Int8Rows& x, const TernaryGroups& of, const TernaryMatrix& w, const float* scale,
                     const float* bias, void* y, int dtype, char* scratch, int threads) {
    if (dtype == kBFloat16) product(x, of, w, scale, bias, (BF16*)y, scratch, threads);
    else if (dtype == kFloat16) product(x, of, w, scale, bias, (FP16*)y, scratch, threads);
    else product(x, of, w, scale, bias, (float*)y, scratch, threads);
}

int64_t ternary_linear_scratch(int64_t M, int64_t K) { return ternary_scratch(M, K) + M * (int64_t)sizeof(float) + M * K; }

void ternary_linear(const void* x, int64_t x_row, int64_t M, const TernaryGroups& of, const TernaryMatrix& w,
                    const float* scale, const float* bias, void* y, int dtype, char* scratch, int threads) {
    auto* step = (float*)(scratch + ternary_scratch(M, w.K));
    const Int8Rows rows{(int8_t*)(step + M), step, M};
    ternary_quantize_rows(x, x_row, dtype, w.K, nullptr, rows, nullptr, threads);
    ternary_product(rows, of, w, scale, bias, y, dtype, scratch, threads);
}

namespace {

template <typename T> double sum_of_magnitudes(const T* w, int64_t n) {
    double whole = 0;
    for (int64_t begin = 0; begin < n; begin += 4096) {  // float sums stay short
        const int64_t end = begin + 4096 < n ? begin + 4096 : n;
        vf sums[4] = {};
        int64_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int v = 0; v < 4; ++v) sums[v] += abs(load(w + i + v * kLanes));
        for (; i < end; i += kLanes)
            sums[0] += abs(end - i < kLanes ? load_part(w + i, (int)(end - i)) : load(w + i));
        whole += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return whole;
}

// A panel: rows first .. first + 16 of the matrix.
template <typename T>
void quantize_panel(const T* weight, int64_t N, int64_t K, int64_t first, float divisor, uint8_t* to) {
    const int64_t blocks = blocks_of(K);
    memset(to, 0, blocks * kBlockBytes);
    for (int64_t r = 0; r < kPanelRows && first + r < N; ++r) {
        const T* from = weight + (first + r) * K;
        for (int64_t j = 0; j < blocks; ++j) {
            int32_t codes[kBlockColumns] = {};
            for (int v = 0; v < kBlockColumns; v += kLanes) {
                const int64_t k = j * kBlockColumns + v, left = K - k;
                if (left <= 0) break;
                const vf x = left < kLanes ? load_part(from + k, (int)left) : load(from + k);
                const vf limited = max(min(x / divisor, splat(1.0f)), splat(-1.0f));
                vi code = round_to_int(limited) + 1;
                for (int i = (int)(left < kLanes ? left : kLanes); i < kLanes; ++i) code[i] = 0;
                memcpy(codes + v, &code, sizeof code);
            }
            uint8_t* at = to + j * kBlockBytes + 4 * r;
            for (int i = 0; i < 4; ++i)
                at[i] = (uint8_t)(codes[i] | codes[4 + i] << 2 | codes[8 + i] << 4 | codes[12 + i] << 6);
        }
    }
}

template <typename T>
void quantize_weight(const T* weight, int64_t N, int64_t K, bool median, float* gamma, uint8_t* packed, int threads) {
    const int64_t parts = row_blocks(N);
    double sums[kMostRowBlocks];
    threads = threads_for(N * K / 4, threads);
    if (!median) {
        for_row_blocks(N, threads, [&](int64_t begin, int64_t end, int64_t i) {
            sums[i] = sum_of_magnitudes(weight + begin * K, (end - begin) * K);
        });
        double whole = 0;
        for (int64_t i = 0; i < parts; ++i) whole += sums[i];
        *gamma = (float)(whole / (double)(N * K));
    }
    const float divisor = *gamma + 1e-5f;
    parallel_for((N + kPanelRows - 1) / kPanelRows, threads, [&](int64_t p) {
        quantize_panel(weight, N, K, p * kPanelRows, divisor, packed + p * blocks_of(K) * kBlockBytes);
    });
}

template <typename T>
void quantize_weights(const T* weight, int64_t count, int64_t N, int64_t K, bool median, float* gamma, uint8_t* packed,
                      int threads) {
    for (int64_t e = 0; e < count; ++e)
        quantize_weight(weight + e * N * K, N, K, median, gamma + e, packed + e * bytes_of(N, K), threads);
}

}  // namespace

void ternary_quantize_weight(const void* weight, int dtype, int64_t count, int64_t N, int64_t K, bool median,
                             float* gamma, uint8_t* packed, int threads) {
    if (dtype == kBFloat16) quantize_weights((const BF16*)weight, count, N, K, median, gamma, packed, threads);
    else if (dtype == kFloat16) quantize_weights((const FP16*)weight, count, N, K, median, gamma, packed, threads);
    else quantize_weights((const float*)weight, count, N, K, median, gamma, packed, threads);
}

}  // namespace ULTRA_ISA
}  // namespace ultra
