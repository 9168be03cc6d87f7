// The accelerator: fetches instruction after instruction and hands each to its engine.
//
// The task id is an argument (a register): instructions of other tasks are skipped, which changes the router's gates
// and the head, and how many experts a token has, nothing else. So is the instruction that a frame begins with: a
// budget has a program of its own, around the same weights. Nothing is kept from one frame to the next.
#ifndef M3VIT_ACCELERATOR_H_
#define M3VIT_ACCELERATOR_H_

#include "m3vit_engine_compute.h"
#include "m3vit_engine_norm.h"
#include "m3vit_engine_router.h"

namespace nnet {
namespace vit {

#ifndef __SYNTHESIS__
// C-simulation only: an array with counters for each instruction; null: not counted.
inline counters *&program_counters() {
    static counters *all = 0;
    return all;
}
#endif

// Each engine has one place where it is called, hence one instance in hardware.
// keys, narrow_in and narrow_out are the same memory, as are weights and more_weights; wide_in, wide, more_wide_in and
// more_wide too, by two ports, each of which reads and writes.
// An unknown task id is 0.
template <class C>
void run_program(typename ports<C>::image image, unsigned task, unsigned num_tasks, unsigned entry,
                 typename ports<C>::weights weights, typename ports<C>::more_weights more_weights,
                 typename ports<C>::gates gates, typename ports<C>::params params, typename ports<C>::keys keys, typename ports<C>::narrow_in narrow_in,
                 typename ports<C>::narrow_out narrow_out, typename ports<C>::wide_in wide_in,
                 typename ports<C>::wide wide, typename ports<C>::more_wide_in more_wide_in,
                 typename ports<C>::more_wide more_wide, typename ports<C>::output output) {
    static queues<C> queue;
    const int wanted = task < num_tasks ? (int)task : 0;
Program:
    for (unsigned pc = entry;; pc++) {
        #pragma HLS PIPELINE off
        int32_t w[instruction_words];
        #pragma HLS ARRAY_PARTITION variable=w complete
        begin_instruction(pc, pc == entry);
        read_instruction<C>(params, pc, w);
        if (w[opcode_word] == op_end)
            break;
#ifndef __SYNTHESIS__
        if (program_counters())
            current_counters() = program_counters() + pc;
#endif
        M3VIT_COUNT(params, instruction_words * 4);
        if (w[task_word] >= 0 && w[task_word] != wanted)
            continue;
        switch (w[opcode_word]) {
        case op_image:
            read_image<C>(image_of(w), image, narrow_out);
            break;
        case op_linear:
        case op_gate:
        case op_experts:
        case op_conv:
        case op_attention:
            compute<C>(w[opcode_word] == op_attention, linear_of(w), conv_of(w), attention_of(w), queue, weights,
                       more_weights, gates, params, keys, narrow_in, narrow_out, wide_in, wide, more_wide_in,
                       more_wide, output);
            break;
        case op_position:
            position<C>(position_of(w), params, wide_in, wide);
            break;
        case op_norm:
            layernorm<C>(norm_of(w), params, wide_in, more_wide_in, narrow_out, wide);
            break;
        default: // op_route
            route<C>(route_of(w), wide_in, queue);
        }
    }
}

} // namespace vit
} // namespace nnet
#endif
