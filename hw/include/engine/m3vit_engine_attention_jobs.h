// The jobs of attention (m3vit_engine_attention.h): what it keeps on chip, where it stands, and what is loaded and written
// beside the work on the array.
#ifndef M3VIT_ENGINE_ATTENTION_JOBS_H_
#define M3VIT_ENGINE_ATTENTION_JOBS_H_

#include "m3vit_engine_array.h"

namespace nnet {
namespace vit {

static const unsigned batch = 8;     // groups of a round, at least 4 cycles each: a round outlasts the pipeline
static const unsigned stages = 4;    // and least rounds of a block of keys but one: its sums are used again after them
static const unsigned least_turn = 4;
static const unsigned ring = 4; // blocks of keys and values on chip
static const unsigned settled = 16; // cycles from a word's loading to its use

// Sums of scores and of weighted values, in the width that they need.
template <class C> struct attention_sums {
    typedef typename sums<C::product_bits>::type product;
    typedef typename sums<C::context_bits>::type context;
};

// What softmax works on in a cycle: queries, of more lanes than keys several; and of each of these scores, and channels
// whose sums of before are shifted: a head's are done when key_block scores are.
template <class C> struct softmax_lanes {
    static const unsigned queries = C::lanes > key_block ? C::lanes / key_block : 1, scores = C::lanes / queries;
    static const unsigned sums = C::head < key_block ? scores * C::head / key_block : scores;
};

template <class C> struct attention_sizes {
    static const unsigned score_queries = C::tile_out > key_block ? C::tile_out / key_block : 1; // on the array at once
    static const unsigned value_queries = C::tile_out > C::head ? C::tile_out / C::head : 1;
    static const unsigned keys = C::tile_out < key_block ? C::tile_out : key_block; // and channels on the array at once
    static const unsigned channels = C::tile_out < C::head ? C::tile_out : C::head;
};

template <class C> struct attention_buffers {
    typename C::act_t k[ring][key_block][C::head], v[ring][C::head][key_block]; // values: channel by channel
    typename C::act_t q[2][C::groups][C::group][C::head]; // of this job and of the next
    // By round, odd or even: sums of products, rounded scores and their maxima, weights, and the sums before these.
    typename attention_sums<C>::product product[2][batch][C::group][key_block];
    int score[2][batch][C::group][key_block], best[2][batch][C::group], weight[2][batch][C::group][key_block];
    typename attention_sums<C>::context carried[2][batch][C::group][C::head];
    long long top[C::groups][C::group];
    typename attention_sums<C>::context total[C::groups][C::group], context[C::groups][C::group][C::head];
    // After the last block of keys: what is divided and written during the next job.
    typename attention_sums<C>::context divisor[C::groups][C::group], finished[C::groups][C::group][C::head];
};

// A head and a block of queries: which one of all, its first query, and how many.
struct attention_job {
    unsigned number, head, query, queries;
};

// Where a stage stands: job, block of keys (block: of the job; number: of all), and batch of groups of it.
struct attention_round {
    bool valid;
    attention_job job;
    unsigned block, number, group; // group: the first of the batch
};

template <class C> struct attention_state {
    // Of the instruction.
    unsigned width, blocks, query_size;
    unsigned rounds, turn, length; // rounds of a block of keys, cycles of a group, and of a round
    // Where it stands: rounds begun; group of the batch, cycle of the turn.
    bool begun;
    unsigned round, g, i;
    attention_round stage[stages];
    // Loading keys: block, place of its word. Queries: job, place of its word.
    attention_round load;
    unsigned load_key, load_word;
    bool load_value;
    attention_job read;
    unsigned read_query, read_word;
    // Writing: jobs that are finished, the one that is written, and the place of its values.
    unsigned finished;
    attention_job write;
    unsigned write_query, write_value;
    typename words<C>::narrow written;
    typename attention_sums<C>::product score_sum[C::tile_out];
    typename attention_sums<C>::context value_sum[C::tile_out], total[softmax_lanes<C>::queries];
    int best[softmax_lanes<C>::queries];
    long long top[softmax_lanes<C>::queries];
};

// How many keys block b has.
inline unsigned keys_of(const attention_fields &I, unsigned b) {
    #pragma HLS INLINE
    return I.rows - b * key_block < key_block ? I.rows - b * key_block : key_block;
}

inline unsigned times(unsigned count, unsigned size) {
    #pragma HLS INLINE
    return (count + size - 1) / size;
}

template <class C> attention_job first_job(const attention_state<C> &state, const attention_fields &I) {
    #pragma HLS INLINE
    attention_job job = {0, 0, 0, I.rows < state.query_size ? I.rows : state.query_size};
    return job;
}

// The next block of queries of the head, or the first of the next one; after the last head there is none.
template <class C> void next_job(const attention_state<C> &state, const attention_fields &I, attention_job &job) {
    #pragma HLS INLINE
    job.number++;
    job.query += state.query_size;
    if (job.query >= I.rows) {
        job.query = 0;
        job.head++;
    }
    job.queries = I.rows - job.query < state.query_size ? I.rows - job.query : state.query_size;
}

// Load one word of keys or values, and go to the next; nothing after the last, nor further ahead than one block.
template <class C>
void load_key(attention_state<C> &state, const attention_fields &I, typename ports<C>::keys narrow,
              attention_buffers<C> &buffer) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::narrow_lanes;
    if (state.load.job.head >= I.heads || state.load.number > state.stage[0].number + 1)
        return;
    const unsigned place = state.load.number % ring, j = state.load_key, w = state.load_word;
    const unsigned row = I.src + (state.load.block * key_block + j) * I.src_pitch + state.load.job.head * state.width;
    const typename words<C>::narrow values = narrow[(row + (state.load_value ? 2 : 1) * I.n_out) / lanes + w];
    M3VIT_COUNT(narrow_read, sizeof(values));
    for (unsigned l = 0; l < lanes; l++) {
        #pragma HLS UNROLL
        if (state.load_value)
            buffer.v[place][w * lanes + l][j] = values.lane[l];
        else
            buffer.k[place][j][w * lanes + l] = values.lane[l];
    }
    if (++state.load_word == state.width / lanes) {
        state.load_word = 0;
        state.load_value = !state.load_value;
        if (!state.load_value && ++state.load_key == keys_of(I, state.load.block)) {
            state.load_key = 0;
            state.load.number++;
            if (++state.load.block == state.blocks) {
                state.load.block = 0;
                next_job<C>(state, I, state.load.job);
            }
        }
    }
}

// Load one word of queries, and go to the next; nothing after the last, nor further ahead than one job.
template <class C>
void load_query(attention_state<C> &state, const attention_fields &I, typename ports<C>::narrow_in narrow,
                attention_buffers<C> &buffer) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::narrow_lanes;
    if (state.read.head >= I.heads || state.read.number > state.stage[0].job.number + 1)
        return;
    const unsigned i = state.read_query, w = state.read_word;
    const unsigned row = I.src + (state.read.query + i) * I.src_pitch + state.read.head * state.width;
    const typename words<C>::narrow values = narrow[row / lanes + w];
    M3VIT_COUNT(narrow_read, sizeof(values));
    for (unsigned l = 0; l < lanes; l++) {
        #pragma HLS UNROLL
        buffer.q[state.read.number % 2][i / C::group][i % C::group][w * lanes + l] = values.lane[l];
    }
    if (++state.read_word == state.width / lanes) {
        state.read_word = 0;
        if (++state.read_query == state.read.queries) {
            state.read_query = 0;
            next_job<C>(state, I, state.read);
        }
    }
}

