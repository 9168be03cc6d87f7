// Attention with an online softmax, on the array: keys and values pass once for each block of queries, in blocks of
// key_block tokens.
//
// For each query the engine keeps a whole number M (the running maximum of its scores, rounded up), the sum of weights
// 2^(score - M) and the sum of weighted values. When a block raises M by d, both sums are shifted right by d. So no row of
// scores is ever stored, buffers do not grow with the number of tokens, and one value fetched from memory serves a whole
// block of queries. Queries hold log2(e) / sqrt(head width) already, hence base 2. Rounding depends on key_block, not on
// how queries are grouped. Weights have prob_frac - weight_drop fractional bits.
//
// A job is a head and a block of queries, and a sequence of rounds: `batch` groups of C::group queries against a block of
// keys. Four stages work side by side, each on the round before that of the last one: score multiplies queries and keys;
// round rounds the sums and finds the maxima; weigh makes the weights and shifts the sums of before; value multiplies
// weights and values and adds. So what a stage makes is used a round later. Scores and values take turns on the array, `turn`
// cycles a group. Meanwhile the next block of keys is loaded, which has `ring` places since values are used three rounds
// after keys; the queries of the next job; and the job before is divided by its sums of weights, C::divided values a
// cycle, and written. Jobs follow one another without a gap.
// Cycles: (jobs * blocks of keys * rounds + 3 + what writing the last job takes) * batch * turn, and reading the first job.
#ifndef M3VIT_ENGINE_ATTENTION_H_
#define M3VIT_ENGINE_ATTENTION_H_

#include "m3vit_engine_attention_jobs.h"

