// Attention with an online softmax: keys and values pass once for each block of queries, in blocks of key_block tokens.
//
// For each query the engine keeps a whole number M (the running maximum of its scores, rounded up), the sum of weights
// 2^(score - M) and the sum of weighted values. When a block raises M by d, both sums are shifted right by d. So no row of
// scores is ever stored, buffers do not grow with the number of tokens, and one value fetched from memory serves
// query_block products. Queries hold log2(e) / sqrt(head width) already, hence base 2. Rounding depends on key_block, not on
// query_block or query_lanes.
// A group of query_lanes queries shares each key. One loop does three things at the same time: the scores of a group, the
// weights and weighted values of the group before, whose maximum is known, and the loading of the next block of keys.
// Cycles of a block of keys for a block of queries: key_block * (groups + 1), or the words of the next keys if more; and
// once for each block of queries reading and writing it.
#ifndef M3VIT_ENGINE_ATTENTION_H_
#define M3VIT_ENGINE_ATTENTION_H_

#include "m3vit_engine.h"

namespace nnet {
namespace vit {

// Two blocks of keys and values: one is filled while the other is worked on.
template <class C> struct key_blocks {
    typename C::act_t k[2][key_block][C::max_head], v[2][key_block][C::max_head];
};

template <class C> struct query_blocks {
    static const unsigned groups = C::query_block / C::query_lanes;
    typename C::act_t q[groups][C::query_lanes][C::max_head];
    long long top[groups][C::query_lanes];
    sum_t total[groups][C::query_lanes], context[groups][C::query_lanes][C::max_head];
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

// Where the loading of a block of keys stands: word `w` of key j, of keys first, then of values.
struct key_place {
    unsigned keys, words, j, w;
    bool value;
};

template <class C> key_place first_key(const attention_step &step, const attention_fields &I, unsigned width) {
    key_place place;
    place.keys = !step.valid ? 0 : I.rows - step.key < key_block ? I.rows - step.key : key_block;
    place.words = width / words<C>::narrow_lanes;
    place.j = place.w = 0;
    place.value = false;
    return place;
}

// Load one word, and go to the next.
template <class C>
void load_key(key_place &place, const attention_step &step, const attention_fields &I, unsigned width,
              const typename words<C>::narrow *narrow, key_blocks<C> &block, bool side) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::narrow_lanes;
    const unsigned row = I.src + (step.key + place.j) * I.src_pitch + step.head * width;
    const typename words<C>::narrow values = narrow[(row + (place.value ? 2 : 1) * I.n_out) / lanes + place.w];
    for (unsigned l = 0; l < lanes; l++) {
        #pragma HLS UNROLL
        if (place.value)
            block.v[side][place.j][place.w * lanes + l] = values.lane[l];
        else
            block.k[side][place.j][place.w * lanes + l] = values.lane[l];
    }
    if (++place.w == place.words) {
        place.w = 0;
        if (place.value)
            place.j++;
        place.value = !place.value;
    }
}

// Products span max_head: what a head of `width` channels leaves of it is 0, in both blocks and in the queries.
template <class C> void clear_rest(key_blocks<C> &block, query_blocks<C> &state, unsigned width) {
    #pragma HLS INLINE off
Rest:
    for (unsigned j = 0; j < (key_block > C::query_block ? key_block : C::query_block); j++) {
        #pragma HLS PIPELINE II=1
        for (unsigned c = 0; c < C::max_head; c++) {
            #pragma HLS UNROLL
            if (c >= width) {
                if (j < key_block)
                    block.k[0][j][c] = block.k[1][j][c] = block.v[0][j][c] = block.v[1][j][c] = 0;
                if (j < C::query_block)
                    state.q[j / C::query_lanes][j % C::query_lanes][c] = 0;
            }
        }
    }
}

template <class C>
void read_queries(const attention_step &step, const attention_fields &I, unsigned width, unsigned queries,
                  const typename words<C>::narrow *narrow, query_blocks<C> &state) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::narrow_lanes;
    unsigned i = 0, w = 0;
Query:
    for (unsigned n = 0; n < queries * (width / lanes); n++) {
        #pragma HLS PIPELINE II=1
        const unsigned row = I.src + (step.query + i) * I.src_pitch + step.head * width;
        const typename words<C>::narrow values = narrow[row / lanes + w];
        for (unsigned l = 0; l < lanes; l++) {
            #pragma HLS UNROLL
            state.q[i / C::query_lanes][i % C::query_lanes][w * lanes + l] = values.lane[l];
        }
        if (++w == width / lanes) {
            w = 0;
            i++;
        }
    }
    M3VIT_COUNT(narrow_read, queries * width * sizeof(typename C::act_t));
}

template <class C>
void write_context(const attention_step &step, const attention_fields &I, unsigned width, unsigned queries,
                   const query_blocks<C> &state, typename words<C>::narrow *narrow) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::narrow_lanes;
    unsigned i = 0, w = 0;
Divide:
    for (unsigned n = 0; n < queries * (width / lanes); n++) {
        #pragma HLS PIPELINE II=1
        const unsigned g = i / C::query_lanes, q = i % C::query_lanes;
        const scaled inverse = reciprocal((unsigned long long)state.total[g][q]); // not 0: the last maximum weighs 1/2 or more
        typename words<C>::narrow values;
        for (unsigned l = 0; l < lanes; l++) {
            #pragma HLS UNROLL
            const long long sum = shift_round((long long)state.context[g][q][w * lanes + l], context_drop);
            const long long y = shift_round(sum * inverse.mantissa, 20 + inverse.shift - context_drop + I.value_shift);
            values.lane[l] = (typename C::act_t)saturate<C::act_bits>(y);
        }
        narrow[(I.dst + (step.query + i) * I.dst_pitch + step.head * width) / lanes + w] = values;
        if (++w == width / lanes) {
            w = 0;
            i++;
        }
    }
    M3VIT_COUNT(narrow_write, queries * width * sizeof(typename C::act_t));
}

