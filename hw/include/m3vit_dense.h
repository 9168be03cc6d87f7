// The product inside hls4ml's pointwise_conv_1d_cl, C-simulated on raw integers.
//
// Synthesis gets hls4ml's own kernel. C-simulation gets the same sums on machine integers: bit-identical, since the
// accumulator holds every partial sum exactly, and 5 times faster for a whole model. -DM3VIT_HLS4ML_DENSE simulates
// hls4ml's own kernel instead; a test compares the two.
// Cycles: reuse_factor a token.
#ifndef M3VIT_DENSE_H_
#define M3VIT_DENSE_H_

#include "m3vit_math.h"

#if defined(__SYNTHESIS__) || defined(M3VIT_HLS4ML_DENSE)
#include "nnet_dense.h"
#endif

namespace nnet {
namespace vit {

#if defined(__SYNTHESIS__) || defined(M3VIT_HLS4ML_DENSE)
template <class data_T, class res_T, typename CONFIG_T>
using dense_kernel = nnet::DenseResource_rf_leq_nin<data_T, res_T, CONFIG_T>;
#else
// CONFIG_T: hls4ml's dense_config. Weights [n_out, n_in], as its Resource strategy stores them.
template <class data_T, class res_T, typename CONFIG_T> struct dense_kernel {
    static void dense(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_out],
                      typename CONFIG_T::weight_t weights[CONFIG_T::n_in * CONFIG_T::n_out],
                      typename CONFIG_T::bias_t biases[CONFIG_T::n_out]) {
        typedef typename CONFIG_T::weight_t weight_T;
        const unsigned I = CONFIG_T::n_in, O = CONFIG_T::n_out;
        const int frac = format<data_T>::frac + format<weight_T>::frac;
        static_assert(format<typename CONFIG_T::accum_t>::frac == frac, "the accumulator is exact");
        static typename format<weight_T>::raw w[O * I]; // one configuration has one set of weights
        static bool loaded = false;
        for (unsigned i = 0; !loaded && i < O * I; i++)
            w[i] = to_raw(weights[i]);
        loaded = true;
        typename format<data_T>::raw x[I];
        for (unsigned i = 0; i < I; i++)
            x[i] = to_raw(data[i]);
        for (unsigned o = 0; o < O; o++) {
            // hls4ml's assignment of a bias to the accumulator truncates.
            const int shift = format<typename CONFIG_T::bias_t>::frac - frac;
            const long long bias = to_raw(biases[o]);
            const long long start = shift > 0 ? bias >> shift : bias * (1LL << (shift > 0 ? 0 : -shift));
            res[o] = from_raw<res_T>(dot<CONFIG_T::n_in>(x, &w[o * I]) + start, frac);
        }
    }
};
#endif

} // namespace vit
} // namespace nnet
#endif
