// Fixed-point arithmetic on the raw bits of ap_fixed; the integer functions are in m3vit_integer.h.
//
// An ap_fixed<W, I> value is raw * 2^-(W - I). Products and sums of raw integers are exact, so kernels written on them
// give the same bits as ap_fixed arithmetic with accumulators wide enough, and simulate about 65 times faster.
// m3vit/export/hls/spatial/fixed_point.py checks that no accumulator of an emitted project can exceed 62 bits.
#ifndef M3VIT_MATH_H_
#define M3VIT_MATH_H_

#include "ap_fixed.h"
#include "ap_int.h"
#include "hls_stream.h"
#include "m3vit_integer.h"

namespace nnet {
namespace vit {

// A signed integer of W bits. C-simulation uses machine integers: the same values, since those stored fit W bits.
#ifdef __SYNTHESIS__
template <int W> struct raw_int { typedef ap_int<W> type; };
#else
template <bool FITS_32> struct machine_int { typedef long long type; };
template <> struct machine_int<true> { typedef int type; };
template <int W> struct raw_int { typedef typename machine_int<(W <= 32)>::type type; };
#endif
typedef raw_int<64>::type wide_int; // exact sums and products

template <bool S> struct sign_flag { static const bool value = S; };
template <int W, int I, bool S, ap_q_mode Q, ap_o_mode O, int N>
sign_flag<S> sign_of(const ap_fixed_base<W, I, S, Q, O, N> &);
template <class T> const T &a_value();

// Fractional bits of an ap_fixed or ap_ufixed type, and its raw integer type (one bit more if unsigned).
template <class T> struct format {
    static const int width = T::width;
    static const int frac = T::width - T::iwidth;
    static const bool is_signed = decltype(sign_of(a_value<T>()))::value;
    typedef typename raw_int<width + (is_signed ? 0 : 1)>::type raw;
};

template <class T> inline typename format<T>::raw to_raw(const T &x) {
    #pragma HLS INLINE
    return (typename format<T>::raw)x.V; // V: the bits, in Vitis' own headers and in the open ap_types
}

// The value x * 2^-frac as a T: rounded half up and saturated, i.e. AP_RND, AP_SAT.
template <class T> inline T from_raw(long long x, int frac) {
    #pragma HLS INLINE
    const long long high = (1LL << (format<T>::width - (format<T>::is_signed ? 1 : 0))) - 1;
    const long long low = format<T>::is_signed ? -high - 1 : 0;
    long long y = shift_round(x, frac - format<T>::frac);
    y = y > high ? high : (y < low ? low : y);
    T out;
    out.V = y;
    return out;
}

// sum_i x[i] * w[i], exact.
template <unsigned N, class x_T, class w_T> inline long long dot(const x_T x[N], const w_T w[N]) {
    #pragma HLS INLINE
    long long sum = 0;
    for (unsigned i = 0; i < N; i++) {
        #pragma HLS UNROLL
        sum += (long long)x[i] * w[i];
    }
    return sum;
}

} // namespace vit
} // namespace nnet
#endif
