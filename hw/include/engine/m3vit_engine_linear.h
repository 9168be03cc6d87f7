// Linear maps on the array: dense layers, experts, routers, embedding and heads, and the convolution of heads, whose
// inputs are gathered as they are read.
//
// Work is a sequence of tiles: `tile_out` outputs of one linear map (gate_out of a router's, whose weights have 16 bits),
// for up to token_block tokens; the blocks of a map are of one size. For experts the sequence runs through both maps of
// every expert that has tokens (computation reordering, M3ViT, arXiv 2210.14793, section 4).
// The loop of m3vit_engine_compute.h does all that a tile asks for at the same time: it multiplies a token's inputs,
// tile_in a step; writes the results of the token before, a word a step; and loads the next tile, a word of weights
// from each of their ports a step, into the other of two buffers, so the first tile of the next expert is fetched during
// the last of this one. Each port of weights reads its half of a tile's rows, which is one run of addresses, and has
// outputs of the array of its own.
// The inputs of a block of tokens are read from DDR while its first tile is multiplied, just ahead of it, and kept on chip
// for the others; so inputs pass once, and weights once for each block (for most experts there is one). Where a step
// takes more than a word they come through two ports, each of which reads its half of the block's tokens, and tokens
// are taken from both halves in turn: so each port reads whole rows, one after the other.
// A tile of at most half the outputs, whose inputs are on chip, is folded: the rows of the array that are left over
// multiply every second step of the inputs, or their low bytes, so that it takes half the steps.
// Inputs may have two bytes each, 256 high + low. Their words are read in turn and kept apart; the array takes all of the
// high bytes, then the low ones, with the same weights, and between both the sums are multiplied by 256.
// Cycles of a tile: (tokens + 1, and two for each port of inputs more if they are read) times the longest of multiplying
// (n_in / tile_in, half of it if it is folded), reading (words of n_in / ports), both twice for inputs of two bytes, and
// writing (words of tile_out), or the words of the next tile if those are more.
#ifndef M3VIT_ENGINE_LINEAR_H_
#define M3VIT_ENGINE_LINEAR_H_

#include "m3vit_engine_tiles.h"

