// The linear engine: one array of tile_in x tile_out multipliers for dense layers, experts, embedding and heads, and for
// the convolution of heads, whose inputs are gathered as they are read.
//
// Work is a sequence of tiles: `tile_out` outputs of one linear map, for up to token_block tokens. While the array works on
// one tile, the weights of the next are loaded into the other of two buffers (ping and pong). For experts the sequence
// runs through both maps of every expert that has tokens (computation reordering, M3ViT, arXiv 2210.14793, section 4), so
// the first tile of the next expert is fetched during the last of this one.
// The inputs of a block of tokens are read from DDR with its first tile and kept on chip for the others; so inputs pass
// once, and weights once for each block (for most experts there is one).
// Cycles: loops over memory move one value an iteration. A tile of n tokens takes n times the slowest of reading (n_in, with
// the first tile), multiplying (n_in / tile_in) and writing (tile_out), beside loading the next, tile_out * (n_in + 2).
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

// Weights of a tile, and for each of its outputs a bias (times 2^bias_shift) and how far its sum is shifted.
template <class C, class w_t, unsigned TO> struct weight_tile {
    w_t weight[C::max_in / C::tile_in][TO][C::tile_in];
    int bias[TO], bias_shift[TO], shift[TO];
};

template <class C, class w_t, unsigned TO>
void load_tile(const tile_job &job, weight_tile<C, w_t, TO> &tile, const w_t *weights, const int32_t *params) {
    #pragma HLS INLINE off
    if (!job.valid)
        return;
    const unsigned padded = (job.n_in + C::tile_in - 1) / C::tile_in * C::tile_in;
    unsigned row = 0, column = 0;
Weight:
    for (unsigned k = 0; k < job.outputs * job.n_in; k++) { // the rows of a tile are one run of addresses
        #pragma HLS PIPELINE II=1
        tile.weight[column / C::tile_in][row][column % C::tile_in] = weights[job.weights + k];
        if (++column == job.n_in) {
            column = 0;
            row++;
        }
    }
Pad:
    for (unsigned o = 0; o < job.outputs; o++) {
        for (unsigned i = job.n_in; i < padded; i++) {
            #pragma HLS PIPELINE II=1
            tile.weight[i / C::tile_in][o][i % C::tile_in] = 0;
        }
    }
Parameter:
    for (unsigned o = 0; o < job.outputs; o++) {
        #pragma HLS PIPELINE II=2
        const int32_t shifts = params[job.params + row_words * o + 1];
        tile.bias[o] = params[job.params + row_words * o];
        tile.bias_shift[o] = (shifts >> 8) & (bias_shift_limit - 1);
        tile.shift[o] = (shifts & 255) - shift_offset;
    }
    M3VIT_COUNT(params, job.outputs * 8);
}

// What one token's results need: where their row of dst begins, and the router's weight (mode to_queue).
struct token_place {
    unsigned at;
    int score;
};

// The inputs of a block of tokens. rows: 1 if none are kept.
template <class C, unsigned TB> struct token_cache {
    static const unsigned rows = TB == 0 ? 1 : TB;
    typename C::act_t x[rows][C::max_in];
};

// The features of the 3 x 3 pixels around pixel `n`, line by line, after ReLU; zeros outside the image. A token holds
// upscale^2 pixels, line by line, and tokens are G.columns side by side.
// Cycles: n_in.
template <class C>
void read_neighbours(const tile_job &job, const conv_fields &G, unsigned n, const typename C::act_t *narrow,
                     typename C::act_t x[C::max_in]) {
    #pragma HLS INLINE
    const unsigned s = G.upscale, features = job.n_in / taps;
    const unsigned width = G.columns * s, height = G.rows / width;
    const unsigned token = n / (s * s), pixel = n % (s * s);
    const unsigned row = token / G.columns * s + pixel / s, column = token % G.columns * s + pixel % s;
    unsigned i = 0;
Tap:
    for (unsigned tap = 0; tap < taps; tap++) {
        // From one line above and one column before on: below 0 wraps around to beyond the image.
        const unsigned y = row + tap / 3 - 1, v = column + tap % 3 - 1;
        const bool inside = y < height && v < width;
        const unsigned from = (y / s * G.columns + v / s) * job.src_pitch + (y % s * s + v % s) * features;
    Feature:
        for (unsigned f = 0; f < features; f++) {
            #pragma HLS PIPELINE II=1
            const typename C::act_t value = inside ? narrow[job.src + from + f] : 0;
            x[i++] = value > 0 ? value : 0;
        }
        if (inside)
            M3VIT_COUNT(narrow_read, features * sizeof(typename C::act_t));
    }
}

