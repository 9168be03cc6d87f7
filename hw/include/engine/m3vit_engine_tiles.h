// The tiles of linear maps (m3vit_engine_linear.h): which follow one another, where their weights lie on chip, and how
// these are loaded.
#ifndef M3VIT_ENGINE_TILES_H_
#define M3VIT_ENGINE_TILES_H_

#include "m3vit_engine_array.h"

namespace nnet {
namespace vit {

// Through how many ports the inputs of a block are read: a step takes a word of each.
template <class C> struct input_ports {
    static const unsigned most = C::tile_in == words<C>::narrow_lanes ? 1 : 2;
};

// `outputs` rows of one linear map, for `count` tokens: token n is row base + n of src and dst, or, in a queue, the
// token at place first + n of it (gather: in src; mode to_queue: in dst). fresh: their inputs are not on chip yet.
// conv: row base + n is a pixel, and its inputs are those of its neighbours.
struct tile_job {
    bool valid, fresh;
    bool gate, gather, conv;
    bool two, writes_two; // the inputs have two bytes each; so have narrow results
    unsigned weights, params, n_in, outputs;
    unsigned half; // outputs of the first half, those whose weights and wide results pass through the first port
    bool folded; // each output is made by two rows of the array, one of the even steps of its inputs and one of the odd;
                 // or (two) one of the high bytes and one of the low ones
    unsigned base, first, count;
    unsigned ports; // through which inputs are read
    unsigned src, src_pitch, dst, dst_pitch;
    int mode, gelu_in, gelu_out, rescale;
};

inline unsigned first_half(const tile_job &job) {
    #pragma HLS INLINE
    return job.half < job.outputs ? job.half : job.outputs;
}

// Where the sequence of tiles stands: linear map `map` (for experts two for each active one), tokens from `base` on,
// output row `row`.
struct tile_place {
    unsigned map, base, row;
};

// Weights of two tiles, and for each output a bias (times 2^bias_shift) and how far its sum is shifted: one tile is filled
// while the other is worked on. The first port fills the rows below `second`, the other the rest.
template <class C> struct weight_tiles {
    static const unsigned lanes = words<C>::weights::lanes, gate_lanes = words<C>::gates::lanes;
    static const unsigned joined = C::tile_in / lanes, gate_joined = C::tile_in / gate_lanes; // words of a step
    static const unsigned unit = words<C>::narrow_lanes;                                      // results of a word
    static const unsigned second = (C::tile_out / unit + 1) / 2 * unit;
    static const unsigned fold = second / 2; // from an output's row to its other one
    static_assert(!C::folded || (C::tile_out == 4 * fold && fold % C::span == 0), "a span of outputs has the same inputs");
    typename words<C>::weights weight[2][C::max_in / lanes][C::tile_out];
    typename words<C>::gates gate[2][C::max_in / gate_lanes][C::gate_out];
    int bias[2][C::tile_out], bias_shift[2][C::tile_out], shift[2][C::tile_out];

    // Of so many outputs, those of the first port: half of their words.
    static unsigned half_of(unsigned outputs) {
        #pragma HLS INLINE
        return (words_of<unit>(outputs) + 1) / 2 * unit;
    }
    // The row of the array that makes output o of a tile.
    static unsigned row_of(const tile_job &job, unsigned o) {
        #pragma HLS INLINE
        return o < job.half ? o : o - job.half + second;
    }
};

template <class C> tile_job next_tile(tile_place &place, const linear_fields &I, const queues<C> &queue) {
    tile_job job;
    const bool experts = I.op == op_experts;
    job.gate = I.op == op_gate;
    const bool second = experts && (place.map & 1);
    job.valid = place.map < (experts ? 2 * queue.num_active : 1);
    if (!job.valid)
        return job;
    const unsigned e = experts ? queue.active[place.map >> 1] : 0;
    const unsigned n_out = second ? I.n_in : I.n_out; // of an expert: I.n_in channels -> I.n_out hidden -> I.n_in
    job.n_in = second ? I.n_out : I.n_in;
    const unsigned size = job.gate ? C::gate_out : C::tile_out;
    job.outputs = n_out - place.row < size ? n_out - place.row : size;
    job.half = job.gate ? job.outputs : weight_tiles<C>::half_of(job.outputs);
    job.weights = I.weights + place.row * job.n_in;
    job.params = I.params + row_words * place.row;
    job.gather = experts && !second;
    job.conv = I.op == op_conv;
    const unsigned tokens = experts ? queue.start[e + 1] - queue.start[e] : I.rows;
    job.base = place.base;
    job.first = experts ? queue.start[e] + place.base : 0;
    const unsigned blocks = (tokens + C::token_block - 1) / C::token_block, block = (tokens + blocks - 1) / blocks;
    job.count = tokens - place.base < block ? tokens - place.base : block;
    job.fresh = place.row == 0;
    // Inputs that are read come a word a port: there it would gain nothing.
    job.two = C::two_bytes && (second ? I.dst_low : I.src_low) > 0;
    job.writes_two = C::two_bytes && I.dst_low > 0;
    job.folded = C::folded && !job.fresh && !job.gate && job.half <= weight_tiles<C>::fold &&
                 (job.two || job.n_in / C::tile_in % 2 == 0);
    job.ports = job.conv ? 1 : input_ports<C>::most;
    job.src = I.src;
    job.src_pitch = I.src_pitch;
    // Where a row's results begin: of two bytes each twice as far.
    job.dst = I.dst + (job.writes_two && !experts ? 2 * place.row : place.row);
    job.dst_pitch = I.dst_pitch;
    job.mode = I.mode;
    job.gelu_in = second ? -1 : I.gelu_in;
    job.gelu_out = I.gelu_out;
    job.rescale = (int)I.rescale;
    if (experts) {
        job.weights += e * I.weights_step + (second ? I.n_in * I.n_out : 0);
        job.params += e * I.params_step + (second ? row_words * I.n_out : 0);
        if (second) {
            job.src = I.hidden;
            job.src_pitch = I.hidden_pitch;
        } else {
            job.dst = I.hidden + (job.writes_two ? 2 * place.row : place.row);
            job.dst_pitch = I.hidden_pitch;
            job.mode = to_narrow;
        }
    }
    place.row += size;
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

// Where the loading of a tile stands: word `w` of the row `row` of each port, and how many words of parameters have come.
struct tile_progress {
    unsigned rows, words, params, row, w, param; // rows: of the first port, which has the most
};

template <class C> tile_progress first_word(const tile_job &job) {
    tile_progress place;
    place.rows = !job.valid ? 0 : C::weight_ports == 2 && job.half < job.outputs ? job.half : job.outputs;
    place.words = !job.valid ? 0 : job.gate ? job.n_in / weight_tiles<C>::gate_lanes : job.n_in / weight_tiles<C>::lanes;
    place.params = job.valid ? words_of<words<C>::param_lanes>(row_words * job.outputs) : 0;
    place.row = place.w = place.param = 0;
    return place;
}

inline unsigned words_left(const tile_progress &place) {
    #pragma HLS INLINE
    const unsigned weights = place.rows * place.words;
    return weights > place.params ? weights : place.params;
}

// Put a word of weights into a row of a tile; both: and into the row that makes the same output.
template <class C>
void put_weights(weight_tiles<C> &tile, bool side, unsigned word, unsigned row, bool both,
                 const typename words<C>::weights &values) {
    #pragma HLS INLINE
    tile.weight[side][word][row] = values;
    if (C::folded && C::two_bytes && both)
        tile.weight[side][word][row + weight_tiles<C>::fold] = values;
}

// Load one word of weights through each port and one of parameters, if there are more.
template <class C>
void load_word(tile_progress &place, const tile_job &job, weight_tiles<C> &tile, bool side,
               typename ports<C>::weights weights, typename ports<C>::more_weights more_weights,
               typename ports<C>::gates gates, typename ports<C>::params params) {
    #pragma HLS INLINE
    typedef weight_tiles<C> T;
    static const unsigned lanes = words<C>::param_lanes, rows = lanes / row_words;
    if (place.row < place.rows) {
        const unsigned at = place.row * place.words + place.w, step = place.w / T::joined;
        const bool apart = job.folded && !job.two, both = job.folded && job.two; // steps of weights, for their row
        const unsigned word = apart ? step / 2 * T::joined + place.w % T::joined : place.w;
        const unsigned other = apart && step % 2 ? T::fold : 0;
        if (job.gate)
            tile.gate[side][place.w][place.row % C::gate_out] = gates[job.weights / T::gate_lanes + at];
        else
            put_weights<C>(tile, side, word, T::row_of(job, place.row) + other, both, weights[job.weights / T::lanes + at]);
        if (C::weight_ports == 2 && job.half + place.row < job.outputs)
            put_weights<C>(tile, side, word, T::second + place.row + other, both,
                           more_weights[job.weights / T::lanes + job.half * place.words + at]);
        if (++place.w == place.words) {
            place.w = 0;
            place.row++;
        }
    }
    if (place.param < place.params) {
        const typename words<C>::params values = params[job.params / lanes + place.param];
        for (unsigned r = 0; r < rows; r++) {
            #pragma HLS UNROLL
            const unsigned o = place.param * rows + r;
            const int32_t shifts = values.lane[row_words * r + 1];
            if (o < job.outputs) {
                const unsigned row = T::row_of(job, o);
                tile.bias[side][row] = values.lane[row_words * r];
                tile.bias_shift[side][row] = (shifts >> 8) & (bias_shift_limit - 1);
                tile.shift[side][row] = (shifts & 255) - shift_offset;
            }
        }
        place.param++;
    }
}

} // namespace vit
} // namespace nnet
#endif
