// Every kernel source is compiled once per instruction set, each time into its own namespace; bindings.cpp picks one
// at run time. A header declares its functions for all of them at once with ULTRA_FOR_EACH_ISA.
//
// Kernel sources use no templates or inline functions of the standard library: the linker would keep a single copy of
// such a function, perhaps the AVX-512 one, and an older CPU would stop on it.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define ULTRA_X86 1
#define ULTRA_FOR_EACH_ISA(...)                                                                                       \
    namespace ultra {                                                                                                 \
    namespace baseline { __VA_ARGS__ }                                                                                \
    namespace avx2 { __VA_ARGS__ }                                                                                    \
    namespace avx512 { __VA_ARGS__ }                                                                                  \
    }
#else
#define ULTRA_FOR_EACH_ISA(...)                                                                                       \
    namespace ultra {                                                                                                 \
    namespace baseline { __VA_ARGS__ }                                                                                \
    }
#endif
