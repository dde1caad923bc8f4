// sim_math.cuh: the mathematical functions of sim.cu, behind names that a CPU test build (KVC_SIMT) can answer too.
//
// The CPU build includes this text inside a namespace, where <cmath> must not be: it asks the compiler itself.
#pragma once

#include "device.cuh"

#if defined(KVC_SIMT)
KVC_DEVICE float kvc_exp(float x) { return __builtin_expf(x); }
KVC_DEVICE float kvc_sqrt(float x) { return __builtin_sqrtf(x); }
KVC_DEVICE double kvc_cos(double x) { return __builtin_cos(x); }
KVC_DEVICE double kvc_sin(double x) { return __builtin_sin(x); }
KVC_DEVICE uint32_t kvc_float_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}
#else
KVC_DEVICE float kvc_exp(float x) { return expf(x); }
KVC_DEVICE float kvc_sqrt(float x) { return sqrtf(x); }
KVC_DEVICE double kvc_cos(double x) { return cos(x); }
KVC_DEVICE double kvc_sin(double x) { return sin(x); }
KVC_DEVICE uint32_t kvc_float_bits(float x) { return __float_as_uint(x); }
#endif
