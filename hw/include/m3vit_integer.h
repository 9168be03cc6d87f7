// Integer arithmetic of the kernels: rounding shifts, and exp2, reciprocal, 1/sqrt and GELU by interpolated tables.
//
// Machine integers only, so it also compiles without the ap_types. A fixed-point value is raw * 2^-frac.
#ifndef M3VIT_INTEGER_H_
#define M3VIT_INTEGER_H_

#include "m3vit_tables.h"

namespace nnet {
namespace vit {

// x * 2^-shift, rounded half up as AP_RND does (shift may be negative).
inline long long shift_round(long long x, int shift) {
    #pragma HLS INLINE
    if (shift > 0)
        return (x + (1LL << (shift - 1))) >> shift;
    return x * (1LL << -shift);
}

// Between two table entries, `weight` of 65536 on the way from the first to the second.
inline int interpolate(int first, int second, int weight) {
    #pragma HLS INLINE
    return first + (int)(((long long)(second - first) * weight + 32768) >> 16);
}

// A positive integer as mantissa * 2^(exponent - 24), mantissa in [2^24, 2^25).
struct normalised {
    int exponent;
    int mantissa;
};
inline normalised normalise(unsigned long long x) {
    #pragma HLS INLINE
    normalised n;
    n.exponent = 63 - __builtin_clzll(x);
    n.mantissa = n.exponent >= 24 ? (int)(x >> (n.exponent - 24)) : (int)(x << (24 - n.exponent));
    return n;
}

// 2^-(x * 2^-frac) for x >= 0, with `out_frac` <= 22 fractional bits; relative error 1e-6 before that rounding.
inline int exp2_neg(long long x, int frac, int out_frac) {
    #pragma HLS INLINE
    const long long whole = x >> frac;
    if (whole > out_frac)
        return 0;
    const long long part = x - (whole << frac);
    const int bits = frac >= 24 ? (int)(part >> (frac - 24)) : (int)(part << (24 - frac));
    const unsigned i = bits >> 16;
    const int y = interpolate(exp2_neg_entry(i), exp2_neg_entry(i + 1), bits & 0xffff);
    return (int)shift_round(y, 22 - out_frac + (int)whole);
}

// 1 / x = mantissa * 2^-(20 + shift) for an integer x > 0; relative error 4e-6.
struct scaled {
    int mantissa; // in [2^19, 2^20]
    int shift;
};
inline scaled reciprocal(unsigned long long x) {
    #pragma HLS INLINE
    const normalised n = normalise(x);
    const unsigned i = (n.mantissa >> 16) & 0xff;
    scaled r;
    r.mantissa = interpolate(reciprocal_entry(i), reciprocal_entry(i + 1), n.mantissa & 0xffff);
    r.shift = n.exponent;
    return r;
}

// 1 / sqrt(x) = mantissa * 2^-(20 + shift) for an integer x > 0; relative error 4e-6.
inline scaled rsqrt(unsigned long long x) {
    #pragma HLS INLINE
    const normalised n = normalise(x);
    const unsigned i = (n.mantissa >> 16) & 0xff;
    const bool odd = n.exponent & 1; // x = m * 4^shift with m in [1, 2) or, if odd, [2, 4)
    const int first = odd ? rsqrt_odd_entry(i) : rsqrt_even_entry(i);
    const int second = odd ? rsqrt_odd_entry(i + 1) : rsqrt_even_entry(i + 1);
    scaled r;
    r.mantissa = interpolate(first, second, n.mantissa & 0xffff);
    r.shift = n.exponent >> 1;
    return r;
}

// GELU(x) = relu(x) - gap(|x|) for a raw x with `frac` fractional bits; the result has max(frac, 20) of them.
inline long long gelu_raw(long long x, int frac) {
    #pragma HLS INLINE
    const long long size = x < 0 ? -x : x;
    const long long position = frac >= 23 ? size >> (frac - 23) : size << (23 - frac); // 128 intervals a unit, 16 bits
    const unsigned i = position >= (1024LL << 16) ? 1024 : (unsigned)(position >> 16);
    const int gap = i == 1024 ? 0 : interpolate(gelu_gap_entry(i), gelu_gap_entry(i + 1), (int)(position & 0xffff));
    const long long relu = x > 0 ? x : 0;
    return frac >= 20 ? relu - ((long long)gap << (frac - 20)) : (relu << (20 - frac)) - gap;
}
inline int gelu_frac(int frac) { return frac >= 20 ? frac : 20; }

} // namespace vit
} // namespace nnet
#endif
