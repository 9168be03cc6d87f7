// Mixture of experts with a run-time task id, computed expert by expert (M3ViT, arXiv 2210.14793, section 4).
//
// Gate every token first: router of the task, softmax over all experts, top-k of the logits (ties: lowest expert id),
// weights not renormalised; each token joins the queues of its experts. Then each expert with a non-empty queue has its
// weights loaded once into a local buffer and works off its queue. Router logits are in base 2 (log2(e) is folded in).
// Cycles: about n_tok * n_exp (gate) + n_active * n_dim * (n_hid + n_hid) / P (loads of P words)
//         + n_tok * n_top * (n_hid + n_dim) (experts, one output a cycle).
#ifndef M3VIT_MOE_H_
#define M3VIT_MOE_H_

#include "m3vit_math.h"

#ifndef __SYNTHESIS__
#include <cstdlib>
#include <fstream>
#endif

namespace nnet {
namespace vit {

// One token's choice: the n_top experts of the largest logits, best first. Strict comparison: a tie goes to the lowest id.
template <unsigned E, unsigned K> void top_k(const long long logit[E], unsigned expert[K]) {
    bool taken[E];
    #pragma HLS ARRAY_PARTITION variable=taken complete
    for (unsigned e = 0; e < E; e++) {
        #pragma HLS UNROLL
        taken[e] = false;
    }
Pick:
    for (unsigned k = 0; k < K; k++) {
        bool found = false;
        unsigned best = 0;
        long long highest = 0;
    Compare:
        for (unsigned e = 0; e < E; e++) {
            #pragma HLS PIPELINE II=1
            if (!taken[e] && (!found || logit[e] > highest)) {
                found = true;
                best = e;
                highest = logit[e];
            }
        }
        taken[best] = true;
        expert[k] = best;
    }
}

#ifndef __SYNTHESIS__
// C-simulation only: how often an expert's weights were loaded since the start.
inline unsigned long &expert_loads() {
    static unsigned long loads = 0;
    return loads;
}

// C-simulation only: append "layer expert expert ..." (token-major, n_top a token) to the file M3VIT_ROUTING_LOG names.
inline void log_routing(unsigned layer, const unsigned short *experts, unsigned count) {
    const char *path = std::getenv("M3VIT_ROUTING_LOG");
    if (path == nullptr)
        return;
    std::ofstream log(path, std::ios::app);
    log << layer;
    for (unsigned i = 0; i < count; i++)
        log << ' ' << experts[i];
    log << '\n';
}
#endif

// CONFIG_T: layer (its number among the MoE layers), n_tok, n_dim, n_hid, n_exp, n_top, n_task;
// router_w_t, router_b_t, w1_t, b1_t, w2_t, b2_t, hidden_t (before and after GELU), expert_t (an expert's output).
// Weights: router_w [n_task, n_exp, n_dim], w1 [n_exp, n_hid, n_dim], w2 [n_exp, n_dim, n_hid]. An unknown task id is 0.
template <class data_T, class task_T, class res_T, typename CONFIG_T>
void moe(hls::stream<data_T> &data, hls::stream<task_T> &task, hls::stream<res_T> &res,
         typename CONFIG_T::router_w_t router_w[CONFIG_T::n_task * CONFIG_T::n_exp * CONFIG_T::n_dim],
         typename CONFIG_T::router_b_t router_b[CONFIG_T::n_task * CONFIG_T::n_exp],
         typename CONFIG_T::w1_t w1[CONFIG_T::n_exp * CONFIG_T::n_hid * CONFIG_T::n_dim],
         typename CONFIG_T::b1_t b1[CONFIG_T::n_exp * CONFIG_T::n_hid],
         typename CONFIG_T::w2_t w2[CONFIG_T::n_exp * CONFIG_T::n_dim * CONFIG_T::n_hid],
         typename CONFIG_T::b2_t b2[CONFIG_T::n_exp * CONFIG_T::n_dim]) {
    typedef typename data_T::value_type in_T;
    typedef typename res_T::value_type out_T;
    typedef typename CONFIG_T::hidden_t hidden_T;
    typedef typename CONFIG_T::expert_t expert_T;
    const unsigned T = CONFIG_T::n_tok, D = CONFIG_T::n_dim, H = CONFIG_T::n_hid, E = CONFIG_T::n_exp;
    const unsigned K = CONFIG_T::n_top;
    static_assert(K >= 1 && K <= E, "1 <= n_top <= n_exp");
    static_assert(data_T::size == D && res_T::size == D, "one token a stream word");
    const int in_frac = format<in_T>::frac, hidden_frac = format<hidden_T>::frac, expert_frac = format<expert_T>::frac;
    const int logit_frac = in_frac + format<typename CONFIG_T::router_w_t>::frac;

    static typename format<in_T>::raw x[T * D];
    static typename raw_int<48>::type sum[T * D];
    static typename format<typename CONFIG_T::router_w_t>::raw gate[E * D];
    static typename format<typename CONFIG_T::w1_t>::raw w1_local[H * D];
    static typename format<typename CONFIG_T::w2_t>::raw w2_local[D * H];
    #pragma HLS ARRAY_PARTITION variable=x cyclic factor=D
    #pragma HLS ARRAY_PARTITION variable=gate cyclic factor=D
    #pragma HLS ARRAY_PARTITION variable=w1_local cyclic factor=D
    #pragma HLS ARRAY_PARTITION variable=w2_local cyclic factor=H
    static unsigned short queue[E][T];
    static typename raw_int<prob_frac + 1>::type queue_weight[E][T];
    unsigned queue_len[E], active[E], num_active = 0;

    const task_T task_word = task.read();
    const unsigned task_read = (unsigned)task_word[0];
    const unsigned r = task_read < CONFIG_T::n_task ? task_read : 0;
LoadRouter:
    for (unsigned i = 0; i < E * D; i++) {
        #pragma HLS PIPELINE II=1
        gate[i] = to_raw(router_w[r * E * D + i]);
    }
    for (unsigned e = 0; e < E; e++)
        queue_len[e] = 0;

#ifndef __SYNTHESIS__
    static unsigned short chosen[T * K];
#endif
Gate:
    for (unsigned t = 0; t < T; t++) {
        const data_T token = data.read();
        for (unsigned d = 0; d < D; d++) {
            #pragma HLS UNROLL
            x[t * D + d] = to_raw(token[d]);
            sum[t * D + d] = 0;
        }
        long long logit[E];
        #pragma HLS ARRAY_PARTITION variable=logit complete
    Logit:
        for (unsigned e = 0; e < E; e++) {
            #pragma HLS PIPELINE II=1
            const int bias_shift = format<typename CONFIG_T::router_b_t>::frac - logit_frac;
            logit[e] = dot<D>(&x[t * D], &gate[e * D]) + shift_round(to_raw(router_b[r * E + e]), bias_shift);
        }
        unsigned expert[K];
        top_k<E, K>(logit, expert);
        long long total = 0;
        int weight[E];
    Softmax:
        for (unsigned e = 0; e < E; e++) {
            #pragma HLS PIPELINE II=1
            weight[e] = exp2_neg(logit[expert[0]] - logit[e], logit_frac, prob_frac);
            total += weight[e];
        }
        const scaled inverse = reciprocal(total);
    Enqueue:
        for (unsigned k = 0; k < K; k++) {
            #pragma HLS PIPELINE
            const unsigned e = expert[k];
            const long long score = shift_round(weight[e] * (long long)inverse.mantissa, 20 + inverse.shift - prob_frac);
            queue[e][queue_len[e]] = t;
            queue_weight[e][queue_len[e]] = score;
            queue_len[e]++;
#ifndef __SYNTHESIS__
            chosen[t * K + k] = e;
#endif
        }
    }
#ifndef __SYNTHESIS__
    log_routing(CONFIG_T::layer, chosen, T * K);
#endif
Active:
    for (unsigned e = 0; e < E; e++) {
        if (queue_len[e] > 0)
            active[num_active++] = e;
    }
Expert:
    for (unsigned a = 0; a < num_active; a++) {
        const unsigned e = active[a];
#ifndef __SYNTHESIS__
        expert_loads()++;
#endif
    LoadExpert:
        for (unsigned i = 0; i < H * D; i++) {
            #pragma HLS PIPELINE II=1
            w1_local[i] = to_raw(w1[e * H * D + i]);
            w2_local[i] = to_raw(w2[e * H * D + i]);
        }
    Drain:
        for (unsigned n = 0; n < queue_len[e]; n++) {
            const unsigned t = queue[e][n];
            typename format<hidden_T>::raw hidden[H];
            #pragma HLS ARRAY_PARTITION variable=hidden complete
        Hidden:
            for (unsigned h = 0; h < H; h++) {
                #pragma HLS PIPELINE II=1
                const int frac = in_frac + format<typename CONFIG_T::w1_t>::frac;
                const int bias_shift = format<typename CONFIG_T::b1_t>::frac - frac;
                const long long y = dot<D>(&x[t * D], &w1_local[h * D]) + shift_round(to_raw(b1[e * H + h]), bias_shift);
                const long long z = gelu_raw(to_raw(from_raw<hidden_T>(y, frac)), hidden_frac);
                hidden[h] = to_raw(from_raw<hidden_T>(z, gelu_frac(hidden_frac)));
            }
        Output:
            for (unsigned d = 0; d < D; d++) {
                #pragma HLS PIPELINE II=1
                const int frac = hidden_frac + format<typename CONFIG_T::w2_t>::frac;
                const int bias_shift = format<typename CONFIG_T::b2_t>::frac - frac;
                const long long y = dot<H>(hidden, &w2_local[d * H]) + shift_round(to_raw(b2[e * D + d]), bias_shift);
                sum[t * D + d] += to_raw(from_raw<expert_T>(y, frac)) * (long long)queue_weight[e][n];
            }
        }
    }
Write:
    for (unsigned t = 0; t < T; t++) {
        #pragma HLS PIPELINE
        res_T y;
        for (unsigned d = 0; d < D; d++) {
            #pragma HLS UNROLL
            y[d] = from_raw<out_T>(sum[t * D + d], expert_frac + prob_frac);
        }
        res.write(y);
    }
}

} // namespace vit
} // namespace nnet
#endif
