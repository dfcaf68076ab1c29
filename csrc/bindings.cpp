// The pybind11 module ultra_kernels._C, and nothing else: addresses and sizes in, one call of the instruction set in use.
// Callers (ultra_kernels/<op>/native.py) own every check; the GIL is released while a kernel runs.
#include "bitlinear/bitlinear.h"
#include "causal_conv1d/causal_conv1d.h"
#include "common/row_blocks.h"
#include "common/simd_test.h"
#include "derf/derf.h"
#include "dyt/dyt.h"
#include "hope_attention/hope_attention.h"
#include "layer_norm/layer_norm.h"
#include "masked_linear_cross_entropy/masked_linear_cross_entropy.h"
#include "moe_ffn/moe_ffn.h"
#include "retention/retention.h"
#include "rotary/rotary.h"
#include "selective_scan/selective_scan.h"
#include "sigmoid_attention/sigmoid_attention.h"
#include "ternary/ternary.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;
using Address = uintptr_t;

constexpr int kAbi = 8;  // raised with every change of a signature below; _native.py refuses another number

namespace {

enum class Isa { baseline, avx2, avx512 };
const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

std::vector<std::string> supported_isas() {
    std::vector<std::string> names = {"baseline"};
#ifdef ULTRA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        names.push_back("avx2");
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
            names.push_back("avx512");
    }
#endif
    return names;
}

Isa g_isa = static_cast<Isa>(supported_isas().size() - 1);

void set_isa(const std::string& name) {
    auto names = supported_isas();
    for (size_t i = 0; i < names.size(); ++i)
        if (names[i] == name) { g_isa = static_cast<Isa>(i); return; }
    std::string known;
    for (auto& n : names) known += (known.empty() ? "" : ", ") + n;
    throw std::invalid_argument("instruction set '" + name + "' is not available here; this CPU has: " + known);
}

#ifdef ULTRA_X86
#define ULTRA_PICK(fn)                                                                                                \
    (g_isa == Isa::avx512 ? ultra::avx512::fn : g_isa == Isa::avx2 ? ultra::avx2::fn : ultra::baseline::fn)
#else
#define ULTRA_PICK(fn) ultra::baseline::fn
#endif

template <typename T> T* ptr(Address address) { return reinterpret_cast<T*>(address); }
const void* in(Address address) { return ptr<const void>(address); }
void* out(Address address) { return ptr<void>(address); }
const float* fin(Address address) { return ptr<const float>(address); }
float* fout(Address address) { return ptr<float>(address); }

using Ints = std::vector<int64_t>;  // (address, strides ..., dtype), as _native.py's view() makes them
ultra::View view(const Ints& v) { return {ptr<char>(v[0]), v[1], v[2], v[3], static_cast<int>(v[4])}; }

// Out-of-range borders would write outside the tensors.
const int32_t* checked_borders(Address address, int64_t sequences, int64_t length) {
    auto* borders = ptr<const int32_t>(address);
    if (!borders) return nullptr;
    bool good = borders[0] == 0 && borders[sequences] == length;
    for (int64_t s = 0; s < sequences; ++s) good = good && borders[s] <= borders[s + 1];
    if (!good) throw std::invalid_argument("cu_seqlens must rise from 0 to the length " + std::to_string(length));
    return borders;
}

struct ScanProblem : ultra::ScanProblem {
    ScanProblem(Ints sizes, Ints u, Ints z, Ints delta, int64_t delta_direction, Address A, Ints B, Ints C, Address D,
                Address delta_bias, Address cu_seqlens, int64_t num_seqs, Address saved, int64_t slots, bool reverse,
                bool softplus, bool shift) {
        directions = sizes[0], batch = sizes[1], channels = sizes[2];
        length = sizes[3], states = sizes[4], groups = sizes[5];
        this->u = view(u), this->z = view(z), this->delta = view(delta), this->delta_direction = delta_direction;
        this->A = fin(A), this->D = fin(D), this->delta_bias = fin(delta_bias);
        this->B = {fin(B[0]), B[1], B[2], B[3], B[4]}, this->C = {fin(C[0]), C[1], C[2], C[3], C[4]};
        borders = checked_borders(cu_seqlens, num_seqs, length), sequences = num_seqs;
        states_saved = fout(saved), this->slots = slots;
        this->reverse = reverse, this->softplus = softplus, this->shift = shift;
    }
};

