// LayerNorm over the channels of each token, for any variance, without a division.
//
// With S = sum x and d_i = D x_i - S (all exact integers), (x_i - mean) / sqrt(var + eps) is
// d_i * sqrt(D) / sqrt(sum d^2 + D^3 eps): one 1/sqrt by leading-one normalisation and a table.
// Cycles: about n_tok * (3 * n_dim + 20); n_tok * n_dim if the three loops overlap between tokens.
#ifndef M3VIT_LAYERNORM_H_
#define M3VIT_LAYERNORM_H_

#include "m3vit_math.h"

namespace nnet {
namespace vit {

// CONFIG_T: n_dim; sqrt_dim = sqrt(n_dim) * 2^16; eps_raw = n_dim^3 * eps * 2^(2 * fractional bits of in_T), >= 1.
template <class in_T, typename CONFIG_T>
void normalise_token(const in_T x[CONFIG_T::n_dim], typename raw_int<28>::type y[CONFIG_T::n_dim]) {
    const unsigned D = CONFIG_T::n_dim;
    static_assert(D * 1ull * D * D < (1ull << (63 - 2 * (in_T::width - 1))), "the sum of squares needs over 63 bits");
    typename raw_int<40>::type d[D];
    long long sum = 0;
Sum:
    for (unsigned i = 0; i < D; i++) {
        #pragma HLS PIPELINE II=1
        sum += to_raw(x[i]);
    }
    unsigned long long squares = CONFIG_T::eps_raw;
Square:
    for (unsigned i = 0; i < D; i++) {
        #pragma HLS PIPELINE II=1
        d[i] = (long long)to_raw(x[i]) * (long long)D - sum;
        squares += (unsigned long long)(d[i] * (long long)d[i]);
    }
    const scaled inverse = rsqrt(squares);
    const long long factor = shift_round(inverse.mantissa * (long long)CONFIG_T::sqrt_dim, 16);
Scale:
    for (unsigned i = 0; i < D; i++) {
        #pragma HLS PIPELINE II=1
        y[i] = (typename raw_int<28>::type)shift_round(d[i] * factor, 20 + inverse.shift - norm_frac);
    }
}

// CONFIG_T as above, and n_tok; scale_t, bias_t.
template <class data_T, class res_T, typename CONFIG_T>
void layernorm(hls::stream<data_T> &data, hls::stream<res_T> &res, typename CONFIG_T::scale_t scale[CONFIG_T::n_dim],
               typename CONFIG_T::bias_t bias[CONFIG_T::n_dim]) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    static_assert(data_T::size == CONFIG_T::n_dim && res_T::size == CONFIG_T::n_dim, "one token a stream word");
    const int frac = norm_frac + format<typename CONFIG_T::scale_t>::frac;
    const int bias_shift = format<typename CONFIG_T::bias_t>::frac - frac;
Token:
    for (unsigned t = 0; t < CONFIG_T::n_tok; t++) {
        const data_T x = data.read();
        typename raw_int<28>::type n[CONFIG_T::n_dim];
        normalise_token<in_T, CONFIG_T>(x.data, n);
        res_T y;
    Affine:
        for (unsigned d = 0; d < CONFIG_T::n_dim; d++) {
            #pragma HLS PIPELINE II=1
            const long long product = n[d] * (long long)to_raw(scale[d]);
            y[d] = from_raw<out_T>(product + shift_round(to_raw(bias[d]), bias_shift), frac);
        }
        res.write(y);
    }
}

} // namespace vit
} // namespace nnet
#endif
