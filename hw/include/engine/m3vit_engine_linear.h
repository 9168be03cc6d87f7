// The linear engine: one array of tile_in x tile_out multipliers for dense layers, experts, embedding and heads, and for
// the convolution of heads, whose inputs are gathered as they are read.
//
// Work is a sequence of tiles: `tile_out` outputs of one linear map, for up to token_block tokens. For experts the sequence
// runs through both maps of every expert that has tokens (computation reordering, M3ViT, arXiv 2210.14793, section 4).
// One loop does all that a tile asks for at the same time: it multiplies a token's inputs, tile_in a step; writes the
// results of the token before, a word a step; and loads the next tile, a word of weights a step, into the other of two
// buffers, so the first tile of the next expert is fetched during the last of this one.
// The inputs of a block of tokens are read from DDR while its first tile is multiplied, and kept on chip for the others;
// so inputs pass once, and weights once for each block (for most experts there is one).
// Cycles of a tile: (tokens + 1) times the longest of multiplying (n_in / tile_in, or the words of n_in if inputs are read)
// and writing (words of tile_out), or the words of the next tile if those are more.
#ifndef M3VIT_ENGINE_LINEAR_H_
#define M3VIT_ENGINE_LINEAR_H_

#include "m3vit_engine.h"

namespace nnet {
namespace vit {

// `outputs` rows of one linear map, for `count` tokens: token n is row base + n of src and dst, or, in a queue, the
// token at place first + n of it (gather: in src; mode to_queue: in dst). fresh: their inputs are not on chip yet.
// conv: row base + n is a pixel, and its inputs are those of its neighbours.
struct tile_job {
    bool valid, fresh;
    bool gather, conv;
    unsigned weights, params, n_in, outputs;
    unsigned base, first, count;
    unsigned src, src_pitch, dst, dst_pitch;
    int mode, gelu_in, gelu_out;
};

// Where the sequence of tiles stands: linear map `map` (for experts two for each active one), tokens from `base` on,
// output row `row`.
struct tile_place {
    unsigned map, base, row;
};

// TB: tokens in a block; 0: all in one, and none kept on chip.
template <class C, unsigned TO, unsigned TB>
tile_job next_tile(tile_place &place, const linear_fields &I, const queues<C> &queue) {
    tile_job job;
    const bool experts = I.op == op_experts;
    const bool second = experts && (place.map & 1);
    job.valid = place.map < (experts ? 2 * queue.num_active : 1);
    if (!job.valid)
        return job;
    const unsigned e = experts ? queue.active[place.map >> 1] : 0;
    const unsigned n_out = second ? I.n_in : I.n_out; // of an expert: I.n_in channels -> I.n_out hidden -> I.n_in
    job.n_in = second ? I.n_out : I.n_in;
    job.outputs = n_out - place.row < TO ? n_out - place.row : TO;
    job.weights = I.weights + place.row * job.n_in;
    job.params = I.params + row_words * place.row;
    job.gather = experts && !second;
    job.conv = I.op == op_conv;
    const unsigned tokens = experts ? queue.start[e + 1] - queue.start[e] : I.rows;
    job.base = place.base;
    job.first = experts ? queue.start[e] + place.base : 0;
    job.count = TB == 0 || tokens - place.base < TB ? tokens - place.base : TB;
    job.fresh = TB == 0 || place.row == 0;
    job.src = I.src;
    job.src_pitch = I.src_pitch;
    job.dst = I.dst + place.row;
    job.dst_pitch = I.dst_pitch;
    job.mode = I.mode;
    job.gelu_in = second ? -1 : I.gelu_in;
    job.gelu_out = I.gelu_out;
    if (experts) {
        job.weights += e * I.weights_step + (second ? I.n_in * I.n_out : 0);
        job.params += e * I.params_step + (second ? row_words * I.n_out : 0);
        if (second) {
            job.src = I.hidden;
            job.src_pitch = I.hidden_pitch;
        } else {
            job.dst = I.hidden + place.row;
            job.dst_pitch = I.hidden_pitch;
            job.mode = to_narrow;
        }
    }
    place.row += TO;
    if (place.row >= n_out) {
        place.row = 0;
        place.base += job.count;
        if (place.base >= tokens) {
            place.base = 0;
            place.map++;
        }
    }
    return job;
}

// Weights of two tiles, and for each output a bias (times 2^bias_shift) and how far its sum is shifted: one tile is filled
// while the other is worked on.
template <class C, class w_t, unsigned TO> struct weight_tiles {
    static const unsigned lanes = word<w_t, C::port_bits>::lanes;
    word<w_t, C::port_bits> weight[2][C::max_in / lanes][TO];
    int bias[2][TO], bias_shift[2][TO], shift[2][TO];
};

// Where the loading of a tile stands: word `w` of output `row`, and how many words of parameters have come.
struct tile_progress {
    unsigned rows, words, params, row, w, param;
};

template <class C, class w_t, unsigned TO> tile_progress first_word(const tile_job &job) {
    tile_progress place;
    place.rows = job.valid ? job.outputs : 0;
    place.words = job.valid ? job.n_in / weight_tiles<C, w_t, TO>::lanes : 0;
    place.params = job.valid ? words_of<words<C>::wide_lanes>(row_words * job.outputs) : 0;
    place.row = place.w = place.param = 0;
    return place;
}

inline unsigned words_left(const tile_progress &place) {
    #pragma HLS INLINE
    const unsigned weights = place.rows * place.words;
    return weights > place.params ? weights : place.params;
}

// Load one word of weights and one of parameters, if there are more. The rows of a tile are one run of addresses.
template <class C, class w_t, unsigned TO>
void load_word(tile_progress &place, const tile_job &job, weight_tiles<C, w_t, TO> &tile, bool side,
               const word<w_t, C::port_bits> *weights, const typename words<C>::wide *params) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::wide_lanes, rows = lanes / row_words;
    if (place.row < place.rows) {
        tile.weight[side][place.w][place.row] =
            weights[job.weights / weight_tiles<C, w_t, TO>::lanes + place.row * place.words + place.w];
        if (++place.w == place.words) {
            place.w = 0;
            place.row++;
        }
    }
    if (place.param < place.params) {
        const typename words<C>::wide values = params[job.params / lanes + place.param];
        for (unsigned r = 0; r < rows; r++) {
            #pragma HLS UNROLL
            const unsigned o = place.param * rows + r;
            const int32_t shifts = values.lane[row_words * r + 1];
            if (o < TO) {
                tile.bias[side][o] = values.lane[row_words * r];
                tile.bias_shift[side][o] = (shifts >> 8) & (bias_shift_limit - 1);
                tile.shift[side][o] = (shifts & 255) - shift_offset;
            }
        }
        place.param++;
    }
}

// The inputs of a block of tokens, in words. rows: 1 if none are kept.
template <class C, unsigned TB> struct token_cache {
    static const unsigned rows = TB == 0 ? 1 : TB;
    typename words<C>::narrow x[rows][C::max_in / words<C>::narrow_lanes];
};

// Where a token's inputs begin in src, and its results in dst; the router's weight (mode to_queue).
struct token_place {
    unsigned from, at;
    int score;
};

template <class C>
token_place place_of(const tile_job &job, const conv_fields &G, unsigned n, const queues<C> &queue) {
    #pragma HLS INLINE
    token_place place;
    const bool queued = job.gather || job.mode == to_queue;
    const unsigned token = queued ? queue.token[job.first + n] : job.base + n;
    place.from = job.src + (job.gather ? token : job.base + n) * job.src_pitch;
    const unsigned row = job.mode == to_queue ? token : job.base + n;
    const unsigned pixels = job.conv ? G.upscale * G.upscale : 1; // of a row of dst
    place.at = job.dst + row / pixels * job.dst_pitch + row % pixels * G.n_out * job.conv;
    place.score = job.mode == to_queue ? queue.weight[job.first + n] : 0;
    return place;
}

// Where the reading of one pixel's neighbours stands: word `w` of tap `tap`, of the pixel at (row, column).
struct tap_place {
    unsigned words, width, height, row, column, tap, w;
};

template <class C> tap_place first_tap(const tile_job &job, const conv_fields &G, unsigned n) {
    #pragma HLS INLINE
    const unsigned s = G.upscale, token = n / (s * s), pixel = n % (s * s);
    tap_place place;
    place.words = job.n_in / taps / words<C>::narrow_lanes;
    place.width = G.columns * s;
    place.height = G.rows / place.width;
    place.row = token / G.columns * s + pixel / s;
    place.column = token % G.columns * s + pixel % s;
    place.tap = place.w = 0;
    return place;
}

// The next word of the features of the 3 x 3 pixels around one, line by line, after ReLU; zeros outside the image. A
// token holds upscale^2 pixels, line by line, and tokens are G.columns side by side.
template <class C>
typename words<C>::narrow read_tap(tap_place &place, const tile_job &job, const conv_fields &G,
                                   const typename words<C>::narrow *narrow) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::narrow_lanes;
    const unsigned s = G.upscale;
    // From one line above and one column before on: below 0 wraps around to beyond the image.
    const unsigned y = place.row + place.tap / 3 - 1, x = place.column + place.tap % 3 - 1;
    const bool inside = y < place.height && x < place.width;
    typename words<C>::narrow values;
    if (inside) {
        const unsigned pixel = y % s * s + x % s;
        values = narrow[(job.src + (y / s * G.columns + x / s) * job.src_pitch) / lanes + pixel * place.words + place.w];
        M3VIT_COUNT(narrow_read, sizeof(values));
    }
    for (unsigned l = 0; l < lanes; l++) {
        #pragma HLS UNROLL
        values.lane[l] = inside && values.lane[l] > 0 ? values.lane[l] : 0;
    }
    if (++place.w == place.words) {
        place.w = 0;
        place.tap++;
    }
    return values;
}