ultra::ConvProblem conv_problem(const Ints& sizes, const Ints& x, Address weight, Address bias, Address cu_seqlens,
                                int64_t num_seqs, bool silu) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], view(x), fin(weight), fin(bias),
            checked_borders(cu_seqlens, num_seqs, sizes[2]), num_seqs, silu};
}

ultra::HeadRows head_rows(const Ints& v) { return {ptr<char>(v[0]), v[1], v[2], v[3], static_cast<int>(v[4])}; }

ultra::Sequences sequences(int64_t batch, int64_t length, Address cu_seqlens, int64_t num_seqs) {
    auto* borders = checked_borders(cu_seqlens, num_seqs, length);
    return {borders, borders ? num_seqs : batch, length};
}

struct RetentionProblem : ultra::RetentionProblem {
    RetentionProblem(Ints sizes, Ints q, Ints k, Ints v, Address log_decay, Address scale, Address cu_seqlens,
                     int64_t num_seqs, bool left, bool right, Address initial) {
        of = sequences(sizes[0], sizes[1], cu_seqlens, num_seqs);
        heads = sizes[2], K = sizes[3], V = sizes[4];
        chunk = sizes[5] ? std::min(sizes[5], ultra::kRetentionMaxChunk) : ultra::kRetentionChunk;
        this->q = head_rows(q), this->k = head_rows(k), this->v = head_rows(v);
        this->log_decay = fin(log_decay), this->scale = fin(scale);
        this->left = left, this->right = right, this->initial = fin(initial);
    }
};

struct SigmoidProblem : ultra::SigmoidProblem {
    SigmoidProblem(Ints sizes, Ints q, Ints k, Ints v, float scale, float bias, bool bias_of_length, Address head_bias,
                   bool normalize, bool causal, Address sums, Address cu_seqlens, int64_t num_seqs) {
        of = sequences(sizes[0], sizes[1], cu_seqlens, num_seqs);
        heads = sizes[2], K = sizes[3], V = sizes[4];
        this->q = head_rows(q), this->k = head_rows(k), this->v = head_rows(v);
        this->scale = scale, this->bias = bias, this->bias_of_length = bias_of_length;
        this->head_bias = fin(head_bias), this->normalize = normalize, this->causal = causal;
        this->sums = fout(sums);
    }
};

struct HopeProblem : ultra::HopeProblem {
    HopeProblem(Ints sizes, Ints q, Ints k, Ints v, Ints prefix_k, Ints prefix_v, std::vector<Address> tables,
                float scale, bool causal, Address lse, Address cu_seqlens, int64_t num_seqs) {
        of = sequences(sizes[0], sizes[1], cu_seqlens, num_seqs);
        heads = sizes[2], K = sizes[3], V = sizes[4], rotary_heads = sizes[5], prefix = sizes[6];
        this->q = head_rows(q), this->k = head_rows(k), this->v = head_rows(v);
        this->prefix_k = head_rows(prefix_k), this->prefix_v = head_rows(prefix_v);
        this->tables = {fin(tables[0]), fin(tables[1]), fin(tables[2]), fin(tables[3]),
                        fin(tables[4]), fin(tables[5]), fin(tables[6])};
        this->scale = scale, this->causal = causal, this->lse = fout(lse);
    }
};

struct CrossEntropy {
    ultra::CrossEntropyProblem problem;
    ultra::CrossEntropyGradients gradients;