namespace nnet {
namespace vit {

// The cycles in which the weights of a query are made, and its sums of before shifted.
template <class C> unsigned weigh_turns(unsigned width, unsigned keys) {
    #pragma HLS INLINE
    const unsigned weights = times(keys, softmax_lanes<C>::scores), shifted = times(width, softmax_lanes<C>::sums);
    return weights > shifted ? weights : shifted;
}

// Begin an instruction. Blocks of queries are of one size.
template <class C>
void begin_attention(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer) {
    #pragma HLS INLINE off
    state.width = I.n_out / I.heads;
    state.blocks = times(I.rows, key_block);
    state.query_size = times(I.rows, times(I.rows, C::groups * C::group));
    const unsigned keys = keys_of(I, 0), score = times(keys, C::tile_out) * times(state.width, C::tile_in);
    const unsigned value = times(keys, C::tile_in) * times(state.width, C::tile_out);
    const unsigned on_array = times(C::group, attention_sizes<C>::score_queries) * score +
                              times(C::group, attention_sizes<C>::value_queries) * value;
    const unsigned weighed = weigh_turns<C>(state.width, keys) * times(C::group, softmax_lanes<C>::queries);
    const unsigned turn = on_array > weighed ? on_array : weighed;
    state.turn = turn > least_turn ? turn : least_turn;
    state.length = batch * state.turn;
    state.begun = false;
    clear_rest<C>(buffer, state.width);
}

// Read the first job, and return the cycles that all jobs take; 0 when they were returned before.
template <class C>
unsigned next_attention(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer,
                        typename ports<C>::keys keys, typename ports<C>::narrow_in narrow_in) {
    #pragma HLS INLINE off
    if (state.begun)
        return 0;
    state.begun = true;
    const attention_job job = first_job<C>(state, I);
    for (unsigned s = 0; s < stages; s++) {
        #pragma HLS UNROLL
        state.stage[s].valid = s == 0;
        state.stage[s].job = job;
        state.stage[s].block = state.stage[s].number = state.stage[s].group = 0;
    }
    state.load = state.stage[0];
    state.read = state.write = job;
    state.load_key = state.load_word = state.read_query = state.read_word = 0;
    state.load_value = false;
    state.finished = state.write_query = state.write_value = 0;
    state.round = state.g = state.i = 0;
    const unsigned words_of_head = state.width / words<C>::narrow_lanes;
    const unsigned loads = 2 * keys_of(I, 0) * words_of_head, reads = job.queries * words_of_head;
    const unsigned first = loads > reads ? loads : reads;
    pipelined<loop_attention_first, 1> first_loop;
First:
    for (unsigned n = 0; n < first; n++) {
        #pragma HLS PIPELINE II=1
        first_loop.tick();
        if (n < loads)
            load_key<C>(state, I, keys, buffer);
        if (n < reads)
            load_query<C>(state, I, narrow_in, buffer);
    }
    // A round for each batch of groups, and enough for what goes on meanwhile: loading the next block of keys, reading the
    // next job, and writing the one before while there are rounds that do not finish its places.
    const unsigned used = times(times(state.query_size, C::group), batch);
    const unsigned divisions = (C::two_bytes && I.dst_low > 0 ? 2 : 1) * (state.width / C::divided); // of a query
    const unsigned writing = times(state.query_size * divisions, state.length) + 2;
    const unsigned each[] = {used, stages - 1, times(loads + settled, state.length),
                             times(times(reads + settled, state.length), state.blocks), times(used + writing, state.blocks)};
    state.rounds = 0;
    for (unsigned n = 0; n < sizeof each / sizeof each[0]; n++) {
        #pragma HLS UNROLL
        state.rounds = each[n] > state.rounds ? each[n] : state.rounds;
    }
    const unsigned jobs = I.heads * times(I.rows, state.query_size);
    return (jobs * state.blocks * state.rounds + stages - 1 + writing) * state.length;
}

// A group of a stage: whether there is one, its number, and the keys that it meets.
struct stage_group {
    bool valid;
    unsigned group, block, keys, place; // place: of the block in the ring
    attention_job job;
};

template <class C>
stage_group group_of(const attention_state<C> &state, const attention_fields &I, unsigned s) {
    #pragma HLS INLINE
    stage_group found;
    found.group = state.stage[s].group + state.g;
    found.job = state.stage[s].job;
    found.valid = state.stage[s].valid && found.group * C::group < found.job.queries;
    found.block = state.stage[s].block;
    found.place = state.stage[s].number % ring;
    found.keys = found.valid ? keys_of(I, found.block) : key_block;
    return found;
}

// The operands of a cycle: the first ones of a turn are of scores, then of values.
struct array_turn {
    bool score, value, first, last; // first, last: step of a sum
    unsigned step, pass, query;     // of the inputs, of the outputs, and the first query on the array
};

template <class C> array_turn turn_of(const attention_state<C> &state, const stage_group &scored, const stage_group &valued) {
    #pragma HLS INLINE
    array_turn t;
    const unsigned channels = times(state.width, C::tile_in), passes = times(scored.keys, C::tile_out);
    const unsigned score = times(C::group, attention_sizes<C>::score_queries) * channels * passes;
    const unsigned added = times(valued.keys, C::tile_in), outputs = times(state.width, C::tile_out);
    const unsigned value = times(C::group, attention_sizes<C>::value_queries) * added * outputs;
    t.score = scored.valid && state.i < score;
    t.value = valued.valid && state.i >= state.turn - value;
    const unsigned i = t.score ? state.i : state.i - (state.turn - value), steps = t.score ? channels : added;
    t.step = i % steps;
    t.pass = i / steps % (t.score ? passes : outputs);
    t.query = i / steps / (t.score ? passes : outputs) *
              (t.score ? attention_sizes<C>::score_queries : attention_sizes<C>::value_queries);
    t.first = t.step == 0;
    t.last = t.step + 1 == steps;
    return t;
}

// Stage 1: C::lanes scores, of one query or several, are rounded, and the largest of each query is found.
template <class C>
void round_scores(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer,
                  const stage_group &at, unsigned side) {
    #pragma HLS INLINE
    static const unsigned queries = softmax_lanes<C>::queries, lanes = softmax_lanes<C>::scores;
    const unsigned turns = times(at.keys, lanes), e = state.i % turns * lanes;
    for (unsigned p = 0; p < queries; p++) {
        #pragma HLS UNROLL
        const unsigned q = state.i / turns * queries + p;
        if (!at.valid || q >= C::group)
            continue;
        // Of queries beyond the last, which the block may hold from before, nothing is kept or counted.
        const bool known = at.group * C::group + q < at.job.queries;
        for (unsigned l = 0; l < lanes; l++) {
            #pragma HLS UNROLL
            const unsigned j = e + l;
            if (j >= at.keys)
                continue;
            const long long rounded = shift_round((long long)buffer.product[side][state.g][q][j], I.score_shift);
            const int s = known ? (int)saturate<score_bits>(rounded) : 0;
            buffer.score[side][state.g][q][j] = s;
            if (j == 0 || s > state.best[p])
                state.best[p] = s;
        }
        if (e + lanes >= at.keys)
            buffer.best[side][state.g][q] = state.best[p];
    }
}

// Stage 2: of query q, the p-th of those that are worked on at once, weights; and its sums from before, shifted if this
// block has a larger score.
template <class C>
void weigh_query(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer,
                 const stage_group &at, unsigned side, unsigned q, unsigned p, unsigned turn, unsigned turns) {
    #pragma HLS INLINE
    static const unsigned lanes = softmax_lanes<C>::scores, shifted_lanes = softmax_lanes<C>::sums;
    typedef typename attention_sums<C>::context context_t;
    const unsigned e = turn * lanes, group = at.group, g = state.g;
    const bool first = at.block == 0;
    const long long ceiling = ((long long)buffer.best[side][g][q] + (1 << score_frac) - 1) >> score_frac;
    const long long before = buffer.top[group][q];
    const bool higher = first || ceiling > before;
    const int rise = first || !higher ? 0 : ceiling - before > max_rise ? max_rise : (int)(ceiling - before);
    if (turn == 0) {
        state.top[p] = higher ? ceiling : before;
        state.total[p] = first ? context_t(0) : context_t(shift_round((long long)buffer.total[group][q], rise));
    }
    long long added = 0;
    for (unsigned l = 0; l < lanes; l++) {
        #pragma HLS UNROLL
        const unsigned j = e + l;
        if (j < key_block) {
            const long long below = state.top[p] * (1 << score_frac) - buffer.score[side][g][q][j];
            const int weight = j < at.keys ? exp2_neg(below, score_frac, prob_frac - I.weight_drop) : 0;
            buffer.weight[side][g][q][j] = weight;
            added += weight;
        }
    }
    for (unsigned l = 0; l < shifted_lanes; l++) {
        #pragma HLS UNROLL
        const unsigned c = turn * shifted_lanes + l;
        if (c < C::head)
            buffer.carried[side][g][q][c] =
                first ? context_t(0) : context_t(shift_round((long long)buffer.context[group][q][c], rise));
    }
    state.total[p] += added * (1LL << I.weight_drop);
    if (turn + 1 == turns) {
        buffer.top[group][q] = state.top[p];
        buffer.total[group][q] = state.total[p];
        if (at.block + 1 == state.blocks)
            buffer.divisor[group][q] = state.total[p];
    }
}

// Stage 2: C::lanes weights, of one query or several.
template <class C>
void weigh(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer, const stage_group &at,
           unsigned side) {
    #pragma HLS INLINE
    static const unsigned queries = softmax_lanes<C>::queries;
    const unsigned turns = weigh_turns<C>(state.width, at.keys);
    for (unsigned p = 0; p < queries; p++) {
        #pragma HLS UNROLL
        const unsigned q = state.i / turns * queries + p;
        if (at.valid && q < C::group)
            weigh_query<C>(state, I, buffer, at, side, q, p, state.i % turns, turns);
    }
}

// Each stage takes the round that the one before it has finished.
template <class C> void next_rounds(attention_state<C> &state, const attention_fields &I) {
    #pragma HLS INLINE
    const attention_round &last = state.stage[stages - 1];
    const unsigned after = last.group + batch; // a job is finished with its last group, in the last block of keys
    if (last.valid && last.block + 1 == state.blocks && last.group * C::group < last.job.queries &&
        after * C::group >= last.job.queries)
        state.finished++;
    for (unsigned s = stages - 1; s > 0; s--) {
        #pragma HLS UNROLL
        state.stage[s] = state.stage[s - 1];
    }
    attention_round &first = state.stage[0];
    first.group += batch;
    if (first.group >= state.rounds * batch) {
        first.group = 0;
        first.number++;
        if (++first.block == state.blocks) {
            first.block = 0;
            next_job<C>(state, I, first.job);
        }
    }
    first.valid = first.job.head < I.heads;
}

// One cycle before the array: load, write, round, weigh, and bring the operands of the array.
template <class C>
array_turn attention_before(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer,
                            typename ports<C>::keys keys, typename ports<C>::narrow_in narrow_in,
                            typename ports<C>::narrow_out narrow_out, operands<C> &step) {
    #pragma HLS INLINE
    const unsigned g = state.g, now = state.round & 1, before = now ^ 1; // stages 0 and 2 fill `now`, 1 and 3 `before`
    load_key<C>(state, I, keys, buffer);
    load_query<C>(state, I, narrow_in, buffer);
    write_context<C>(state, I, buffer, narrow_out);
    round_scores<C>(state, I, buffer, group_of<C>(state, I, 1), before);
    weigh<C>(state, I, buffer, group_of<C>(state, I, 2), now);
    const stage_group scored = group_of<C>(state, I, 0), valued = group_of<C>(state, I, 3);
    const array_turn t = turn_of<C>(state, scored, valued);
    step.used = t.score || t.value;
    step.small = C::packed;
    // Outputs beyond the last query, key or channel may have any operands: their sums are not kept.
    if (t.score) {
        for (unsigned s = 0; s < operands<C>::spans; s++) {
            #pragma HLS UNROLL
            const unsigned query = t.query + s * C::span / key_block, q = query < C::group ? query : 0;
            for (unsigned j = 0; j < C::tile_in; j++) {
                #pragma HLS UNROLL
                step.x[s][j] = buffer.q[scored.job.number % 2][scored.group][q][t.step * C::tile_in + j];
            }
        }
        for (unsigned o = 0; o < C::tile_out; o++) {
            #pragma HLS UNROLL
            const unsigned key = (o + t.pass * C::tile_out) % key_block;
            for (unsigned j = 0; j < C::tile_in; j++) {
                #pragma HLS UNROLL
                step.y[o][j] = buffer.k[scored.place][key][t.step * C::tile_in + j];
            }
        }
    } else if (t.value) {
        for (unsigned s = 0; s < operands<C>::spans; s++) {
            #pragma HLS UNROLL
            const unsigned query = t.query + s * C::span / C::head, q = query < C::group ? query : 0;
            for (unsigned j = 0; j < C::tile_in; j++) {
                #pragma HLS UNROLL
                step.x[s][j] = buffer.weight[before][g][q][t.step * C::tile_in + j];
            }
        }
        for (unsigned o = 0; o < C::tile_out; o++) {
            #pragma HLS UNROLL
            const unsigned c = (o + t.pass * C::tile_out) % C::head;
            for (unsigned j = 0; j < C::tile_in; j++) {
                #pragma HLS UNROLL
                step.y[o][j] = buffer.v[valued.place][c][t.step * C::tile_in + j];
            }
        }
    }
    return t;
}

// The same cycle after the array: add the sums, and go on.
template <class C>
void attention_after(attention_state<C> &state, const attention_fields &I, attention_buffers<C> &buffer,
                     const array_turn &t, const long long sum[C::tile_out]) {
    #pragma HLS INLINE
    const unsigned g = state.g, now = state.round & 1, before = now ^ 1;
    if (t.score) {
        for (unsigned o = 0; o < C::tile_out; o++) {
            #pragma HLS UNROLL
            typedef typename attention_sums<C>::product product_t;
            state.score_sum[o] = t.first ? product_t(sum[o]) : product_t(state.score_sum[o] + sum[o]);
            const unsigned q = t.query + o / key_block, key = o % key_block + t.pass * C::tile_out;
            if (t.last && q < C::group && key < key_block)
                buffer.product[now][g][q][key] = state.score_sum[o];
        }
    } else if (t.value) {
        const unsigned group = state.stage[3].group + g;
        const bool finished = state.stage[3].block + 1 == state.blocks;
        for (unsigned o = 0; o < C::tile_out; o++) {
            #pragma HLS UNROLL
            const unsigned q = t.query + o / C::head, c = o % C::head + t.pass * C::tile_out;
            if (q < C::group && c < C::head) {
                typedef typename attention_sums<C>::context context_t;
                const context_t sum_before = t.first ? buffer.carried[before][g][q][c] : state.value_sum[o];
                state.value_sum[o] = context_t(sum_before + sum[o] * (1LL << I.weight_drop));
                if (t.last && finished)
                    buffer.finished[group][q][c] = state.value_sum[o];
                else if (t.last)
                    buffer.context[group][q][c] = state.value_sum[o];
            }
        }
    }
    if (++state.i == state.turn) {
        state.i = 0;
        if (++state.g == batch) {
            state.g = 0;
            state.round++;
            next_rounds<C>(state, I);
        }
    }
}

} // namespace vit
} // namespace nnet
#endif
