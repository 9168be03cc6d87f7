// Task heads with a convolution: ReLU (but for the first features of a pixel), then the 3x3 convolution of the task,
// selected at run time, on the pixels of all tokens; zeros outside the image. Narrower tasks are padded with zeros.
//
// A token holds n_scale^2 pixels, line by line, and comes and goes as one stream word. A row of tokens is computed when
// the next has been read: three rows are kept.
// Cycles: about n_tok * (1 + 9 * n_scale^2 * channels of the task), one pixel of the nine around it a cycle.
#ifndef M3VIT_PIXEL_HEAD_H_
#define M3VIT_PIXEL_HEAD_H_

#include "m3vit_math.h"

namespace nnet {
namespace vit {

// CONFIG_T: n_tok = n_row * n_column tokens of n_dim numbers, n_scale^2 pixels each; n_out (widest task, all pixels of
// a token), n_task, n_unrectified (features of a pixel that no ReLU cuts off), n_rows (sum of the tasks' channels), first_row(task) for task in [0, n_task]; weight_t, bias_t.
// Weights: weight [n_rows, 3, 3, M], M features of a pixel, bias [n_rows], task after task. An unknown task id is 0.
template <class data_T, class task_T, class res_T, typename CONFIG_T>
void pixel_head(hls::stream<data_T> &data, hls::stream<task_T> &task, hls::stream<res_T> &res,
                typename CONFIG_T::weight_t *weight, typename CONFIG_T::bias_t bias[CONFIG_T::n_rows]) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    typedef typename format<typename CONFIG_T::weight_t>::raw weight_raw;
    typedef typename format<in_T>::raw in_raw;
    const unsigned S = CONFIG_T::n_scale, M = CONFIG_T::n_dim / (S * S), N = CONFIG_T::n_out, most = N / (S * S);
    const unsigned rows = CONFIG_T::n_row, columns = CONFIG_T::n_column;
    static_assert(data_T::size == S * S * M && res_T::size == N && N == S * S * most, "one token a stream word");
    static_assert(CONFIG_T::n_tok == CONFIG_T::n_row * CONFIG_T::n_column, "tokens fill the grid");
    const int frac = format<in_T>::frac + format<typename CONFIG_T::weight_t>::frac;
    const int bias_shift = format<typename CONFIG_T::bias_t>::frac - frac;
    static weight_raw w[most * 9 * M];
    static in_raw kept[3][CONFIG_T::n_column][S * S * M]; // row r of tokens in place r % 3
    #pragma HLS ARRAY_PARTITION variable=w cyclic factor=M
    #pragma HLS ARRAY_PARTITION variable=kept dim=3 cyclic factor=M

    const task_T task_word = task.read();
    const unsigned task_read = (unsigned)task_word[0];
    const unsigned r = task_read < CONFIG_T::n_task ? task_read : 0;
    const unsigned first = CONFIG_T::first_row(r), channels = CONFIG_T::first_row(r + 1) - first;
LoadWeights:
    for (unsigned i = 0; i < channels * 9 * M; i++) {
        #pragma HLS PIPELINE II=1
        #pragma HLS LOOP_TRIPCOUNT max=most*9*M
        w[i] = to_raw(weight[first * 9 * M + i]);
    }
Row:
    for (unsigned next = 0; next <= rows; next++) {
    Read:
        for (unsigned column = 0; next < rows && column < columns; column++) {
            #pragma HLS PIPELINE II=1
            const data_T x = data.read();
            for (unsigned i = 0; i < S * S * M; i++) {
                #pragma HLS UNROLL
                const in_raw value = to_raw(x[i]);
                kept[next % 3][column][i] = value > 0 || i % M < CONFIG_T::n_unrectified ? value : in_raw(0);
            }
        }
        if (next == 0)
            continue;
    Token:
        for (unsigned column = 0; column < columns; column++) {
            res_T y;
            for (unsigned i = 0; i < N; i++) {
                #pragma HLS UNROLL
                y[i] = from_raw<out_T>(0, frac);
            }
        Output:
            for (unsigned o = 0; o < S * S * channels; o++) {
                const unsigned pixel = o / channels, channel = o % channels;
                long long sum = shift_round(to_raw(bias[first + channel]), bias_shift);
            Tap:
                for (unsigned tap = 0; tap < 9; tap++) {
                    #pragma HLS PIPELINE II=1
                    // From one line above and one column before on: below 0 wraps around to beyond the image.
                    const unsigned v = (next - 1) * S + pixel / S + tap / 3 - 1;
                    const unsigned u = column * S + pixel % S + tap % 3 - 1;
                    if (v < rows * S && u < columns * S)
                        sum += dot<M>(&kept[v / S % 3][u / S][(v % S * S + u % S) * M], &w[(channel * 9 + tap) * M]);
                }
                y[o] = from_raw<out_T>(sum, frac);
            }
            res.write(y);
        }
    }
}

} // namespace vit
} // namespace nnet
#endif
