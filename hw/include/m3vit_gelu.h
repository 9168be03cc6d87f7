// GELU (exact, erf) on a stream of tokens: relu(x) - gap(|x|) with an interpolated table (Edge-MoE, arXiv 2305.18691).
// Cycles: about n_tok * n_dim, one table look-up pair a cycle.
#ifndef M3VIT_GELU_H_
#define M3VIT_GELU_H_

#include "m3vit_math.h"

namespace nnet {
namespace vit {

// CONFIG_T: n_tok, n_dim.
template <class data_T, class res_T, typename CONFIG_T> void gelu(hls::stream<data_T> &data, hls::stream<res_T> &res) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    static_assert(data_T::size == CONFIG_T::n_dim && res_T::size == CONFIG_T::n_dim, "one token a stream word");
Token:
    for (unsigned t = 0; t < CONFIG_T::n_tok; t++) {
        const data_T x = data.read();
        res_T y;
    Channel:
        for (unsigned d = 0; d < CONFIG_T::n_dim; d++) {
            #pragma HLS PIPELINE II=1
            y[d] = from_raw<out_T>(gelu_raw(to_raw(x[d]), format<in_T>::frac), gelu_frac(format<in_T>::frac));
        }
        res.write(y);
    }
}

} // namespace vit
} // namespace nnet
#endif
