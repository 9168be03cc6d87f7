// The router: softmax over all experts, top-k, and the queues of tokens for the experts.
//
// Logits (base 2) come from the gate, one row a token. The k largest are kept in order as they arrive, ties to the lowest
// expert id; weights are not renormalised. The queues are one list of rows * k entries sorted by expert (counting sort),
// so their size does not depend on the number of experts; `active` lists the experts with tokens.
// One loop passes over all tokens: while it reads the logits of one it inserts those of the one before, sums the
// exponentials of the one before that, and keeps the choice of a fourth.
// Cycles: (rows + 3) * experts, or route_span a token if there are fewer, + 2 * rows * k + 2 * experts.
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

static const unsigned route_span = 16; // steps of a token at least: what is read is there when the next one comes

template <class C> void route(const route_fields &I, typename ports<C>::wide_in wide, queues<C> &queue) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::wide_lanes, most = (C::max_experts + lanes - 1) / lanes;
    static typename words<C>::wide logits[4][most];
    static uint16_t choice[C::max_rows * C::max_top];
    static int score[C::max_rows * C::max_top];
    #pragma HLS ARRAY_PARTITION variable=logits dim=1 complete
    const unsigned E = I.n_in, K = I.top_k;
    unsigned fill[C::max_experts];
    pipelined<loop_router_reset, 1> reset_loop;
Reset:
    for (unsigned e = 0; e < E; e++) {
        #pragma HLS PIPELINE II=1
        reset_loop.tick();
        fill[e] = 0;
    }
    const unsigned count = words_of<lanes>(E), longest = E > K ? E : K, span = longest > route_span ? longest : route_span;
    // The k best of the tokens t - 1, t - 2 and t - 3, and the sum of exponentials of the last two.
    long long best[3][C::max_top], total = 0;
    unsigned expert[3][C::max_top];
    scaled inverse = {0, 0};
    #pragma HLS ARRAY_PARTITION variable=best complete dim=0
    #pragma HLS ARRAY_PARTITION variable=expert complete dim=0
    for (unsigned i = 0; i < 3 * C::max_top; i++) {
        #pragma HLS UNROLL
        best[i / C::max_top][i % C::max_top] = expert[i / C::max_top][i % C::max_top] = 0;
    }
    unsigned t = 0, w = 0;
    pipelined<loop_router_token, 1> token_loop;
Token:
    for (unsigned n = 0; n < (I.rows + 3) * span; n++) {
        #pragma HLS PIPELINE II=1
        token_loop.tick();
        #pragma HLS DEPENDENCE variable=logits inter false
        if (w == 0) {
            inverse = reciprocal(total > 0 ? (unsigned long long)total : 1);
            total = 0;
            for (unsigned i = 0; i < C::max_top; i++) {
                #pragma HLS UNROLL
                for (unsigned stage = 2; stage > 0; stage--) {
                    #pragma HLS UNROLL
                    best[stage][i] = best[stage - 1][i];
                    expert[stage][i] = expert[stage - 1][i];
                }
                best[0][i] = -(1LL << 40); // below every logit
                expert[0][i] = 0;
            }
        }
        if (t < I.rows && w < count)
            logits[t & 3][w] = wide[(I.src + t * I.src_pitch) / lanes + w];
        if (t - 1 < I.rows && w < E)
            insert_best<C>(best[0], expert[0], K, logits[(t - 1) & 3][w / lanes].lane[w % lanes], w);
        if (t - 2 < I.rows && w < E)
            total += exp2_neg(best[1][0] - logits[(t - 2) & 3][w / lanes].lane[w % lanes], I.logit_frac, prob_frac);
        if (t - 3 < I.rows && w < K) {
            const long long weight = exp2_neg(best[2][0] - best[2][w], I.logit_frac, prob_frac);
            choice[(t - 3) * K + w] = (uint16_t)expert[2][w];
            score[(t - 3) * K + w] = (int)shift_round(weight * inverse.mantissa, 20 + inverse.shift - prob_frac);
            fill[expert[2][w]]++;
        }
        if (++w == span) {
            w = 0;
            t++;
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
    unsigned token = 0, place = 0;
    pipelined<loop_router_place, 2> place_loop;
Place:
    for (unsigned n = 0; n < I.rows * K; n++) {
        #pragma HLS PIPELINE II=2
        place_loop.tick();
        const unsigned at = fill[choice[n]]++;
        queue.token[at] = (uint16_t)token;
        queue.weight[at] = score[n];
        if (++place == K) {
            place = 0;
            token++;
        }
    }
}

} // namespace vit
} // namespace nnet
#endif
