// Attention with an online softmax: keys and values pass once for each block of queries, in blocks of key_block tokens.
//
// For each query the engine keeps a whole number M (the running maximum of its scores, rounded up), the sum of weights
// 2^(score - M) and the sum of weighted values. When a block raises M by d, both sums are shifted right by d. So no row of
// scores is ever stored, buffers do not grow with the number of tokens, and one value fetched from memory serves
// query_block products. Queries hold log2(e) / sqrt(head width) already, hence base 2. Rounding depends on key_block, not on
// query_block.
// While one block of keys is worked on, the next is loaded (ping and pong).
// Cycles: about rows^2 * heads * 2, since the weights of a block follow its scores.
#ifndef M3VIT_ENGINE_ATTENTION_H_
#define M3VIT_ENGINE_ATTENTION_H_

#include "m3vit_engine.h"

namespace nnet {
namespace vit {

template <class C> struct key_block_buffer {
    typename C::act_t k[key_block][C::max_head], v[key_block][C::max_head];
};

template <class C> struct query_block_buffer {
    typename C::act_t q[C::query_block][C::max_head];
    long long top[C::query_block];
    sum_t total[C::query_block], context[C::query_block][C::max_head];
};

// One block of keys for one block of queries of one head.
struct attention_step {
    bool valid, first, last; // first, last: of the blocks of keys for these queries
    unsigned head, query, key;
};

template <class C> attention_step next_step(const attention_step &now, unsigned rows, unsigned heads) {
    attention_step next = now;
    next.key += key_block;
    if (next.key >= rows) {
        next.key = 0;
        next.query += C::query_block;
    }
    if (next.query >= rows) {
        next.query = 0;
        next.head++;
    }
    next.valid = next.head < heads;
    next.first = next.key == 0;
    next.last = next.key + key_block >= rows;
    return next;
}

template <class C>
void load_keys(const attention_step &step, const attention_fields &I, unsigned width, const typename C::act_t *narrow,
               key_block_buffer<C> &block) {
    #pragma HLS INLINE off
    if (!step.valid)
        return;
    const unsigned count = I.rows - step.key < key_block ? I.rows - step.key : key_block;
Key:
    for (unsigned j = 0; j < count; j++) {
        const unsigned place = I.src + (step.key + j) * I.src_pitch + step.head * width;
        for (unsigned c = 0; c < width; c++) {
            #pragma HLS PIPELINE II=1
            block.k[j][c] = narrow[place + I.n_out + c];
        }
        for (unsigned c = 0; c < width; c++) {
            #pragma HLS PIPELINE II=1
            block.v[j][c] = narrow[place + 2 * I.n_out + c];
        }
        for (unsigned c = width; c < C::max_head; c++) { // products span max_head
            #pragma HLS PIPELINE II=1
            block.k[j][c] = block.v[j][c] = 0;
        }
    }
    M3VIT_COUNT(narrow_read, count * 2 * width * sizeof(typename C::act_t));
}

// One query against a block of keys: scores, weights, sums.
template <class C>
void attend(const typename C::act_t q[C::max_head], const key_block_buffer<C> &block, unsigned count, bool first,
            int score_shift, long long &top, sum_t &total, sum_t context[C::max_head]) {
    int score[key_block];
    int best = 0;
Score:
    for (unsigned j = 0; j < count; j++) {
        #pragma HLS PIPELINE II=1
        long long sum = 0;
        for (unsigned c = 0; c < C::max_head; c++) {
            #pragma HLS UNROLL
            sum += (int)q[c] * (int)block.k[j][c];
        }
        score[j] = (int)saturate<score_bits>(shift_round(sum, score_shift));
        if (j == 0 || score[j] > best)
            best = score[j];
    }
    const long long ceiling = (best + (1 << score_frac) - 1) >> score_frac;
    if (first) {
        top = ceiling;
        total = 0;
        for (unsigned c = 0; c < C::max_head; c++) {
            #pragma HLS UNROLL
            context[c] = 0;
        }
    } else if (ceiling > top) {
        const int rise = ceiling - top > max_rise ? max_rise : (int)(ceiling - top);
        top = ceiling;
        total = shift_round((long long)total, rise);
        for (unsigned c = 0; c < C::max_head; c++) {
            #pragma HLS UNROLL
            context[c] = shift_round((long long)context[c], rise);
        }
    }
Weight:
    for (unsigned j = 0; j < count; j++) {
        #pragma HLS PIPELINE II=1
        const int weight = exp2_neg(top * (1 << score_frac) - score[j], score_frac, prob_frac);
        total += weight;
        for (unsigned c = 0; c < C::max_head; c++) {
            #pragma HLS UNROLL
            context[c] += weight * (long long)block.v[j][c];
        }
    }
}

template <class C>
void compute_step(const attention_step &step, const attention_fields &I, unsigned width, const key_block_buffer<C> &block,
                  query_block_buffer<C> &state, const typename C::act_t *narrow_in, typename C::act_t *narrow_out) {
    #pragma HLS INLINE off
    const unsigned keys = I.rows - step.key < key_block ? I.rows - step.key : key_block;
    const unsigned queries = I.rows - step.query < C::query_block ? I.rows - step.query : C::query_block;
Query:
    for (unsigned i = 0; i < queries; i++) {
        if (step.first) {
            const unsigned place = I.src + (step.query + i) * I.src_pitch + step.head * width;
            for (unsigned c = 0; c < width; c++) {
                #pragma HLS PIPELINE II=1
                state.q[i][c] = narrow_in[place + c];
            }
            for (unsigned c = width; c < C::max_head; c++) {
                #pragma HLS PIPELINE II=1
                state.q[i][c] = 0;
            }
        }
        attend<C>(state.q[i], block, keys, step.first, I.score_shift, state.top[i], state.total[i], state.context[i]);
        if (step.last) {
            const scaled inverse = reciprocal((unsigned long long)state.total[i]); // not 0: a weight of the last maximum is 1/2 or more
            const unsigned place = I.dst + (step.query + i) * I.dst_pitch + step.head * width;
        Divide:
            for (unsigned c = 0; c < width; c++) {
                #pragma HLS PIPELINE II=1
                const long long product = shift_round((long long)state.context[i][c], context_drop) * inverse.mantissa;
                const long long y = shift_round(product, 20 + inverse.shift - context_drop + I.value_shift);
                narrow_out[place + c] = (typename C::act_t)saturate<C::act_bits>(y);
            }
        }
    }
    if (step.first)
        M3VIT_COUNT(narrow_read, queries * width * sizeof(typename C::act_t));
    if (step.last)
        M3VIT_COUNT(narrow_write, queries * width * sizeof(typename C::act_t));
}

// The two run at the same time: they share no buffer.
template <class C>
void load_and_attend(const attention_step &next, key_block_buffer<C> &filled, const attention_step &now,
                     const key_block_buffer<C> &used, const attention_fields &I, unsigned width, query_block_buffer<C> &state,
                     const typename C::act_t *keys, const typename C::act_t *narrow_in, typename C::act_t *narrow_out) {
    #pragma HLS INLINE off
    #pragma HLS DATAFLOW
    load_keys<C>(next, I, width, keys, filled);
    compute_step<C>(now, I, width, used, state, narrow_in, narrow_out);
}

template <class C>
void attention(const attention_fields &I, const typename C::act_t *keys, const typename C::act_t *narrow_in,
               typename C::act_t *narrow_out) {
    #pragma HLS INLINE off
    // One engine for both calls below: it is the buffers that take turns.
    #pragma HLS ALLOCATION function instances=load_and_attend<C> limit=1
    static key_block_buffer<C> ping, pong;
    static query_block_buffer<C> state;
    #pragma HLS ARRAY_RESHAPE variable=ping.k dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=ping.v dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=pong.k dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=pong.v dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=state.q dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=state.context dim=2 complete
    #pragma HLS BIND_STORAGE variable=ping.k type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=ping.v type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=pong.k type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=pong.v type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=state.q type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=state.context type=ram_s2p impl=lutram
    const unsigned heads = I.heads, width = I.n_out / heads;
    attention_step now = {true, true, I.rows <= key_block, 0, 0, 0};
    load_keys<C>(now, I, width, keys, ping);
    bool in_ping = true;
Step:
    while (now.valid) {
        #pragma HLS LOOP_TRIPCOUNT min=1 max=1024
        const attention_step next = next_step<C>(now, I.rows, heads);
        if (in_ping)
            load_and_attend<C>(next, pong, now, ping, I, width, state, keys, narrow_in, narrow_out);
        else
            load_and_attend<C>(next, ping, now, pong, I, width, state, keys, narrow_in, narrow_out);
        in_ping = !in_ping;
        now = next;
    }
}

} // namespace vit
} // namespace nnet
#endif