    // Sizes are (T, labelled rows, D, V); matrices (address, step of rows, dtype), gradients that are not wanted null.
    CrossEntropy(std::array<int64_t, 4> sizes, bool pairs, const Ints& hidden, const Ints& weight, Address labels,
                 Address labelled, Address bias, float z_loss, float scale, Address dhidden, int dhidden_dtype,
                 Address dweight, int dweight_dtype, Address dbias)
        : problem{sizes[0], sizes[1], sizes[2], sizes[3], pairs,
                  in(hidden[0]), hidden[1], static_cast<int>(hidden[2]), in(weight[0]), weight[1],
                  static_cast<int>(weight[2]), ptr<int64_t>(labels), ptr<int64_t>(labelled), fin(bias), z_loss, scale},
          gradients{out(dhidden), dhidden_dtype, out(dweight), dweight_dtype, fout(dbias)} {}
};

struct MoEProblem : ultra::MoEProblem {
    // Sizes are (tokens, E, top_k, D, F), routes (gates, order, inverse, ends).
    MoEProblem(std::array<int64_t, 5> sizes, bool gated, int activation, int dtype, Address x, int64_t x_row,
               std::array<Address, 4> routes, Address w_in, Address w_out, Address b_in, Address b_out,
               Address sub_norm, Address hidden) {
        tokens = sizes[0], experts = sizes[1], top_k = sizes[2], D = sizes[3], F = sizes[4];
        this->gated = gated, this->activation = activation, this->dtype = dtype;
        this->x = in(x), this->x_row = x_row, gates = fin(routes[0]), order = ptr<int64_t>(routes[1]);
        inverse = ptr<int64_t>(routes[2]), ends = ptr<int64_t>(routes[3]);
        this->w_in = in(w_in), this->w_out = in(w_out), this->hidden = out(hidden);
        this->b_in = fin(b_in), this->b_out = fin(b_out), this->sub_norm = fin(sub_norm);
    }
};

