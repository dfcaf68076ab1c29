// The pybind11 module ultra_kernels._C, and nothing else: addresses and sizes in, one call of the instruction set in use.
// Callers (ultra_kernels/<op>/native.py) own every check; the GIL is released while a kernel runs.
#include "common/row_blocks.h"
#include "common/simd_test.h"
#include "derf/derf.h"
#include "dyt/dyt.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;
using Address = uintptr_t;

constexpr int kAbi = 1;  // raised with every change of a signature below; _native.py refuses another number

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

    m.def("derf_forward", [](Address x, float alpha, float shift, Address weight, Address bias, Address y,
                             int64_t rows, int64_t D, int dtype, int threads) {
        ULTRA_PICK(derf_forward)(in(x), alpha, shift, fin(weight), fin(bias), out(y), rows, D, dtype, threads);
    }, Nogil());
    m.def("derf_backward", [](Address dy, Address x, float alpha, float shift, Address weight, Address dx,
                              Address dalpha_dshift, Address dweight, Address dbias, Address scratch, int64_t rows,
                              int64_t D, int dtype, int threads) {
        ULTRA_PICK(derf_backward)(in(dy), in(x), alpha, shift, fin(weight), out(dx), fout(dalpha_dshift),
                                  fout(dweight), fout(dbias), fout(scratch), rows, D, dtype, threads);
    }, Nogil());

    m.def("dyt_forward", [](Address x, float alpha, Address weight, Address bias, Address y, int64_t rows, int64_t D,
                            int dtype, int threads) {
        ULTRA_PICK(dyt_forward)(in(x), alpha, fin(weight), fin(bias), out(y), rows, D, dtype, threads);
    }, Nogil());
    m.def("dyt_backward", [](Address dy, Address x, float alpha, Address weight, Address dx, Address dalpha,
                             Address dweight, Address dbias, Address scratch, int64_t rows, int64_t D, int dtype,
                             int threads) {
        ULTRA_PICK(dyt_backward)(in(dy), in(x), alpha, fin(weight), out(dx), fout(dalpha), fout(dweight), fout(dbias),
                                 fout(scratch), rows, D, dtype, threads);
    }, Nogil());
}
