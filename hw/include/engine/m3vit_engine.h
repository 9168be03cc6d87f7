// What the engines of the time-multiplexed accelerator share: instructions, number formats, counters.
//
// One engine of each kind serves every layer. A program in DDR says what they do: a list of instructions of
// `instruction_words` 32-bit words, read one at a time by m3vit_accelerator.h. Opcodes, their fields and the constants of
// the arithmetic are in m3vit_isa.h. docs/hls.md describes memory, formats and program. Cycles of the
// engines (without the depth of pipelines and the latency of memory) and their bytes are in m3vit/hw/ops.py.
//
// Number formats. Narrow tensors (inputs of products) are C::act_bits wide, weights C::wt_t, both with a fraction
// chosen by calibration; wide tensors (the residual stream, router logits, outputs) are 32 bits; accumulators are
// exact. All rounding is half up, and everything saturates; C-simulation counts how often.
//
// C, the configuration of the hardware (firmware/parameters.h of a project), has
//   types      wt_t (int8_t or int16_t), act_t (int8_t or int16_t)
//   widths     act_bits
//   array      tile_in x tile_out multipliers of the linear engine, gate_out outputs a tile of the router's; token_block
//              tokens whose inputs are kept on chip
//   attention  query_block (tokens), max_head (head width)
//   buffers    max_in (inputs of a linear map), max_dim (channels of a LayerNorm), max_rows (tokens), max_experts, max_top
#ifndef M3VIT_ENGINE_H_
#define M3VIT_ENGINE_H_

#include <stdint.h>

#include "m3vit_integer.h"
#include "m3vit_isa.h"

// Vitis HLS gets accumulators of the width that they need; C-simulation machine integers, with the same values. Another
// compiler takes the first with -DM3VIT_AP_INT.
#if defined(__VITIS_HLS__) || defined(M3VIT_AP_INT)
#include "ap_int.h"
namespace nnet {
namespace vit {
typedef ap_int<accumulator_bits> sum_t; // of a DSP48; the exporter refuses what needs more
}
}
#else
namespace nnet {
namespace vit {
typedef long long sum_t;
}
}
#endif

namespace nnet {
namespace vit {

// Read the words of instruction `pc`; m3vit_isa.h takes the fields out of them.
inline void read_instruction(const int32_t *params, unsigned pc, int32_t w[instruction_words]) {
Fetch:
    for (int i = 0; i < instruction_words; i++) {
        #pragma HLS PIPELINE II=1
        w[i] = params[pc * instruction_words + i];
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

// x as a signed integer of BITS bits: beyond its range, the nearest end of it.
template <int BITS> inline long long saturate(long long x) {
    #pragma HLS INLINE
    const long long high = (1LL << (BITS - 1)) - 1;
    if (x > high || x < -high - 1) {
        M3VIT_COUNT(saturated, 1);
        return x > high ? high : -high - 1;
    }
    return x;
}

// GELU of a narrow x with `in` fractional bits, as a narrow value with `out` of them.
template <class C> inline long long gelu(long long x, int in, int out) {
    #pragma HLS INLINE
    return saturate<C::act_bits>(shift_round(gelu_raw(x, in), gelu_frac(in) - out));
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
