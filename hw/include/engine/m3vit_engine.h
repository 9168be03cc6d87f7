// What the engines of the time-multiplexed accelerator share: instructions, number formats, counters.
//
// One engine of each kind serves every layer. A program in DDR says what they do: a list of instructions of
// `instruction_words` 32-bit words, read one at a time by m3vit_accelerator.h. Opcodes, their fields and the constants of
// the arithmetic are in m3vit_isa.h. docs/hls.md describes memory, formats and program. Cycles of the
// engines (without the depth of pipelines and the latency of memory) and their bytes are in m3vit/hw/ops.py.
//
// Number formats. Narrow tensors (inputs of products) are C::act_bits wide, weights C::wt_t, both with a fraction
// chosen by calibration; wide tensors (the residual stream, router logits) are C::wide_bits wide, 32 or 16, outputs 32;
// accumulators are exact. All rounding is half up, and everything saturates; C-simulation counts how often.
//
// Memory is read and written in whole words: a port's type is a word of several values, and a loop moves one an
// iteration. So rows begin at words, inputs of products fill whole steps of tile_in (the exporter pads both, with weights
// of 0), tile_out is a multiple of the values in a word, and what a row's last word holds beyond the row is written as 0.
//
// C, the configuration of the hardware (firmware/parameters.h of a project), has
//   types      wt_t (int8_t or int16_t), act_t (int8_t or int16_t), wide_t (int32_t or int16_t)
//   widths     act_bits, wide_bits; packed: two products share a multiplier (both have 8 bits)
//   memory     port_bits: the width of a port; a word is what it moves in a cycle; weight_ports: 1, or 2 that weights are
//              read through; pixels: values of the image that are read at once
//   array      tile_in x tile_out products a cycle, gate_out outputs a tile of the router's; results: narrow ones of
//              linear maps in a cycle; token_block tokens whose inputs are kept on chip; folded: in tiles of few outputs
//              two rows of the array make one
//   attention  head: the most channels of a head, filled up to a power of two; span: outputs that share their inputs;
//              group: queries worked on at once, groups: so many of these are kept on chip; lanes: scores that are
//              rounded and weighed in a cycle, of one query or several; divided: values that are divided at once;
//              product_bits, context_bits: of the sums of a score, and of weighted values
//   two bytes  two_bytes: instructions may read and write narrow values of two bytes each (below; of act_bits 8 alone)
//   LayerNorm  norm_words: 1 or 2 words of a row a step
//   buffers    max_in (inputs of a linear map), max_cached (places of these on chip, of two bytes two), max_dim (channels of
//              a LayerNorm), max_rows (tokens), max_experts, max_top
#ifndef M3VIT_ENGINE_H_
#define M3VIT_ENGINE_H_

#include <stdint.h>

#include "m3vit_integer.h"
#include "m3vit_isa.h"
#include "m3vit_timed.h"

// Vitis HLS gets accumulators of the width that they need; C-simulation machine integers, with the same values. Another
// compiler takes the first with -DM3VIT_AP_INT. Likewise the products of the array: -DM3VIT_AS_SYNTHESISED takes them as
// Vitis HLS does (m3vit_engine_array.h).
#if defined(__SYNTHESIS__) || defined(__VITIS_HLS__) || defined(M3VIT_AP_INT)
#define M3VIT_AS_SYNTHESISED
#endif
#if defined(__VITIS_HLS__) || defined(M3VIT_AP_INT)
#include "ap_int.h"
namespace nnet {
namespace vit {
typedef ap_int<accumulator_bits> sum_t; // of a DSP48; the exporter refuses what needs more
template <unsigned BITS> struct sums {
    typedef ap_int<BITS> type;
};
}
}
#else
namespace nnet {
namespace vit {
typedef long long sum_t;
template <unsigned BITS> struct sums {
    typedef long long type;
};
}
}
#endif

