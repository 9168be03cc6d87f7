// Prefix tokens and position embedding: the first n_prefix tokens are constant, the others are data + table.
// Cycles: n_tok (n_dim adders).
#ifndef M3VIT_POSITION_H_
#define M3VIT_POSITION_H_

#include "m3vit_math.h"

namespace nnet {
namespace vit {

// CONFIG_T: n_tok (tokens out), n_prefix (of them constant, not in `data`), n_dim; table_t.
template <class data_T, class res_T, typename CONFIG_T>
void position(hls::stream<data_T> &data, hls::stream<res_T> &res,
              typename CONFIG_T::table_t table[CONFIG_T::n_tok * CONFIG_T::n_dim]) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    typedef typename CONFIG_T::table_t table_T;
    static_assert(data_T::size == CONFIG_T::n_dim && res_T::size == CONFIG_T::n_dim, "one token a stream word");
    const int frac = format<in_T>::frac > format<table_T>::frac ? format<in_T>::frac : format<table_T>::frac;
Token:
    for (unsigned t = 0; t < CONFIG_T::n_tok; t++) {
        #pragma HLS PIPELINE II=1
        data_T x;
        if (t >= CONFIG_T::n_prefix)
            x = data.read();
        res_T y;
    Channel:
        for (unsigned d = 0; d < CONFIG_T::n_dim; d++) {
            #pragma HLS UNROLL
            long long sum = to_raw(table[t * CONFIG_T::n_dim + d]) * (1LL << (frac - format<table_T>::frac));
            if (t >= CONFIG_T::n_prefix)
                sum += to_raw(x[d]) * (1LL << (frac - format<in_T>::frac));
            y[d] = from_raw<out_T>(sum, frac);
        }
        res.write(y);
    }
}

} // namespace vit
} // namespace nnet
#endif