// One block of keys against all queries of a block, group after group, while the next block of keys is loaded.
template <class C>
void attend(const attention_step &now, const attention_step &next, const attention_fields &I, unsigned width,
            unsigned keys, unsigned queries, const typename words<C>::narrow *narrow, key_blocks<C> &block, bool side,
            query_blocks<C> &state) {
    #pragma HLS INLINE off
    static const unsigned lanes = C::query_lanes;
    // Scores of the group that is scored, and of the one before, which is weighed: they take turns.
    static int score[2][key_block][lanes];
    #pragma HLS ARRAY_PARTITION variable=score dim=1 complete
    #pragma HLS ARRAY_PARTITION variable=score dim=3 complete
    int best[lanes];
    long long top[lanes];
    sum_t total[lanes], context[lanes][C::max_head];
    #pragma HLS ARRAY_PARTITION variable=best complete
    #pragma HLS ARRAY_PARTITION variable=top complete
    #pragma HLS ARRAY_PARTITION variable=total complete
    #pragma HLS ARRAY_PARTITION variable=context complete dim=0
    const unsigned groups = words_of<lanes>(queries);
    key_place place = first_key<C>(next, I, width);
    const unsigned loads = place.keys * place.words * 2, steps = (groups + 1) * keys;
    unsigned g = 0, j = 0;
Step:
    for (unsigned n = 0; n < (steps > loads ? steps : loads); n++) {
        #pragma HLS PIPELINE II=1
        #pragma HLS DEPENDENCE variable=score inter false
        #pragma HLS DEPENDENCE variable=block.k inter false
        #pragma HLS DEPENDENCE variable=block.v inter false
        #pragma HLS DEPENDENCE variable=state.context inter false
        #pragma HLS DEPENDENCE variable=state.total inter false
        #pragma HLS DEPENDENCE variable=state.top inter false
        if (n < loads)
            load_key<C>(place, next, I, width, narrow, block, !side);
        if (n < steps) {
            if (g > 0) {
                for (unsigned q = 0; q < lanes; q++) {
                    #pragma HLS UNROLL
                    if (j == 0) { // the group's sums, shifted if this block has a larger score
                        const long long ceiling = ((long long)best[q] + (1 << score_frac) - 1) >> score_frac;
                        const long long before = state.top[g - 1][q];
                        const bool higher = now.first || ceiling > before;
                        const int rise = now.first || !higher ? 0 : ceiling - before > max_rise ? max_rise : (int)(ceiling - before);
                        top[q] = higher ? ceiling : before;
                        total[q] = now.first ? 0 : shift_round((long long)state.total[g - 1][q], rise);
                        for (unsigned c = 0; c < C::max_head; c++) {
                            #pragma HLS UNROLL
                            context[q][c] = now.first ? 0 : shift_round((long long)state.context[g - 1][q][c], rise);
                        }
                    }
                    const int weight =
                        exp2_neg(top[q] * (1 << score_frac) - score[(g - 1) & 1][j][q], score_frac, prob_frac);
                    total[q] += weight;
                    for (unsigned c = 0; c < C::max_head; c++) {
                        #pragma HLS UNROLL
                        context[q][c] += weight * (long long)block.v[side][j][c];
                    }
                    if (j == keys - 1) {
                        state.top[g - 1][q] = top[q];
                        state.total[g - 1][q] = total[q];
                        for (unsigned c = 0; c < C::max_head; c++) {
                            #pragma HLS UNROLL
                            state.context[g - 1][q][c] = context[q][c];
                        }
                    }
                }
            }
            if (g < groups) {
                for (unsigned q = 0; q < lanes; q++) {
                    #pragma HLS UNROLL
                    long long sum = 0;
                    for (unsigned c = 0; c < C::max_head; c++) {
                        #pragma HLS UNROLL
                        sum += (int)state.q[g][q][c] * (int)block.k[side][j][c];
                    }
                    const long long rounded = shift_round(sum, I.score_shift);
                    // Of queries beyond the last, which the block may hold from before, nothing is kept or counted.
                    const int s = g * lanes + q < queries ? (int)saturate<score_bits>(rounded) : 0;
                    score[g & 1][j][q] = s;
                    if (j == 0 || s > best[q])
                        best[q] = s;
                }
            }
            if (++j == keys) {
                j = 0;
                g++;
            }
        }
    }
}