// Bias and rounding of output o.
template <class C, class w_t, unsigned TO>
long long result_of(const weight_tiles<C, w_t, TO> &tile, bool side, unsigned o, const sum_t sum[TO]) {
    #pragma HLS INLINE
    return shift_round((long long)sum[o] + tile.bias[side][o] * (1LL << tile.bias_shift[side][o]), tile.shift[side][o]);
}

// Write word `w` of a token's results: activation, or what is in memory added, and to memory.
template <class C, class w_t, unsigned TO>
void write_word(const tile_job &job, const weight_tiles<C, w_t, TO> &tile, bool side, const sum_t sum[TO], unsigned w,
                const token_place &token, typename words<C>::narrow *narrow, const typename words<C>::wide *wide_in,
                typename words<C>::wide *wide, int32_t *output) {
    #pragma HLS INLINE
    static const unsigned narrow_lanes = words<C>::narrow_lanes, wide_lanes = words<C>::wide_lanes;
    if (job.mode == to_narrow) {
        typename words<C>::narrow values;
        for (unsigned l = 0; l < narrow_lanes; l++) {
            #pragma HLS UNROLL
            const unsigned o = w * narrow_lanes + l;
            values.lane[l] = 0;
            if (o < job.outputs) {
                const long long n = saturate<C::act_bits>(result_of<C>(tile, side, o, sum));
                values.lane[l] = (typename C::act_t)(job.gelu_in < 0 ? n : gelu<C>(n, job.gelu_in, job.gelu_out));
            }
        }
        narrow[token.at / narrow_lanes + w] = values;
    } else if (job.mode == to_output) { // rows of outputs are as the host reads them: a value a step
        output[token.at + w] = (int32_t)saturate<32>(result_of<C>(tile, side, w, sum));
    } else {
        const bool adds = job.mode != to_wide;
        typename words<C>::wide values;
        // No two tokens of a tile have the same row, so it may be read before the one before is written.
        if (adds)
            values = wide_in[token.at / wide_lanes + w];
        for (unsigned l = 0; l < wide_lanes; l++) {
            #pragma HLS UNROLL
            const unsigned o = w * wide_lanes + l;
            const long long before = adds ? values.lane[l] : 0;
            values.lane[l] = 0;
            if (o < job.outputs) {
                const long long y = result_of<C>(tile, side, o, sum);
                const long long added = job.mode == to_queue ? shift_round(saturate<32>(y) * token.score, prob_frac) : y;
                values.lane[l] = (int32_t)saturate<32>(before + added);
            }
        }
        wide[token.at / wide_lanes + w] = values;
    }
}