// Divide C::divided values of a finished job, and write each word that is whole; of values of two bytes twice, once for
// each byte.
template <class C>
void write_context(attention_state<C> &state, const attention_fields &I, const attention_buffers<C> &buffer,
                   typename ports<C>::narrow_out narrow) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::narrow_lanes;
    if (state.write.number >= state.finished)
        return;
    const unsigned i = state.write_query, g = i / C::group, q = i % C::group;
    const bool two = C::two_bytes && I.dst_low > 0;
    const narrow_step at_step = step_of<C>(state.write_value / C::divided, lanes / C::divided, two);
    const unsigned first = at_step.values * C::divided;
    const scaled inverse = reciprocal((unsigned long long)buffer.divisor[g][q]); // not 0: the last maximum weighs 1/2 or more
    for (unsigned l = 0; l < C::divided; l++) {
        #pragma HLS UNROLL
        const long long sum = shift_round((long long)buffer.finished[g][q][first + l], context_drop);
        const long long y = shift_round(sum * inverse.mantissa, 20 + inverse.shift - context_drop + I.value_shift);
        state.written.lane[first % lanes + l] = stored<C>(hold_narrow<C>(y, at_step.form), at_step.form);
    }
    state.write_value += C::divided;
    const unsigned places = two ? 2 * state.width : state.width; // of a head
    if (state.write_value % lanes == 0) {
        const unsigned row = I.dst + (state.write.query + i) * I.dst_pitch + state.write.head * places;
        narrow[row / lanes + at_step.word] = state.written;
        M3VIT_COUNT(narrow_write, sizeof(state.written));
    }
    if (state.write_value == places) {
        state.write_value = 0;
        if (++state.write_query == state.write.queries) {
            state.write_query = 0;
            next_job<C>(state, I, state.write);
        }
    }
}

// Products span whole steps of channels: what a head of `width` channels leaves of them is 0, in keys and in queries.
template <class C> void clear_rest(attention_buffers<C> &buffer, unsigned width) {
    #pragma HLS INLINE off
    pipelined<loop_attention_rest, 1> rest_loop;
Rest:
    for (unsigned j = 0; j < (key_block > C::groups ? key_block : C::groups); j++) {
        #pragma HLS PIPELINE II=1
        rest_loop.tick();
        for (unsigned c = 0; c < C::head; c++) {
            #pragma HLS UNROLL
            if (c >= width) {
                for (unsigned r = 0; r < ring; r++) {
                    #pragma HLS UNROLL
                    if (j < key_block)
                        buffer.k[r][j][c] = buffer.v[r][c][j] = 0;
                }
                for (unsigned q = 0; q < C::group; q++) {
                    #pragma HLS UNROLL
                    if (j < C::groups)
                        buffer.q[0][j][q][c] = buffer.q[1][j][q][c] = 0;
                }
            }
        }
    }
}

} // namespace vit
} // namespace nnet
#endif