// The input of token n of a job, padded with zeros to whole tiles, and the place of its results (for both its readers).
template <class C, unsigned TB>
void read_token(const tile_job &job, const conv_fields &G, unsigned n, const queues<C> &queue,
                const typename C::act_t *narrow,
                token_cache<C, TB> &cache, typename C::act_t x[C::max_in], token_place &read_place,
                token_place &write_place) {
    #pragma HLS INLINE off
    token_place place;
    const bool queued = job.gather || job.mode == to_queue;
    const unsigned token = queued ? queue.token[job.first + n] : job.base + n;
    const unsigned offset = job.src + (job.gather ? token : job.base + n) * job.src_pitch;
    const unsigned kept = TB == 0 ? 0 : n;
    const unsigned row = job.mode == to_queue ? token : job.base + n;
    const unsigned pixels = job.conv ? G.upscale * G.upscale : 1; // of a row of dst
    place.at = job.dst + row / pixels * job.dst_pitch + row % pixels * G.n_out;
    place.score = job.mode == to_queue ? queue.weight[job.first + n] : 0;
    read_place = place;
    write_place = place;
    const unsigned padded = (job.n_in + C::tile_in - 1) / C::tile_in * C::tile_in;
    if (job.fresh) {
        if (job.conv) {
            read_neighbours<C>(job, G, row, narrow, cache.x[kept]);
        } else {
        Read:
            for (unsigned i = 0; i < job.n_in; i++) {
                #pragma HLS PIPELINE II=1
                cache.x[kept][i] = narrow[offset + i];
            }
            M3VIT_COUNT(narrow_read, job.n_in * sizeof(typename C::act_t));
        }
    Pad:
        for (unsigned i = job.n_in; i < padded; i++) {
            #pragma HLS PIPELINE II=1
            cache.x[kept][i] = 0;
        }
    }
Copy:
    for (unsigned i = 0; i < padded; i += C::tile_in) {
        #pragma HLS PIPELINE II=1
        for (unsigned j = 0; j < C::tile_in; j++) {
            #pragma HLS UNROLL
            x[i + j] = cache.x[kept][i + j];
        }
    }
}

// All sums of a tile for one token, exact: tile_in x TO products a cycle.
template <class C, class w_t, unsigned TO>
void multiply(const typename C::act_t x[C::max_in], const weight_tile<C, w_t, TO> &tile, unsigned n_in,
              sum_t sum[TO]) {
    #pragma HLS INLINE off
Clear:
    for (unsigned o = 0; o < TO; o++) {
        #pragma HLS UNROLL
        sum[o] = 0;
    }
Step:
    for (unsigned i = 0; i < n_in; i += C::tile_in) {
        #pragma HLS PIPELINE II=1
        for (unsigned o = 0; o < TO; o++) {
            #pragma HLS UNROLL
            const w_t *w = tile.weight[i / C::tile_in][o];
            long long part = 0;
            for (unsigned j = 0; j < C::tile_in; j++) {
                #pragma HLS UNROLL
                part += (long long)x[i + j] * w[j];
            }
            sum[o] += part;
        }
    }
}

// What results are added to: a row of wide memory. No two tokens of a tile have the same row, so it may be read before
// the one before is written.
template <class C, unsigned TO>
void read_before(const tile_job &job, const token_place &token, const int32_t *wide, int32_t before[TO]) {
    #pragma HLS INLINE off
    if (job.mode != to_residual && job.mode != to_queue)
        return;
    const unsigned place = token.at;
Before:
    for (unsigned o = 0; o < job.outputs; o++) {
        #pragma HLS PIPELINE II=1
        before[o] = wide[place + o];
    }
    M3VIT_COUNT(wide_read, job.outputs * 4);
}

// Bias, rounding, activation, and to memory.
template <class C, class w_t, unsigned TO>
void write_row(const tile_job &job, const weight_tile<C, w_t, TO> &tile, const sum_t sum[TO],
               const int32_t before[TO], const token_place &token, typename C::act_t *narrow, int32_t *wide,
               int32_t *output) {
    #pragma HLS INLINE off
    const unsigned place = token.at;
Write:
    for (unsigned o = 0; o < job.outputs; o++) {
        #pragma HLS PIPELINE II=1
        const long long y = shift_round((long long)sum[o] + tile.bias[o] * (1LL << tile.bias_shift[o]), tile.shift[o]);
        if (job.mode == to_narrow) {
            const long long n = saturate<C::act_bits>(y);
            narrow[place + o] = (typename C::act_t)(job.gelu_in < 0 ? n : gelu<C>(n, job.gelu_in, job.gelu_out));
        } else if (job.mode == to_output) {
            output[place + o] = (int32_t)saturate<32>(y);
        } else if (job.mode == to_wide) {
            wide[place + o] = (int32_t)saturate<32>(y);
        } else {
            const long long added = job.mode == to_queue ? shift_round(saturate<32>(y) * token.score, prob_frac) : y;
            wide[place + o] = (int32_t)saturate<32>(before[o] + added);
        }
    }
#ifndef __SYNTHESIS__
    if (job.mode == to_narrow)
        M3VIT_COUNT(narrow_write, job.outputs * sizeof(typename C::act_t));
    else if (job.mode == to_output)
        M3VIT_COUNT(output, job.outputs * 4);
    else
        M3VIT_COUNT(wide_write, job.outputs * 4);
#endif
}