// All sums of one step of inputs: tile_in x TO products.
template <class C, class w_t, unsigned TO>
void multiply_step(const typename words<C>::narrow x[], const weight_tiles<C, w_t, TO> &tile, bool side, unsigned step,
                   sum_t sum[TO]) {
    #pragma HLS INLINE
    static const unsigned lanes = weight_tiles<C, w_t, TO>::lanes, narrow_lanes = words<C>::narrow_lanes;
    for (unsigned o = 0; o < TO; o++) {
        #pragma HLS UNROLL
        long long part = 0;
        for (unsigned i = 0; i < C::tile_in; i++) {
            #pragma HLS UNROLL
            part += (long long)x[i / narrow_lanes].lane[i % narrow_lanes] *
                    tile.weight[side][step * (C::tile_in / lanes) + i / lanes][o].lane[i % lanes];
        }
        sum[o] += part;
    }
}

// One tile, while the next is loaded.
template <class C, class w_t, unsigned TO, unsigned TB>
void compute_tile(const tile_job &now, const tile_job &next, const conv_fields &G, weight_tiles<C, w_t, TO> &tile,
                  bool side, const queues<C> &queue, token_cache<C, TB> &cache,
                  const word<w_t, C::port_bits> *weights, const typename words<C>::wide *params,
                  const typename words<C>::narrow *narrow_in, typename words<C>::narrow *narrow_out,
                  const typename words<C>::wide *wide_in, typename words<C>::wide *wide, int32_t *output) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::narrow_lanes, joined = C::tile_in / lanes; // words of a step
    sum_t sum[TO], done[TO]; // of the token that is multiplied, and of the one before, which is written
    #pragma HLS ARRAY_PARTITION variable=sum complete
    #pragma HLS ARRAY_PARTITION variable=done complete
    typename words<C>::narrow x[joined];
    #pragma HLS ARRAY_PARTITION variable=x complete
    const unsigned steps = now.fresh ? now.n_in / lanes : now.n_in / C::tile_in; // to read or to multiply
    const unsigned results = now.mode == to_output   ? now.outputs
                             : now.mode == to_narrow ? words_of<words<C>::narrow_lanes>(now.outputs)
                                                     : words_of<words<C>::wide_lanes>(now.outputs);
    const unsigned span = steps > results ? steps : results;
    tile_progress loading = first_word<C, w_t, TO>(next);
    const unsigned loads = words_left(loading), passes = (now.count + 1) * span;
    token_place place = {0, 0, 0}, written = {0, 0, 0};
    tap_place tap = {0, 0, 0, 0, 0, 0, 0};
    unsigned n = 0, i = 0;
