// Task heads: LayerNorm, then the Linear of the task, selected at run time; narrower tasks are padded with zeros.
//
// The scale and bias of each head's LayerNorm are folded into its Linear, so one normalisation serves all tasks.
// Cycles: about (n_tok - n_prefix) * (3 * n_dim + rows of the task), one output a cycle.
#ifndef M3VIT_HEAD_H_
#define M3VIT_HEAD_H_

#include "m3vit_layernorm.h"

namespace nnet {
namespace vit {

// CONFIG_T: as normalise_token's; n_tok (tokens in), n_prefix (of them dropped), n_out (widest task), n_task,
// n_rows (sum of the tasks' widths), first_row(task) for task in [0, n_task]; weight_t, bias_t.
// Weights: weight [n_rows, n_dim], bias [n_rows], task after task. An unknown task id is 0.
template <class data_T, class task_T, class res_T, typename CONFIG_T>
void task_head(hls::stream<data_T> &data, hls::stream<task_T> &task, hls::stream<res_T> &res,
               typename CONFIG_T::weight_t weight[CONFIG_T::n_rows * CONFIG_T::n_dim],
               typename CONFIG_T::bias_t bias[CONFIG_T::n_rows]) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    typedef typename format<typename CONFIG_T::weight_t>::raw weight_raw;
    const unsigned D = CONFIG_T::n_dim, N = CONFIG_T::n_out;
    static_assert(data_T::size == D && res_T::size == N, "one token a stream word");
    const int frac = norm_frac + format<typename CONFIG_T::weight_t>::frac;
    const int bias_shift = format<typename CONFIG_T::bias_t>::frac - frac;
    static weight_raw w[N * D];
    #pragma HLS ARRAY_PARTITION variable=w cyclic factor=D

    const task_T task_word = task.read();
    const unsigned task_read = (unsigned)task_word[0];
    const unsigned r = task_read < CONFIG_T::n_task ? task_read : 0;
    const unsigned first = CONFIG_T::first_row(r), rows = CONFIG_T::first_row(r + 1) - first;
LoadWeights:
    for (unsigned i = 0; i < rows * D; i++) {
        #pragma HLS PIPELINE II=1
        #pragma HLS LOOP_TRIPCOUNT max=N*D
        w[i] = to_raw(weight[first * D + i]);
    }
Token:
    for (unsigned t = 0; t < CONFIG_T::n_tok; t++) {
        const data_T x = data.read();
        if (t < CONFIG_T::n_prefix)
            continue;
        typename raw_int<28>::type n[D];
        #pragma HLS ARRAY_PARTITION variable=n complete
        normalise_token<in_T, CONFIG_T>(x.data, n);
        res_T y;
    Output:
        for (unsigned j = 0; j < N; j++) {
            #pragma HLS PIPELINE II=1
            long long sum = 0;
            if (j < rows)
                sum = dot<D>(n, &w[j * D]) + shift_round(to_raw(bias[first + j]), bias_shift);
            y[j] = from_raw<out_T>(sum, frac);
        }
        res.write(y);
    }
}

} // namespace vit
} // namespace nnet
#endif