template <class C, class w_t, unsigned TO, unsigned TB>
void compute_tile(const tile_job &job, const conv_fields &G, const weight_tile<C, w_t, TO> &tile,
                  const queues<C> &queue, token_cache<C, TB> &cache, const typename C::act_t *narrow_in, typename C::act_t *narrow_out,
                  const int32_t *wide_in, int32_t *wide, int32_t *output) {
    #pragma HLS INLINE off
Token:
    for (unsigned n = 0; n < job.count; n++) {
        #pragma HLS DATAFLOW
        typename C::act_t x[C::max_in];
        sum_t sum[TO];
        #pragma HLS ARRAY_PARTITION variable=x cyclic factor=C::tile_in
        #pragma HLS ARRAY_PARTITION variable=sum complete
        int32_t before[TO];
        token_place read_place, write_place;
        read_token<C, TB>(job, G, n, queue, narrow_in, cache, x, read_place, write_place);
        read_before<C, TO>(job, read_place, wide_in, before);
        multiply<C, w_t, TO>(x, tile, job.n_in, sum);
        write_row<C, w_t, TO>(job, tile, sum, before, write_place, narrow_out, wide, output);
    }
}

// The two run at the same time: they share no buffer.
template <class C, class w_t, unsigned TO, unsigned TB>
void load_and_compute(const tile_job &next, weight_tile<C, w_t, TO> &filled, const w_t *weights, const int32_t *params,
                      const tile_job &now, const conv_fields &G, const weight_tile<C, w_t, TO> &used,
                      const queues<C> &queue,
                      token_cache<C, TB> &cache, const typename C::act_t *narrow_in, typename C::act_t *narrow_out,
                      const int32_t *wide_in, int32_t *wide, int32_t *output) {
    #pragma HLS INLINE off
    #pragma HLS DATAFLOW
    load_tile<C, w_t, TO>(next, filled, weights, params);
    compute_tile<C, w_t, TO, TB>(now, G, used, queue, cache, narrow_in, narrow_out, wide_in, wide, output);
}

template <class C, class w_t, unsigned TO, unsigned TB>
void linear(const linear_fields &I, const conv_fields &G, const queues<C> &queue, const w_t *weights,
            const int32_t *params, const typename C::act_t *narrow_in, typename C::act_t *narrow_out,
            const int32_t *wide_in, int32_t *wide, int32_t *output) {
    #pragma HLS INLINE off
    // One array for both calls below: it is the buffers that take turns.
    #pragma HLS ALLOCATION function instances=load_and_compute<C, w_t, TO, TB> limit=1
    static weight_tile<C, w_t, TO> ping, pong;
    static token_cache<C, TB> cache;
    #pragma HLS ARRAY_RESHAPE variable=cache.x dim=2 cyclic factor=C::tile_in
#ifdef M3VIT_URAM
    #pragma HLS BIND_STORAGE variable=cache.x type=ram_s2p impl=uram
#endif
    #pragma HLS ARRAY_RESHAPE variable=ping.weight dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=ping.weight dim=3 complete
    #pragma HLS ARRAY_RESHAPE variable=pong.weight dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=pong.weight dim=3 complete
#ifdef M3VIT_TILES_IN_LUT
    #pragma HLS BIND_STORAGE variable=ping.weight type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=pong.weight type=ram_s2p impl=lutram
#endif
    tile_place place = {0, 0, 0};
    tile_job now = next_tile<C, TO, TB>(place, I, queue);
    load_tile<C, w_t, TO>(now, ping, weights, params);
    bool in_ping = true;
Tile:
    while (now.valid) {
        #pragma HLS LOOP_TRIPCOUNT min=1 max=1024
        const tile_job next = next_tile<C, TO, TB>(place, I, queue);
#ifndef __SYNTHESIS__
        if (I.op == op_gate)
            M3VIT_COUNT(gates, now.outputs * now.n_in * sizeof(w_t));
        else
            M3VIT_COUNT(weights, now.outputs * now.n_in * sizeof(w_t));
#endif
        if (in_ping)
            load_and_compute<C, w_t, TO, TB>(next, pong, weights, params, now, G, ping, queue, cache,
                                             narrow_in, narrow_out, wide_in, wide, output);
        else
            load_and_compute<C, w_t, TO, TB>(next, ping, weights, params, now, G, pong, queue, cache,
                                             narrow_in, narrow_out, wide_in, wide, output);
        in_ping = !in_ping;
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