Step:
    for (unsigned k = 0; k < (passes > loads ? passes : loads); k++) {
        #pragma HLS PIPELINE II=1
        #pragma HLS DEPENDENCE variable=tile.weight inter false
        #pragma HLS DEPENDENCE variable=cache.x inter false
        #pragma HLS DEPENDENCE variable=wide inter false
        if (k < loads)
            load_word<C, w_t, TO>(loading, next, tile, !side, weights, params);
        if (k < passes) {
            if (i == 0 && n < now.count) {
                place = place_of<C>(now, G, n, queue);
                if (now.conv)
                    tap = first_tap<C>(now, G, now.base + n);
            }
            if (n > 0 && i < results)
                write_word<C, w_t, TO>(now, tile, side, done, i, written, narrow_out, wide_in, wide, output);
            if (n < now.count && i < steps) {
                const unsigned kept = TB == 0 ? 0 : n, step = now.fresh ? i / joined : i;
                if (now.fresh) {
                    const typename words<C>::narrow values =
                        now.conv ? read_tap<C>(tap, now, G, narrow_in) : narrow_in[place.from / lanes + i];
                    cache.x[kept][i] = values;
                    x[i % joined] = values;
                } else {
                    for (unsigned j = 0; j < joined; j++) {
                        #pragma HLS UNROLL
                        x[j] = cache.x[kept][i * joined + j];
                    }
                }
                if (i == 0) {
                    for (unsigned o = 0; o < TO; o++) {
                        #pragma HLS UNROLL
                        sum[o] = 0;
                    }
                }
                if (!now.fresh || i % joined == joined - 1)
                    multiply_step<C, w_t, TO>(x, tile, side, step, sum);
            }
            if (++i == span) {
                i = 0;
                n++;
                written = place;
                for (unsigned o = 0; o < TO; o++) {
                    #pragma HLS UNROLL
                    done[o] = sum[o];
                }
            }
        }
    }
