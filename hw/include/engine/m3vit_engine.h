// What the engines of the time-multiplexed accelerator share: instructions, number formats, counters.
//
// One engine of each kind serves every layer. A program in DDR says what they do: a list of instructions of
// `instruction_words` 32-bit words, read one at a time by m3vit_accelerator.h. docs/hls.md describes memory, formats
// and program.
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
//   attention  query_block, key_block (tokens), max_head (head width)
//   buffers    max_in (inputs of a linear map), max_dim (channels of a LayerNorm), max_rows (tokens), max_experts, max_top
#ifndef M3VIT_ENGINE_H_
#define M3VIT_ENGINE_H_

#include <stdint.h>

#include "m3vit_integer.h"

// Vitis HLS gets accumulators of the width that they need; C-simulation machine integers, with the same values. Another
// compiler takes the first with -DM3VIT_AP_INT.
#if defined(__VITIS_HLS__) || defined(M3VIT_AP_INT)
#include "ap_int.h"
namespace nnet {
namespace vit {
typedef ap_int<48> sum_t; // of a DSP48; the exporter refuses what needs more
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

enum opcode {
    op_end,
    op_image,     // pixels of the image, patch by patch, minus 128 -> narrow
    op_linear,    // narrow x weights -> any output mode
    op_gate,      // narrow x gates of one task -> wide: the router's logits
    op_position,  // wide: prefix tokens and position embedding
    op_norm,      // LayerNorm, wide -> narrow or wide
    op_attention, // narrow (q | k | v) -> narrow
    op_route,     // wide logits -> the token queues of the experts
    op_experts    // narrow, queues -> added to wide, expert by expert
};

enum output_mode {
    to_narrow,
    to_wide,
    to_residual, // added to what is there
    to_output,   // the accelerator's output port
    to_queue     // as to_residual, weighted by the router, for the tokens of a queue
};

static const int instruction_words = 24;
static const int score_frac = 12; // fractional bits of an attention score
static const int context_drop = 8; // bits of a context sum left out before its division

// Offsets and pitches are in elements of the memory they are in. A field that an opcode does not name is 0.
struct instruction {
    int op;
    int task; // only for this task id; -1: for all
    unsigned rows, n_in, n_out;
    unsigned src, src_pitch, dst, dst_pitch;
    unsigned weights, params;
    int mode;
    int gelu_in, gelu_out; // fractional bits before and after GELU; gelu_in < 0: no GELU
    int a0, a1, a2, a3, a4;
    long long constant;
};

inline instruction read_instruction(const int32_t *params, unsigned pc) {
    int32_t w[instruction_words];
Fetch:
    for (int i = 0; i < instruction_words; i++) {
        #pragma HLS PIPELINE II=1
        w[i] = params[pc * instruction_words + i];
    }
    instruction I;
    I.op = w[0];
    I.task = w[1];
    I.rows = w[2];
    I.n_in = w[3];
    I.n_out = w[4];
    I.src = w[5];
    I.src_pitch = w[6];
    I.dst = w[7];
    I.dst_pitch = w[8];
    I.weights = w[9];
    I.params = w[10];
    I.mode = w[11];
    I.gelu_in = w[12];
    I.gelu_out = w[13];
    I.a0 = w[14];
    I.a1 = w[15];
    I.a2 = w[16];
    I.a3 = w[17];
    I.a4 = w[18];
    I.constant = (long long)(uint32_t)w[19] | ((long long)w[20] << 32);
    return I;
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