namespace nnet {
namespace vit {

// The inputs of a block of tokens, in words.
template <class C> struct token_cache {
    typename words<C>::narrow x[C::token_block][C::max_cached / words<C>::narrow_lanes];
};

// Where a token's inputs begin in src, and its results in dst; the router's weight (mode to_queue).
struct token_place {
    unsigned from, at;
    int score;
};

// Of token n in the order in which they are taken. Where inputs come through two ports, even ones are of the first half
// of a block, odd ones of the second.
template <class C> inline unsigned in_order(const tile_job &job, unsigned n) {
    #pragma HLS INLINE
    return job.ports == 1 ? n : n % 2 == 0 ? n / 2 : n / 2 + (job.count + 1) / 2;
}

template <class C>
token_place place_of(const tile_job &job, const conv_fields &G, unsigned n, const queues<C> &queue) {
    #pragma HLS INLINE
    token_place place;
    const bool queued = job.gather || job.mode == to_queue;
    const unsigned token = queued ? queue.token[job.first + n] : job.base + n;
    place.from = job.src + (job.gather ? token : job.base + n) * job.src_pitch;
    const unsigned row = job.mode == to_queue ? token : job.base + n;
    const unsigned pixels = job.conv ? G.upscale * G.upscale : 1; // of a row of dst
    place.at = job.dst + row / pixels * job.dst_pitch + row % pixels * G.pixel_pitch * job.conv;
    place.score = job.mode == to_queue ? queue.weight[job.first + n] : 0;
    return place;
}

// Where the reading of one pixel's neighbours stands: word `w` of tap `tap`, of the pixel at (row, column); of two bytes,
// whether the low ones follow, and which of their values are above 0 (or may be, as a low byte says) by the high ones.
template <class C> struct tap_place {
    unsigned count, width, height, row, column, tap, w; // count: words of a tap
    bool low, above[words<C>::narrow_lanes], zero[words<C>::narrow_lanes];
};

template <class C> tap_place<C> first_tap(const tile_job &job, const conv_fields &G, unsigned n) {
    #pragma HLS INLINE
    const unsigned s = G.upscale, token = n / (s * s), pixel = n % (s * s);
    tap_place<C> place;
    place.count = job.n_in / taps / words<C>::narrow_lanes;
    place.width = G.columns * s;
    place.height = G.rows / place.width;
    place.row = token / G.columns * s + pixel / s;
    place.column = token % G.columns * s + pixel % s;
    place.tap = place.w = 0;
    place.low = false;
    return place;
}

// The next word of the features of the 3 x 3 pixels around one, line by line, after ReLU, but for the first
// G.unrectified features of a pixel; zeros outside the image. A token holds upscale^2 pixels, line by line, and tokens
// are G.columns side by side.
template <class C>
typename words<C>::narrow read_tap(tap_place<C> &place, const tile_job &job, const conv_fields &G,
                                   typename ports<C>::narrow_in narrow) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::narrow_lanes;
    const unsigned s = G.upscale;
    // From one line above and one column before on: below 0 wraps around to beyond the image.
    const unsigned y = place.row + place.tap / 3 - 1, x = place.column + place.tap % 3 - 1;
    const bool inside = y < place.height && x < place.width;
    typename words<C>::narrow values;
    if (inside) {
        const unsigned pixel = y % s * s + x % s;
        const unsigned word = pixel * place.count + place.w, of_two = 2 * word + place.low;
        values = narrow[(job.src + (y / s * G.columns + x / s) * job.src_pitch) / lanes + (job.two ? of_two : word)];
        M3VIT_COUNT(narrow_read, sizeof(values));
    }
    for (unsigned l = 0; l < lanes; l++) {
        #pragma HLS UNROLL
        const typename C::act_t value = inside ? values.lane[l] : (typename C::act_t)0;
        const bool rest = place.low ? place.above[l] || (place.zero[l] && value > 0) : value > 0;
        const bool kept = rest || place.w * lanes + l < G.unrectified;
        if (C::two_bytes && !place.low) {
            place.above[l] = value > 0;
            place.zero[l] = value == 0;
        }
        values.lane[l] = kept ? value : (typename C::act_t)0;
    }
    if (job.two) {
        place.low = !place.low;
        if (place.low)
            return values;
    }
    if (++place.w == place.count) {
        place.w = 0;
        place.tap++;
    }
    return values;
}

// The tile that is worked on, and the one that is loaded meanwhile.
template <class C> struct linear_state {
    static const unsigned lanes = words<C>::narrow_lanes, joined = C::tile_in / lanes; // words of a step
    static const unsigned banks = (C::folded ? 2 : 1) * joined; // of the inputs on chip
    static const unsigned lead = 2;       // turns of the ports by which reading is ahead
    static const unsigned least_span = 8; // of a pass that reads: a word is there 16 steps before it is used
    tile_place place;
    tile_job now, next;
    bool side;
    tile_progress loading;
    unsigned loads, passes, steps, reads, results, span;
    unsigned high, low_at; // of inputs of two bytes: steps of the high ones, and the word from which the low ones lie
    unsigned n, i;            // the pass, and where it stands
    unsigned ahead;           // how many passes reading is ahead of multiplying
    token_place found[1 + lead][2]; // of tokens that are read, one for each port, and of those before
    token_place token, written;
    tap_place<C> tap;
    typename words<C>::narrow gathered; // results of the word that is not whole yet
    sum_t sum[C::tile_out], done[C::tile_out]; // of the token that is multiplied, and of the one before, which is written
};

// Begin an instruction: load the first tile.
template <class C>
void begin_linear(linear_state<C> &state, const linear_fields &I, const queues<C> &queue, weight_tiles<C> &tile,
               typename ports<C>::weights weights, typename ports<C>::more_weights more_weights,
               typename ports<C>::gates gates, typename ports<C>::params params) {
    #pragma HLS INLINE off
    state.place.map = state.place.base = state.place.row = 0;
    state.side = false;
    state.next = next_tile<C>(state.place, I, queue);
    tile_progress loading = first_word<C>(state.next);
    const unsigned loads = words_left(loading);
    pipelined<loop_linear_first, 1> first_loop;
First:
    for (unsigned k = 0; k < loads; k++) {
        #pragma HLS PIPELINE II=1
        first_loop.tick();
        load_word<C>(loading, state.next, tile, 0, weights, more_weights, gates, params);
    }
}

// Go to the next tile; return the steps that it takes, 0 after the last.
template <class C> unsigned next_linear(linear_state<C> &state, const linear_fields &I, const queues<C> &queue) {
    #pragma HLS INLINE
    static const unsigned lanes = linear_state<C>::lanes;
    if (!state.next.valid)
        return 0;
    const tile_job now = state.now = state.next;
    state.next = next_tile<C>(state.place, I, queue);
    state.loading = first_word<C>(state.next);
    state.loads = words_left(state.loading);
    state.high = now.n_in / C::tile_in;
    // Of both an even step and an odd one, so that a folded tile reads them from memories apart.
    state.low_at = (C::folded ? state.high | 1 : state.high) * linear_state<C>::joined;
    state.steps = (now.two ? 2 : 1) * state.high / (now.folded ? 2 : 1);
    state.reads = now.fresh ? (now.two ? 2 : 1) * (now.n_in / lanes) / now.ports : 0;
    state.ahead = now.fresh ? linear_state<C>::lead * now.ports : 0;
    state.results = now.mode == to_narrow   ? (now.writes_two ? 2 * lanes / C::results * words_of<lanes>(now.outputs)
                                                              : words_of<C::results>(now.outputs))
                    : now.mode == to_output ? words_of<words<C>::param_lanes>(now.outputs)
                                            : words_of<words<C>::wide_lanes>(first_half(now));
    state.span = state.steps > state.results ? state.steps : state.results;
    const unsigned reading = state.reads > linear_state<C>::least_span ? state.reads : linear_state<C>::least_span;
    state.span = now.fresh && reading > state.span ? reading : state.span;
    state.passes = (now.count + 1 + state.ahead) * state.span;
    state.n = state.i = 0;
    return state.passes > state.loads ? state.passes : state.loads;
}

template <class C> void end_tile(linear_state<C> &state) {
    #pragma HLS INLINE
#ifndef __SYNTHESIS__
    const tile_job &now = state.now;
    if (now.fresh && !now.conv)
        M3VIT_COUNT(narrow_read, now.count * now.n_in * sizeof(typename C::act_t) * (now.two ? 2 : 1));
    if (now.mode == to_narrow)
        M3VIT_COUNT(narrow_write, now.count * words_of<words<C>::narrow_lanes>(now.outputs) *
                                      sizeof(typename words<C>::narrow) * (now.writes_two ? 2 : 1));
    else if (now.mode == to_output)
        M3VIT_COUNT(output, now.count * state.results * sizeof(typename words<C>::params));
    else
        M3VIT_COUNT(wide_write, now.count * words_of<words<C>::wide_lanes>(now.outputs) * sizeof(typename words<C>::wide));
    if (now.mode == to_residual || now.mode == to_queue)
        M3VIT_COUNT(wide_read, now.count * words_of<words<C>::wide_lanes>(now.outputs) * sizeof(typename words<C>::wide));
    M3VIT_COUNT(params, words_of<words<C>::param_lanes>(row_words * now.outputs) * sizeof(typename words<C>::params));
    if (now.gate)
        M3VIT_COUNT(gates, now.outputs * now.n_in * sizeof(int16_t));
    else
        M3VIT_COUNT(weights, now.outputs * now.n_in * sizeof(typename C::wt_t));
#endif
    state.side = !state.side;
}

// Bias and rounding of output o.
template <class C> long long result_of(const linear_state<C> &state, const weight_tiles<C> &tile, unsigned o) {
    #pragma HLS INLINE
    const bool side = state.side;
    const long long bias = tile.bias[side][o] * (1LL << tile.bias_shift[side][o]);
    const unsigned other = o + weight_tiles<C>::fold < C::tile_out ? o + weight_tiles<C>::fold : o;
    const long long folded = C::folded && state.now.folded ? (long long)state.done[other] : 0;
    const bool high = C::folded && C::two_bytes && state.now.folded && state.now.two; // alone: the other row has the low
    const long long own = (long long)state.done[o] * (high ? 256 : 1);
    return shift_round(own + folded + bias, tile.shift[side][o]);
}

// Write step `w` of a token's results: C::results narrow values, after their activation, and each word that is whole; a wide
// word of each half, with what is in memory added; or a word of the output, which has one port and hence no halves.
template <class C>
void write_word(linear_state<C> &state, const weight_tiles<C> &tile, unsigned w,
                typename ports<C>::narrow_out narrow, typename ports<C>::wide_in wide_in, typename ports<C>::wide wide,
                typename ports<C>::more_wide_in more_wide_in, typename ports<C>::more_wide more_wide,
                typename ports<C>::output output) {
    #pragma HLS INLINE
    static const unsigned narrow_lanes = words<C>::narrow_lanes, wide_lanes = words<C>::wide_lanes;
    static const unsigned out_lanes = words<C>::param_lanes;
    static const unsigned joined = narrow_lanes / C::results; // steps of a narrow word
    static_assert(C::results >= 2 * wide_lanes && joined > 0, "a step's results are two wide words, or of one narrow word");
    const tile_job &job = state.now;
    const token_place &token = state.written;
    const bool adds = job.mode == to_residual || job.mode == to_queue, whole = job.mode == to_output;
    const narrow_step at_step = step_of<C>(w, joined, job.writes_two); // of narrow results
    // The results of a step, and which outputs they are.
    long long results[C::results];
    unsigned outputs[C::results];
    #pragma HLS ARRAY_PARTITION variable=results complete
    #pragma HLS ARRAY_PARTITION variable=outputs complete
    for (unsigned l = 0; l < C::results; l++) {
        #pragma HLS UNROLL
        const unsigned part = l / wide_lanes, of_word = w * wide_lanes + l % wide_lanes;
        outputs[l] = job.mode == to_narrow ? at_step.values * C::results + l
                     : whole               ? (l < out_lanes ? w * out_lanes + l : job.outputs)
                     : part == 0           ? (of_word < job.half ? of_word : job.outputs)
                     : part == 1           ? job.half + of_word
                                           : job.outputs;
        results[l] = outputs[l] < job.outputs ? result_of<C>(state, tile, weight_tiles<C>::row_of(job, outputs[l])) : 0;
    }
    if (job.mode == to_narrow) {
        typename C::act_t values[C::results];
        #pragma HLS ARRAY_PARTITION variable=values complete
        for (unsigned l = 0; l < C::results; l++) {
            #pragma HLS UNROLL
            values[l] = 0;
            if (outputs[l] < job.outputs) {
                const long long n = hold_narrow<C>(results[l], at_step.form);
                values[l] = stored<C>(job.gelu_in < 0 ? n : gelu<C>(n, job.gelu_in, job.gelu_out, at_step.form), at_step.form);
            }
        }
        for (unsigned l = 0; l < narrow_lanes; l++) {
            #pragma HLS UNROLL
            if (l / C::results >= at_step.part)
                state.gathered.lane[l] = l / C::results == at_step.part ? values[l % C::results] : 0;
        }
        if (at_step.part == joined - 1 || w + 1 == state.results)
            narrow[token.at / narrow_lanes + at_step.word] = state.gathered;
    } else if (whole) {
        typename words<C>::params values;
        for (unsigned l = 0; l < out_lanes; l++) {
            #pragma HLS UNROLL
            values.lane[l] = outputs[l] < job.outputs ? (int32_t)saturate<32>(results[l]) : 0;
        }
        output[token.at / out_lanes + w] = values;
    } else {
        // No two tokens of a tile have the same row, so it may be read before the one before is written.
        const unsigned at = token.at / wide_lanes + w, more_at = at + job.half / wide_lanes;
        const bool more = outputs[wide_lanes] < job.outputs;
        typename words<C>::wide values[2];
        #pragma HLS ARRAY_PARTITION variable=values complete
        if (adds)
            values[0] = wide_in[at];
        if (adds && more)
            values[1] = more_wide_in[more_at];
        for (unsigned l = 0; l < 2 * wide_lanes; l++) {
            #pragma HLS UNROLL
            typename C::wide_t &value = values[l / wide_lanes].lane[l % wide_lanes];
            const long long held = C::wide_bits < 32 ? shift_round(value, job.rescale) : value;
            const long long before = adds && outputs[l] < job.outputs ? held : 0;
            value = 0;
            if (outputs[l] < job.outputs) {
                const long long y = results[l];
                const long long added = job.mode == to_queue ? shift_round(saturate<32>(y) * token.score, prob_frac) : y;
                value = (typename C::wide_t)saturate<C::wide_bits>(before + added);
            }
        }
        wide[at] = values[0];
        if (more)
            more_wide[more_at] = values[1];
    }
}

// Step k of a tile, before the array: load, write, and bring the operands.
template <class C>
void linear_before(linear_state<C> &state, unsigned k, const conv_fields &G, const queues<C> &queue, weight_tiles<C> &tile,
                   token_cache<C> &cache, operands<C> &step, typename ports<C>::weights weights,
                   typename ports<C>::more_weights more_weights, typename ports<C>::gates gates, typename ports<C>::params params,
                   typename ports<C>::keys keys, typename ports<C>::narrow_in narrow_in,
                   typename ports<C>::narrow_out narrow_out, typename ports<C>::wide_in wide_in,
                   typename ports<C>::wide wide, typename ports<C>::more_wide_in more_wide_in,
                   typename ports<C>::more_wide more_wide, typename ports<C>::output output) {
    #pragma HLS INLINE
    static const unsigned lanes = linear_state<C>::lanes, joined = linear_state<C>::joined;
    const tile_job &now = state.now;
    const unsigned n = state.n, i = state.i;
    if (k < state.loads)
        load_word<C>(state.loading, state.next, tile, !state.side, weights, more_weights, gates, params);
    step.used = false;
    if (k >= state.passes)
        return;
    if (i == 0 && n % now.ports == 0) { // the tokens of the next passes, one for each port
        for (unsigned p = 0; p < 2; p++) {
            #pragma HLS UNROLL
            for (unsigned turn = linear_state<C>::lead; turn > 0; turn--) {
                #pragma HLS UNROLL
                state.found[turn][p] = state.found[turn - 1][p];
            }
            if (p < now.ports && n + p < now.count)
                state.found[0][p] = place_of<C>(now, G, in_order<C>(now, n + p), queue);
        }
        if (now.conv && n < now.count)
            state.tap = first_tap<C>(now, G, now.base + n);
    }
    if (i == 0)
        state.token = state.found[now.fresh ? linear_state<C>::lead : 0][n % now.ports];
    if (n > state.ahead && i < state.results)
        write_word<C>(state, tile, i, narrow_out, wide_in, wide, more_wide_in, more_wide, output);
    if (i < state.reads) { // of a token each port reads so many words in a pass
        const unsigned read = n % now.ports * state.reads + i, first = n - n % now.ports;
        // On chip words of high bytes lie before those of the low ones.
        const unsigned word = now.two ? read / 2 + (read % 2 ? state.low_at : 0) : read;
        if (now.conv) {
            if (n < now.count)
                cache.x[n][word] = read_tap<C>(state.tap, now, G, narrow_in);
        } else {
            if (first < now.count)
                cache.x[first][word] = narrow_in[state.found[0][0].from / lanes + read];
            if (joined > 1 && first + 1 < now.count)
                cache.x[first + 1][word] = keys[state.found[0][1].from / lanes + read];
        }
    }
    if (n < state.ahead || n >= now.count + state.ahead || i >= state.steps)
        return;
    step.used = true;
    typedef weight_tiles<C> T;
    const bool low = now.two && i >= state.high; // bytes of a tile that is not folded
    const unsigned weight = low ? i - state.high : i; // the step of the weights
    const bool apart = C::folded && now.folded && !now.two;
    const unsigned first_word_at = low ? state.low_at + weight * joined : (apart ? 2 * i : i) * joined;
    const unsigned other_word_at = apart ? (2 * i + 1) * joined : state.low_at + i * joined;
    // Those of the other rows of a folded tile: the odd steps, or low bytes.
    typename words<C>::narrow x[joined], other[joined];
    #pragma HLS ARRAY_PARTITION variable=x complete
    #pragma HLS ARRAY_PARTITION variable=other complete
    for (unsigned j = 0; j < joined; j++) {
        #pragma HLS UNROLL
        x[j] = cache.x[n - state.ahead][first_word_at + j];
        other[j] = C::folded && now.folded ? cache.x[n - state.ahead][other_word_at + j] : x[j];
    }
    for (unsigned j = 0; j < C::tile_in; j++) {
        #pragma HLS UNROLL
        for (unsigned s = 0; s < operands<C>::spans; s++) {
            #pragma HLS UNROLL
            const bool odd = C::folded && now.folded && s * C::span % T::second >= T::fold;
            step.x[s][j] = odd ? other[j / lanes].lane[j % lanes] : x[j / lanes].lane[j % lanes];
        }
    }
    step.small = sizeof(typename C::wt_t) == 1 && (C::packed || !now.gate);
    for (unsigned o = 0; o < C::tile_out; o++) {
        #pragma HLS UNROLL
        for (unsigned j = 0; j < C::tile_in; j++) {
            #pragma HLS UNROLL
            step.y[o][j] = tile.weight[state.side][weight * T::joined + j / T::lanes][o].lane[j % T::lanes];
        }
    }
    if (now.gate) {
        for (unsigned o = 0; o < C::gate_out; o++) {
            #pragma HLS UNROLL
            for (unsigned j = 0; j < C::tile_in; j++) {
                #pragma HLS UNROLL
                const unsigned word = weight * T::gate_joined + j / T::gate_lanes;
                const int16_t w = tile.gate[state.side][word][o].lane[j % T::gate_lanes];
                if (C::packed) { // the low byte, from 0 on, and the high one share a multiplier
                    step.y[2 * o][j] = w & 255;
                    step.y[2 * o + 1][j] = w >> 8;
                } else {
                    step.y[o][j] = w;
                }
            }
        }
    }
}

// The same step after the array: add the sums, and go on.
template <class C>
void linear_after(linear_state<C> &state, unsigned k, bool used, const long long sum[C::tile_out]) {
    #pragma HLS INLINE
    if (k >= state.passes)
        return;
    const bool first = state.i == 0, last = state.i + 1 == state.span;
    // The first step of the low bytes, which a folded tile adds in another row.
    const bool low = C::two_bytes && state.now.two && !state.now.folded && state.i == state.high;
    for (unsigned o = 0; o < C::tile_out; o++) {
        #pragma HLS UNROLL
        const sum_t before = first ? sum_t(0) : low ? sum_t(state.sum[o] * 256) : state.sum[o];
        long long added = sum[o];
        if (C::packed && state.now.gate && o < C::gate_out)
            added = sum[2 * o] + sum[2 * o + 1] * 256;
        state.sum[o] = used ? sum_t(before + added) : before;
        if (last)
            state.done[o] = state.sum[o];
    }
    if (last) {
        state.i = 0;
        state.n++;
        state.written = state.token;
    } else {
        state.i++;
    }
}

} // namespace vit
} // namespace nnet
#endif