#ifndef __SYNTHESIS__
    if (now.fresh && !now.conv)
        M3VIT_COUNT(narrow_read, now.count * now.n_in * sizeof(typename C::act_t));
    if (now.mode == to_narrow)
        M3VIT_COUNT(narrow_write, now.count * results * sizeof(typename words<C>::narrow));
    else if (now.mode == to_output)
        M3VIT_COUNT(output, now.count * results * 4);
    else
        M3VIT_COUNT(wide_write, now.count * results * sizeof(typename words<C>::wide));
    if (now.mode == to_residual || now.mode == to_queue)
        M3VIT_COUNT(wide_read, now.count * results * sizeof(typename words<C>::wide));
#endif
}

template <class C, class w_t, unsigned TO, unsigned TB>
void linear(const linear_fields &I, const conv_fields &G, const queues<C> &queue,
            const word<w_t, C::port_bits> *weights, const typename words<C>::wide *params,
            const typename words<C>::narrow *narrow_in, typename words<C>::narrow *narrow_out,
            const typename words<C>::wide *wide_in, typename words<C>::wide *wide, int32_t *output) {
    #pragma HLS INLINE off
    static weight_tiles<C, w_t, TO> tile;
    static token_cache<C, TB> cache;
    // Several words of an output are read in a step, and one is written.
    #pragma HLS ARRAY_PARTITION variable=tile.weight dim=1 complete
    #pragma HLS ARRAY_PARTITION variable=tile.weight dim=2 cyclic factor=C::tile_in/weight_tiles<C,w_t,TO>::lanes
    #pragma HLS ARRAY_PARTITION variable=tile.weight dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=tile.bias complete dim=0
    #pragma HLS ARRAY_PARTITION variable=tile.bias_shift complete dim=0
    #pragma HLS ARRAY_PARTITION variable=tile.shift complete dim=0
    #pragma HLS ARRAY_PARTITION variable=cache.x dim=2 cyclic factor=C::tile_in/words<C>::narrow_lanes
#ifdef M3VIT_URAM
    #pragma HLS BIND_STORAGE variable=cache.x type=ram_s2p impl=uram
#endif
#ifdef M3VIT_TILES_IN_LUT
    #pragma HLS BIND_STORAGE variable=tile.weight type=ram_s2p impl=lutram
#endif
    tile_place place = {0, 0, 0};
    tile_job now = next_tile<C, TO, TB>(place, I, queue);
    tile_progress loading = first_word<C, w_t, TO>(now);
    const unsigned loads = words_left(loading);
First:
    for (unsigned k = 0; k < loads; k++) {
        #pragma HLS PIPELINE II=1
        load_word<C, w_t, TO>(loading, now, tile, 0, weights, params);
    }
    bool side = false;
Tile:
    while (now.valid) {
        #pragma HLS LOOP_TRIPCOUNT min=1 max=1024
        const tile_job next = next_tile<C, TO, TB>(place, I, queue);
        compute_tile<C, w_t, TO, TB>(now, next, G, tile, side, queue, cache, weights, params, narrow_in, narrow_out,
                                     wide_in, wide, output);
#ifndef __SYNTHESIS__
        M3VIT_COUNT(params, words_of<words<C>::wide_lanes>(row_words * now.outputs) * sizeof(typename words<C>::wide));
        if (I.op == op_gate)
            M3VIT_COUNT(gates, now.outputs * now.n_in * sizeof(w_t));
        else
            M3VIT_COUNT(weights, now.outputs * now.n_in * sizeof(w_t));
#endif
        side = !side;
        now = next;
    }
#ifndef __SYNTHESIS__
    if (I.op == op_experts)
        M3VIT_COUNT(expert_loads, queue.num_active);
#endif
}

} // namespace vit
} // namespace nnet
#endif
