// The router: softmax over all experts, top-k, and the queues of tokens for the experts.
//
// Logits (base 2) come from the gate, one row a token. The k largest are kept in order as they arrive, ties to the lowest
// expert id; weights are not renormalised. The queues are one list of rows * k entries sorted by expert (counting sort),
// so their size does not depend on the number of experts; `active` lists the experts with tokens.
// Logits are read for route_rows tokens at once.
// Cycles: rows * (words of experts + 2 * experts + 3 * k) + 2 * experts.
#ifndef M3VIT_ENGINE_ROUTER_H_
#define M3VIT_ENGINE_ROUTER_H_

#include "m3vit_engine.h"

#ifndef __SYNTHESIS__
#include <stdio.h>
#endif

namespace nnet {
namespace vit {

#ifndef __SYNTHESIS__
// C-simulation only: where the choice of every token is written, as 16-bit ids; null: nowhere.
inline FILE *&routing_log() {
    static FILE *file = 0;
    return file;
}
#endif

// Put (value, id) into the list of the k best so far, best first; an equal value stays behind earlier ones.
template <class C>
void insert_best(long long best[C::max_top], unsigned expert[C::max_top], unsigned k, int value, unsigned id) {
    #pragma HLS INLINE
    long long carried = value;
    unsigned carried_id = id;
    bool shifting = false;
    for (unsigned i = 0; i < C::max_top; i++) {
        #pragma HLS UNROLL
        if (i < k && (shifting || carried > best[i])) {
            const long long out = best[i];
            const unsigned out_id = expert[i];
            best[i] = carried;
            expert[i] = carried_id;
            carried = out;
            carried_id = out_id;
            shifting = true;
        }
    }
}

static const unsigned route_rows = 16; // tokens whose logits are read at once

template <class C> void route(const route_fields &I, typename ports<C>::wide_in wide, queues<C> &queue) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::wide_lanes, most = (C::max_experts + lanes - 1) / lanes;
    static typename words<C>::wide logits[route_rows][most];
    static uint16_t choice[C::max_rows * C::max_top];
    static int score[C::max_rows * C::max_top];
    const unsigned E = I.n_in, K = I.top_k;
    unsigned fill[C::max_experts];
    pipelined<loop_router_reset, 1> reset_loop;
Reset:
    for (unsigned e = 0; e < E; e++) {
        #pragma HLS PIPELINE II=1
        reset_loop.tick();
        fill[e] = 0;
    }
    const unsigned count = words_of<lanes>(E);
Token:
    for (unsigned t = 0; t < I.rows; t++) {
        if (t % route_rows == 0) {
            const unsigned tokens = I.rows - t < route_rows ? I.rows - t : route_rows;
            unsigned r = 0, w = 0;
            pipelined<loop_router_read, 1> read_loop;
        Read:
            for (unsigned n = 0; n < tokens * count; n++) {
                #pragma HLS PIPELINE II=1
                read_loop.tick();
                logits[r][w] = wide[(I.src + (t + r) * I.src_pitch) / lanes + w];
                if (++w == count) {
                    w = 0;
                    r++;
                }
            }
        }
        int logit[C::max_experts];
        long long best[C::max_top];
        unsigned expert[C::max_top];
        #pragma HLS ARRAY_PARTITION variable=best complete
        #pragma HLS ARRAY_PARTITION variable=expert complete
        for (unsigned i = 0; i < C::max_top; i++) {
            #pragma HLS UNROLL
            best[i] = -(1LL << 40); // below every logit
            expert[i] = 0;
        }
        pipelined<loop_router_logit, 1> logit_loop;
    Logit:
        for (unsigned e = 0; e < E; e++) {
            #pragma HLS PIPELINE II=1
            logit_loop.tick();
            logit[e] = logits[t % route_rows][e / lanes].lane[e % lanes];
            insert_best<C>(best, expert, K, logit[e], e);
        }
        long long total = 0;
        pipelined<loop_router_softmax, 1> softmax_loop;
    Softmax:
        for (unsigned e = 0; e < E; e++) {
            #pragma HLS PIPELINE II=1
            softmax_loop.tick();
            total += exp2_neg(best[0] - logit[e], I.logit_frac, prob_frac);
        }
        const scaled inverse = reciprocal(total);
        pipelined<loop_router_choose, 1> choose_loop;
    Choose:
        for (unsigned i = 0; i < K; i++) {
            #pragma HLS PIPELINE II=1
            choose_loop.tick();
            const long long weight = exp2_neg(best[0] - best[i], I.logit_frac, prob_frac);
            choice[t * K + i] = (uint16_t)expert[i];
            score[t * K + i] = (int)shift_round(weight * inverse.mantissa, 20 + inverse.shift - prob_frac);
            fill[expert[i]]++;
        }
    }
    M3VIT_COUNT(wide_read, I.rows * count * sizeof(typename words<C>::wide));
#ifndef __SYNTHESIS__
    if (routing_log())
        fwrite(choice, sizeof(uint16_t), I.rows * K, routing_log());
#endif
    unsigned next = 0;
    queue.num_active = 0;
    pipelined<loop_router_start, 1> start_loop;
Start:
    for (unsigned e = 0; e < E; e++) {
        #pragma HLS PIPELINE II=1
        start_loop.tick();
        const unsigned count = fill[e];
        if (count > 0)
            queue.active[queue.num_active++] = (uint16_t)e;
        queue.start[e] = fill[e] = next;
        next += count;
    }
    queue.start[E] = next;
Place:
    for (unsigned t = 0; t < I.rows; t++) {
        pipelined<loop_router_place, 2> place_loop;
        for (unsigned i = 0; i < K; i++) {
            #pragma HLS PIPELINE II=2
            place_loop.tick();
            const unsigned place = fill[choice[t * K + i]]++;
            queue.token[place] = (uint16_t)t;
            queue.weight[place] = score[t * K + i];
        }
    }
}

} // namespace vit
} // namespace nnet
#endif
