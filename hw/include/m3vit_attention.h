// Multi-head self-attention over a stream of [q | k | v] tokens, one query row and head at a time.
//
// q arrives scaled by log2(e) / sqrt(head width) (folded into its projection), so that softmax is a base-2 one:
// weights 2^(score - max), context summed with them as they are, and one multiplication by 1 / (sum of weights).
// Cycles: about n_tok * n_head * 3 * n_tok (score, weight and context loop, one key a cycle each).
#ifndef M3VIT_ATTENTION_H_
#define M3VIT_ATTENTION_H_

#include "m3vit_math.h"

namespace nnet {
namespace vit {

// CONFIG_T: n_tok, n_dim, n_head.
template <class data_T, class res_T, typename CONFIG_T>
void attention(hls::stream<data_T> &data, hls::stream<res_T> &res) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    typedef typename format<in_T>::raw in_raw;
    const unsigned T = CONFIG_T::n_tok, D = CONFIG_T::n_dim, H = CONFIG_T::n_head, W = D / H;
    static_assert(D % H == 0, "n_dim is a multiple of n_head");
    static_assert(data_T::size == 3 * D && res_T::size == D, "one token a stream word");
    static in_raw q[T * D], k[T * D], v[T * D];
    #pragma HLS ARRAY_PARTITION variable=q cyclic factor=W
    #pragma HLS ARRAY_PARTITION variable=k cyclic factor=W
    #pragma HLS ARRAY_PARTITION variable=v cyclic factor=W
    long long score[T];
    typename raw_int<prob_frac + 1>::type weight[T];

Load:
    for (unsigned t = 0; t < T; t++) {
        #pragma HLS PIPELINE
        const data_T x = data.read();
        for (unsigned d = 0; d < D; d++) {
            #pragma HLS UNROLL
            q[t * D + d] = to_raw(x[d]);
            k[t * D + d] = to_raw(x[D + d]);
            v[t * D + d] = to_raw(x[2 * D + d]);
        }
    }
Query:
    for (unsigned t = 0; t < T; t++) {
        res_T y;
    Head:
        for (unsigned h = 0; h < H; h++) {
            long long highest = 0;
        Score:
            for (unsigned j = 0; j < T; j++) {
                #pragma HLS PIPELINE II=1
                score[j] = dot<W>(&q[t * D + h * W], &k[j * D + h * W]);
                if (j == 0 || score[j] > highest)
                    highest = score[j];
            }
            long long total = 0;
        Weight:
            for (unsigned j = 0; j < T; j++) {
                #pragma HLS PIPELINE II=1
                weight[j] = exp2_neg(highest - score[j], 2 * format<in_T>::frac, prob_frac);
                total += weight[j];
            }
            long long context[W];
            #pragma HLS ARRAY_PARTITION variable=context complete
            for (unsigned c = 0; c < W; c++) {
                #pragma HLS UNROLL
                context[c] = 0;
            }
        Context:
            for (unsigned j = 0; j < T; j++) {
                #pragma HLS PIPELINE II=1
                for (unsigned c = 0; c < W; c++) {
                    #pragma HLS UNROLL
                    context[c] += weight[j] * (long long)v[j * D + h * W + c];
                }
            }
            const scaled inverse = reciprocal(total); // total >= 2^prob_frac: the largest score has weight 1
        Divide:
            for (unsigned c = 0; c < W; c++) {
                #pragma HLS PIPELINE II=1
                // context < 2^prob_frac * T * |v|; 8 bits of it are dropped to keep the product within 64.
                const long long product = shift_round(context[c], 8) * inverse.mantissa;
                y[h * W + c] = from_raw<out_T>(product, format<in_T>::frac + 20 + inverse.shift - 8);
            }
        }
        res.write(y);
    }
}

} // namespace vit
} // namespace nnet
#endif