template <class C>
void attention(const attention_fields &I, const typename words<C>::narrow *keys,
               const typename words<C>::narrow *narrow_in, typename words<C>::narrow *narrow_out) {
    #pragma HLS INLINE off
    static key_blocks<C> block;
    static query_blocks<C> state;
    #pragma HLS ARRAY_PARTITION variable=block.k dim=1 complete
    #pragma HLS ARRAY_PARTITION variable=block.v dim=1 complete
    #pragma HLS ARRAY_RESHAPE variable=block.k dim=3 complete
    #pragma HLS ARRAY_RESHAPE variable=block.v dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=state.q dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=state.q dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=state.top dim=2 complete
    #pragma HLS ARRAY_PARTITION variable=state.total dim=2 complete
    #pragma HLS ARRAY_PARTITION variable=state.context dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=state.context dim=3 complete
    #pragma HLS BIND_STORAGE variable=block.k type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=block.v type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=state.q type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=state.context type=ram_s2p impl=lutram
    const unsigned heads = I.heads, width = I.n_out / heads;
    clear_rest<C>(block, state, width);
    attention_step now = {true, true, I.rows <= key_block, 0, 0, 0};
    key_place place = first_key<C>(now, I, width);
    const unsigned loads = place.keys * place.words * 2;
First:
    for (unsigned n = 0; n < loads; n++) {
        #pragma HLS PIPELINE II=1
        load_key<C>(place, now, I, width, keys, block, 0);
    }
    bool side = false;
Steps:
    while (now.valid) {
        #pragma HLS LOOP_TRIPCOUNT min=1 max=1024
        const attention_step next = next_step<C>(now, I.rows, heads);
        const unsigned count = I.rows - now.key < key_block ? I.rows - now.key : key_block;
        const unsigned queries = I.rows - now.query < C::query_block ? I.rows - now.query : C::query_block;
        if (now.first)
            read_queries<C>(now, I, width, queries, narrow_in, state);
        attend<C>(now, next, I, width, count, queries, keys, block, side, state);
        if (now.last)
            write_context<C>(now, I, width, queries, state, narrow_out);
        M3VIT_COUNT(narrow_read, 2 * count * width * sizeof(typename C::act_t));
        side = !side;
        now = next;
    }
}

} // namespace vit
} // namespace nnet
#endif