namespace nnet {
namespace vit {

// What a port of BITS bits moves at once.
template <class T, unsigned BITS> struct word {
    static const unsigned lanes = BITS / (8 * sizeof(T));
    T lane[lanes];
};

// The words of each memory.
template <class C> struct words {
    typedef word<uint8_t, 8 * C::pixels> image;
    typedef word<typename C::wt_t, C::port_bits> weights;
    typedef word<int16_t, C::port_bits> gates;
    typedef word<typename C::act_t, C::port_bits> narrow;
    typedef word<typename C::wide_t, C::port_bits> wide;
    typedef word<int32_t, C::port_bits> params; // and outputs
    static const unsigned narrow_lanes = narrow::lanes, wide_lanes = wide::lanes, param_lanes = params::lanes;
};

// What the engines reach memory by: pointers, or, in timed C-simulation, objects.
template <class C> struct ports {
    typedef typename port<const typename words<C>::image, port_image>::type image;
    typedef typename port<const typename words<C>::weights, port_weights>::type weights;
    typedef typename port<const typename words<C>::weights, port_more_weights>::type more_weights;
    typedef typename port<const typename words<C>::gates, port_gates>::type gates;
    typedef typename port<const typename words<C>::params, port_params>::type params;
    typedef typename port<const typename words<C>::narrow, port_keys>::type keys;
    typedef typename port<const typename words<C>::narrow, port_narrow_in>::type narrow_in;
    typedef typename port<typename words<C>::narrow, port_narrow_out>::type narrow_out;
    typedef typename port<const typename words<C>::wide, port_wide_in>::type wide_in;
    typedef typename port<typename words<C>::wide, port_wide>::type wide;
    typedef typename port<const typename words<C>::wide, port_more_wide_in>::type more_wide_in;
    typedef typename port<typename words<C>::wide, port_more_wide>::type more_wide;
    typedef typename port<typename words<C>::params, port_output>::type output;
};

// How many words `count` values take.
template <unsigned LANES> inline unsigned words_of(unsigned count) {
    #pragma HLS INLINE
    return (count + LANES - 1) / LANES;
}

// Read the words of instruction `pc`; m3vit_isa.h takes the fields out of them.
template <class C>
void read_instruction(typename ports<C>::params params, unsigned pc, int32_t w[instruction_words]) {
    static const unsigned lanes = words<C>::param_lanes;
    pipelined<loop_engine_fetch, 1> fetch_loop;
Fetch:
    for (unsigned i = 0; i < instruction_words / lanes; i++) {
        #pragma HLS PIPELINE II=1
        fetch_loop.tick();
        const typename words<C>::params values = params[pc * (instruction_words / lanes) + i];
        for (unsigned j = 0; j < lanes; j++) {
            #pragma HLS UNROLL
            w[i * lanes + j] = values.lane[j];
        }
    }
}

// --- C-simulation only: traffic and saturation, by instruction -------------------------------------------------------

#ifndef __SYNTHESIS__
struct counters {
    unsigned long long saturated; // values that were beyond their format
    unsigned long long image, weights, gates, params, narrow_read, narrow_write, wide_read, wide_write, output; // bytes
    unsigned long long expert_loads;
};
inline counters *&current_counters() {
    static counters unused;
    static counters *current = &unused;
    return current;
}
#define M3VIT_COUNT(field, amount) (nnet::vit::current_counters()->field += (amount))
#else
#define M3VIT_COUNT(field, amount) ((void)0)
#endif

// x held from low to high; counted: where it is beyond, that is counted.
inline long long held(long long x, long long low, long long high, bool counted) {
    #pragma HLS INLINE
    if (x > high || x < low) {
        if (counted)
            M3VIT_COUNT(saturated, 1);
        return x > high ? high : low;
    }
    return x;
}

// x as a signed integer of BITS bits: beyond its range, the nearest end of it.
template <int BITS> inline long long saturate(long long x) {
    #pragma HLS INLINE
    return held(x, -(1LL << (BITS - 1)), (1LL << (BITS - 1)) - 1, true);
}

// How a narrow result is written: as one value, or (two) as 256 high + low, first a word of high bytes, then one of the
// low ones, for which results are made again. Both bytes are signed.
struct narrow_form {
    bool two, low;
};

// x as a narrow value. What is beyond is counted once.
template <class C> inline long long hold_narrow(long long x, const narrow_form &form) {
    #pragma HLS INLINE
    return C::two_bytes && form.two ? held(x, -(1LL << 15), two_bytes_most, !form.low) : saturate<C::act_bits>(x);
}

// GELU of a narrow x with `in` fractional bits, as a narrow value with `out` of them.
template <class C> inline long long gelu(long long x, int in, int out, const narrow_form &form) {
    #pragma HLS INLINE
    return hold_narrow<C>(shift_round(gelu_raw(x, in), gelu_frac(in) - out), form);
}

// What memory gets of a narrow value: itself, or one of its bytes.
template <class C> inline typename C::act_t stored(long long x, const narrow_form &form) {
    #pragma HLS INLINE
    const long long high = (x + 128) >> 8;
    return (typename C::act_t)(C::two_bytes && form.two ? (form.low ? x - high * 256 : high) : x);
}

// Step `w` of writing a row of narrow values, of which a word takes `joined` steps: the values are those of step `values`,
// in part `part` of word `word`. Of values of two bytes the steps of a word follow twice.
struct narrow_step {
    narrow_form form;
    unsigned values, part, word;
};
template <class C> inline narrow_step step_of(unsigned w, unsigned joined, bool two) {
    #pragma HLS INLINE
    narrow_step step;
    step.form.two = C::two_bytes && two;
    step.part = w % joined;
    step.word = w / joined;
    step.form.low = step.form.two && step.word % 2 == 1;
    step.values = step.form.two ? step.word / 2 * joined + step.part : w;
    return step;
}

// The tokens of each expert, expert after expert: on chip. They take max_rows * max_top entries however many experts
// there are; two words for each expert are all that grows with their number.
template <class C> struct queues {
    uint16_t token[C::max_rows * C::max_top];
    int weight[C::max_rows * C::max_top]; // prob_frac fractional bits
    unsigned start[C::max_experts + 1];
    uint16_t active[C::max_experts]; // experts with tokens, in ascending order
    unsigned num_active;
};

} // namespace vit
} // namespace nnet
#endif