using Sizes = std::array<int64_t, 3>;
ultra::TernaryMatrix ternary_matrix(Address codes, const Sizes& n) { return {ptr<const uint8_t>(codes), n[1], n[2]}; }
// Without ends all rows are one group.
ultra::TernaryGroups ternary_groups(Address ends, int64_t count, const Sizes& n) {
    return ends ? ultra::TernaryGroups{ptr<const int64_t>(ends), count} : ultra::TernaryGroups{&n[0], 1};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using Nogil = py::call_guard<py::gil_scoped_release>;
    m.attr("abi") = kAbi;
    m.attr("version") = ULTRA_VERSION;
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("isas", &supported_isas, "Instruction sets that this CPU and this build have, slowest first.");
    m.def("isa", [] { return kIsaNames[static_cast<int>(g_isa)]; }, "The instruction set in use.");
    m.def("set_isa", &set_isa, "Uses another instruction set from now on; for tests and measurements.");
    m.def("simd_apply", [](int function, Address x, Address y, int64_t n) {
        ULTRA_PICK(simd_apply)(function, fin(x), fout(y), n);
    }, Nogil());
    m.def("row_blocks", &ultra::row_blocks);

    m.def("derf_forward", [](Address x, Address residual, float alpha, float shift, Address weight, Address bias,
                             Address y, Address s, int64_t rows, int64_t D, int dtype, int threads) {
        ULTRA_PICK(derf_forward)(in(x), in(residual), alpha, shift, fin(weight), fin(bias), out(y), out(s), rows, D,
                                 dtype, threads);
    }, Nogil());
    m.def("derf_backward", [](Address dy, Address ds, Address x, float alpha, float shift, Address weight, Address dx,
                              Address dalpha_dshift, Address dweight, Address dbias, Address scratch, int64_t rows,
                              int64_t D, int dtype, int threads) {
        ULTRA_PICK(derf_backward)(in(dy), in(ds), in(x), alpha, shift, fin(weight), out(dx), fout(dalpha_dshift),
                                  fout(dweight), fout(dbias), fout(scratch), rows, D, dtype, threads);
    }, Nogil());

    m.def("dyt_forward", [](Address x, Address residual, float alpha, Address weight, Address bias, Address y,
                            Address s, int64_t rows, int64_t D, int dtype, int threads) {
        ULTRA_PICK(dyt_forward)(in(x), in(residual), alpha, fin(weight), fin(bias), out(y), out(s), rows, D, dtype,
                                threads);
    }, Nogil());
    m.def("dyt_backward", [](Address dy, Address ds, Address x, float alpha, Address weight, Address dx,
                             Address dalpha, Address dweight, Address dbias, Address scratch, int64_t rows, int64_t D,
                             int dtype, int threads) {
        ULTRA_PICK(dyt_backward)(in(dy), in(ds), in(x), alpha, fin(weight), out(dx), fout(dalpha), fout(dweight),
                                 fout(dbias), fout(scratch), rows, D, dtype, threads);
    }, Nogil());

    m.def("layer_norm_forward", [](Address x, Address residual, Address weight, Address bias, Address y, Address s,
                                   Address stats, int64_t rows, int64_t D, float eps, int dtype, int threads) {
        ULTRA_PICK(layer_norm_forward)(in(x), in(residual), fin(weight), fin(bias), out(y), out(s), fout(stats), rows,
                                       D, eps, dtype, threads);
    }, Nogil());
    m.def("layer_norm_backward", [](Address dy, Address ds, Address x, Address stats, Address weight, Address dx,
                                    Address dweight, Address dbias, Address scratch, int64_t rows, int64_t D,
                                    int dtype, int threads) {
        ULTRA_PICK(layer_norm_backward)(in(dy), in(ds), in(x), fin(stats), fin(weight), out(dx), fout(dweight),
                                        fout(dbias), fout(scratch), rows, D, dtype, threads);
    }, Nogil());

    py::class_<RetentionProblem>(m, "RetentionProblem")
        .def(py::init<Ints, Ints, Ints, Ints, Address, Address, Address, int64_t, bool, bool, Address>());
    m.def("retention_forward_scratch", [](const RetentionProblem& p) {
        return ULTRA_PICK(retention_forward_scratch)(p);
    });
    m.def("retention_backward_scratch", [](const RetentionProblem& p) {
        return ULTRA_PICK(retention_backward_scratch)(p);
    });
    m.def("retention_forward", [](const RetentionProblem& p, const Ints& o, Address last, Address scratch,
                                  int threads) {
        ULTRA_PICK(retention_forward)(p, head_rows(o), fout(last), fout(scratch), threads);
    }, Nogil());
    m.def("retention_backward", [](const RetentionProblem& p, const Ints& dout, const Ints& dq, const Ints& dk,
                                   const Ints& dv, Address dlast, Address dinitial, Address dscale, Address scratch,
                                   int threads) {
        ultra::RetentionGradients g{head_rows(dout), head_rows(dq), head_rows(dk), head_rows(dv), fin(dlast),
                                    fout(dinitial), fout(dscale)};
        ULTRA_PICK(retention_backward)(p, g, fout(scratch), threads);
    }, Nogil());
    m.def("retention_step", [](const RetentionProblem& p, Address state, Address next, const Ints& o, int threads) {
        ULTRA_PICK(retention_step)(p, fin(state), fout(next), head_rows(o), threads);
    }, Nogil());

    m.attr("scan_segment") = ultra::kScanSegment;
    m.def("scan_blocks", &ultra::scan_blocks);
    py::class_<ScanProblem>(m, "ScanProblem")
        .def(py::init<Ints, Ints, Ints, Ints, int64_t, Address, Ints, Ints, Address, Address, Address, int64_t, Address,
                      int64_t, bool, bool, bool>());
    m.def("scan_forward_scratch", [](const ScanProblem& p) { return ULTRA_PICK(scan_forward_scratch)(p); });
    m.def("scan_backward_scratch", [](const ScanProblem& p) { return ULTRA_PICK(scan_backward_scratch)(p); });
    m.def("scan_forward", [](const ScanProblem& p, const Ints& out_view, Address last, Address scratch, int threads) {
        ULTRA_PICK(scan_forward)(p, view(out_view), fout(last), fout(scratch), threads);
    }, Nogil());
    m.def("scan_backward", [](const ScanProblem& p, const Ints& dy, const Ints& du, const Ints& dz, const Ints& ddelta,
                              int64_t ddelta_direction, Address dlast, Address dA, Address dD, Address dbias, Address dB,
                              Address dC, Address dB_parts, Address dC_parts, Address scratch, int threads) {
        ultra::ScanGradients g{view(dy), view(du), view(dz), view(ddelta), ddelta_direction, fin(dlast), fout(dA),
                               fout(dD), fout(dbias), fout(dB), fout(dC), fout(dB_parts), fout(dC_parts)};
        ULTRA_PICK(scan_backward)(p, g, fout(scratch), threads);
    }, Nogil());

    m.attr("hope_tile") = ultra::kHopeTile;
    m.attr("hope_columns") = ultra::kHopeColumns;
    py::class_<HopeProblem>(m, "HopeProblem")
        .def(py::init<Ints, Ints, Ints, Ints, Ints, Ints, std::vector<Address>, float, bool, Address, Address,
                      int64_t>());
    m.def("hope_forward_scratch", [](const HopeProblem& p) { return ULTRA_PICK(hope_forward_scratch)(p); });
    m.def("hope_backward_scratch", [](const HopeProblem& p) { return ULTRA_PICK(hope_backward_scratch)(p); });
    m.def("hope_forward", [](const HopeProblem& p, const Ints& o, Address scratch, int threads) {
        ULTRA_PICK(hope_forward)(p, head_rows(o), fout(scratch), threads);
    }, Nogil());
    m.def("hope_backward", [](const HopeProblem& p, const Ints& o, const Ints& dout, const Ints& dq, const Ints& dk,
                              const Ints& dv, Address ddamping, Address dprefix_k, Address dprefix_v, Address scratch,
                              int threads) {
        ultra::HopeGradients g{head_rows(o), head_rows(dout), head_rows(dq), head_rows(dk), head_rows(dv),
                               fout(ddamping), fout(dprefix_k), fout(dprefix_v)};
        ULTRA_PICK(hope_backward)(p, g, fout(scratch), threads);
    }, Nogil());

    py::class_<SigmoidProblem>(m, "SigmoidProblem")
        .def(py::init<Ints, Ints, Ints, Ints, float, float, bool, Address, bool, bool, Address, Address, int64_t>());
    m.def("sigmoid_forward_scratch", [](const SigmoidProblem& p) { return ULTRA_PICK(sigmoid_forward_scratch)(p); });
    m.def("sigmoid_backward_scratch", [](const SigmoidProblem& p) { return ULTRA_PICK(sigmoid_backward_scratch)(p); });
    m.def("sigmoid_forward", [](const SigmoidProblem& p, const Ints& o, Address scratch, int threads) {
        ULTRA_PICK(sigmoid_forward)(p, head_rows(o), fout(scratch), threads);
    }, Nogil());
    m.def("sigmoid_backward", [](const SigmoidProblem& p, const Ints& o, const Ints& dout, const Ints& dq,
                                 const Ints& dk, const Ints& dv, Address dbias, Address scratch, int threads) {
        ultra::SigmoidGradients g{head_rows(o), head_rows(dout), head_rows(dq), head_rows(dk), head_rows(dv),
                                  fout(dbias)};
        ULTRA_PICK(sigmoid_backward)(p, g, fout(scratch), threads);
    }, Nogil());

    m.def("rotary", [](const Ints& n, const Ints& x, const Ints& y, const Ints& positions, const Ints& rotations,
                       bool back, int threads) {
        ultra::Positions places{ptr<const char>(positions[0]), positions[1], positions[2], positions[3] != 0};
        ultra::Rotations tables{fin(rotations[0]), fin(rotations[1]), rotations[2], rotations[3]};
        ULTRA_PICK(rotary)({n[0], n[1], n[2], n[3], head_rows(x), head_rows(y), places, tables, back}, threads);
    }, Nogil());

    m.def("conv_forward", [](const Ints& sizes, const Ints& x, Address weight, Address bias, Address cu_seqlens,
                             int64_t num_seqs, bool silu, const Ints& y, int threads) {
        ULTRA_PICK(conv_forward)(conv_problem(sizes, x, weight, bias, cu_seqlens, num_seqs, silu), view(y), threads);
    }, Nogil());
    m.def("conv_backward", [](const Ints& sizes, const Ints& x, Address weight, Address bias, Address cu_seqlens,
                              int64_t num_seqs, bool silu, const Ints& dy, const Ints& dx, Address dweight,
                              Address dbias, int threads) {
        ULTRA_PICK(conv_backward)(conv_problem(sizes, x, weight, bias, cu_seqlens, num_seqs, silu), view(dy), view(dx),
                                  fout(dweight), fout(dbias), threads);
    }, Nogil());

    // Sizes are (M, N, K).
    m.def("ternary_scratch", [](int64_t M, int64_t K) { return ULTRA_PICK(ternary_scratch)(M, K); });
    m.def("ternary_matmul", [](Address x, int64_t x_row, Sizes n, Address codes, Address y, Address scratch,
                               int threads) {
        ULTRA_PICK(ternary_matmul)(ptr<const int8_t>(x), x_row, n[0], ternary_matrix(codes, n), ptr<int32_t>(y),
                                   ptr<char>(scratch), threads);
    }, Nogil());
    m.def("ternary_quantize_rows", [](Address x, int64_t x_row, int dtype, int64_t M, int64_t K, Address norm_weight,
                                      Address codes, Address step, Address rstd, int threads) {
        ULTRA_PICK(ternary_quantize_rows)(in(x), x_row, dtype, K, fin(norm_weight),
                                          {ptr<int8_t>(codes), fout(step), M}, fout(rstd), threads);
    }, Nogil());
    m.def("ternary_product", [](Address codes, Address step, Sizes n, Address ends, int64_t groups, Address weight,
                                Address scale, Address bias, Address y, int dtype, Address scratch, int threads) {
        ULTRA_PICK(ternary_product)({ptr<int8_t>(codes), fout(step), n[0]}, ternary_groups(ends, groups, n),
                                    ternary_matrix(weight, n), fin(scale), fin(bias), out(y), dtype,
                                    ptr<char>(scratch), threads);
    }, Nogil());
    m.def("ternary_linear", [](Address x, int64_t x_row, int dtype, Sizes n, Address ends, int64_t groups,
                               Address weight, Address scale, Address bias, Address y, Address scratch, int threads) {
        ULTRA_PICK(ternary_linear)(in(x), x_row, n[0], ternary_groups(ends, groups, n), ternary_matrix(weight, n),
                                   fin(scale), fin(bias), out(y), dtype, ptr<char>(scratch), threads);
    }, Nogil());
    m.def("ternary_linear_scratch", [](int64_t M, int64_t K) { return ULTRA_PICK(ternary_linear_scratch)(M, K); });
    m.def("ternary_quantize_weight", [](Address weight, int dtype, int64_t count, int64_t N, int64_t K, bool median,
                                        Address gamma, Address packed, int threads) {
        ULTRA_PICK(ternary_quantize_weight)(in(weight), dtype, count, N, K, median, fout(gamma), ptr<uint8_t>(packed),
                                            threads);
    }, Nogil());

    m.def("pairs", [] { return ULTRA_PICK(bitlinear_pairs)(); }, "Whether products of bfloat16 pairs are in hardware.");
    m.def("bitlinear_scratch", [](int threads) { return ULTRA_PICK(bitlinear_scratch)(threads); });
    m.def("bitlinear_dx", [](Address dy, int64_t dy_row, bool pairs, Sizes n, Address weight, Address gamma, Address dx,
                             Address scratch, int threads) {
        ULTRA_PICK(bitlinear_dx)({in(dy), dy_row, pairs}, n[0], ternary_matrix(weight, n), fin(gamma), fout(dx),
                                 fout(scratch), threads);
    }, Nogil());
    m.def("bitlinear_dweight", [](Address dy, int64_t dy_row, bool pairs, Sizes n, Address codes, Address step,
                                  Address dweight, Address scratch, int threads) {
        ULTRA_PICK(bitlinear_dweight)({in(dy), dy_row, pairs}, n[1], n[2], {ptr<int8_t>(codes), fout(step), n[0]},
                                      fout(dweight), fout(scratch), threads);
    }, Nogil());
    m.def("bitlinear_fingerprint", [](Address data, int64_t n, int64_t size) {
        return ULTRA_PICK(bitlinear_fingerprint)(in(data), n, size);
    });
    m.def("bitlinear_norm_backward", [](Address grad, Address x, int64_t x_row, int dtype, Address rstd, Address weight,
                                        int64_t M, int64_t K, Address dx, Address dweight, Address parts, int threads) {
        ULTRA_PICK(bitlinear_norm_backward)(fin(grad), in(x), x_row, dtype, fin(rstd), fin(weight), M, K, out(dx),
                                            fout(dweight), fout(parts), threads);
    }, Nogil());

    py::class_<MoEProblem>(m, "MoEProblem")
        .def(py::init<std::array<int64_t, 5>, bool, int, int, Address, int64_t, std::array<Address, 4>, Address,
                      Address, Address, Address, Address, Address>());
    m.def("moe_forward_scratch", [](const MoEProblem& p, int threads) {
        return ULTRA_PICK(moe_forward_scratch)(p, threads);
    });
    m.def("moe_backward_scratch", [](const MoEProblem& p, int threads) {
        return ULTRA_PICK(moe_backward_scratch)(p, threads);
    });
    m.def("moe_forward", [](const MoEProblem& p, Address y, Address scratch, int threads) {
        ULTRA_PICK(moe_forward)(p, out(y), fout(scratch), threads);
    }, Nogil());
    m.def("moe_backward", [](const MoEProblem& p, Address dy, int64_t dy_row, Address dx, Address dgates, Address dw_in,
                             Address dw_out, Address db_in, Address db_out, Address dsub_norm, Address scratch,
                             int threads) {
        ultra::MoEGradients g{in(dy), dy_row, out(dx), fout(dgates), out(dw_in), out(dw_out), fout(db_in),
                              fout(db_out), fout(dsub_norm)};
        ULTRA_PICK(moe_backward)(p, g, fout(scratch), threads);
    }, Nogil());

    m.def("moe_route_scratch", [](int64_t tokens, int64_t experts) {
        return ULTRA_PICK(moe_route_scratch)(tokens, experts);
    });
    py::class_<ultra::MoERouting>(m, "MoERouting")
        .def(py::init([](std::array<int64_t, 3> n, bool normalize, Address logits, Address select_bias, Address gates,
                         Address chosen) {
            return ultra::MoERouting{n[0], n[1], n[2], normalize, fin(logits), fin(select_bias), fout(gates),
                                     ptr<int32_t>(chosen)};
        }));
    m.def("moe_route", [](const ultra::MoERouting& r, Address order, Address inverse, Address ends, Address counts,
                          Address mean_prob, Address z, Address scratch, int threads) {
        ULTRA_PICK(moe_route)(r, ptr<int64_t>(order), ptr<int64_t>(inverse), ptr<int64_t>(ends), ptr<int64_t>(counts),
                              fout(mean_prob), fout(z), fout(scratch), threads);
    }, Nogil());
    m.def("moe_route_backward", [](const ultra::MoERouting& r, Address dgates, Address dmean_prob, float dz,
                                   Address dlogits, Address scratch, int threads) {
        ULTRA_PICK(moe_route_backward)(r, fin(dgates), fin(dmean_prob), dz, fout(dlogits), fout(scratch), threads);
    }, Nogil());

    py::class_<CrossEntropy>(m, "CrossEntropy")
        .def(py::init<std::array<int64_t, 4>, bool, const Ints&, const Ints&, Address, Address, Address, float, float,
                      Address, int, Address, int, Address>());
    m.def("cross_entropy_has_pairs", [] { return ULTRA_PICK(cross_entropy_has_pairs)(); });
    m.def("cross_entropy_scratch", [](const CrossEntropy& c, int threads) {
        return ULTRA_PICK(cross_entropy_scratch)(c.problem, c.gradients, threads);
    });
    m.def("cross_entropy", [](const CrossEntropy& c, Address loss, Address scratch, int threads) {
        ULTRA_PICK(cross_entropy)(c.problem, c.gradients, fout(loss), fout(scratch), threads);
    }, Nogil());
}
