// What runs on the array: linear maps (m3vit_engine_linear.h) and attention (m3vit_engine_attention.h). One loop serves
// both, so there is one array; they bring its operands and take its sums.
#ifndef M3VIT_ENGINE_COMPUTE_H_
#define M3VIT_ENGINE_COMPUTE_H_

#include "m3vit_engine_attention.h"
#include "m3vit_engine_linear.h"

namespace nnet {
namespace vit {

// Run an instruction that multiplies; of the fields, I and G are of linear maps, A of attention.
template <class C>
void compute(bool attends, const linear_fields &I, const conv_fields &G, const attention_fields &A, const queues<C> &queue,
             typename ports<C>::weights weights, typename ports<C>::more_weights more_weights,
             typename ports<C>::gates gates, typename ports<C>::params params, typename ports<C>::keys keys,
             typename ports<C>::narrow_in narrow_in, typename ports<C>::narrow_out narrow_out,
             typename ports<C>::wide_in wide_in, typename ports<C>::wide wide,
             typename ports<C>::more_wide_in more_wide_in, typename ports<C>::more_wide more_wide,
             typename ports<C>::output output) {
    #pragma HLS INLINE off
    static weight_tiles<C> tile;
    static token_cache<C> cache;
    static attention_buffers<C> buffer;
    // A step of the array reads all outputs and tile_in inputs; one word is written.
    #pragma HLS ARRAY_PARTITION variable=tile.weight dim=2 cyclic factor=weight_tiles<C>::joined
    #pragma HLS ARRAY_PARTITION variable=tile.weight dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=tile.gate dim=2 cyclic factor=weight_tiles<C>::gate_joined
    #pragma HLS ARRAY_PARTITION variable=tile.gate dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=tile.bias complete dim=0
    #pragma HLS ARRAY_PARTITION variable=tile.bias_shift complete dim=0
    #pragma HLS ARRAY_PARTITION variable=tile.shift complete dim=0
    // Each port writes tokens of its own in the same step: even or odd ones, which lie apart.
    #pragma HLS ARRAY_PARTITION variable=cache.x dim=1 cyclic factor=input_ports<C>::most
    // Of a folded tile an even and an odd step are read at once.
    #pragma HLS ARRAY_PARTITION variable=cache.x dim=2 cyclic factor=linear_state<C>::banks
    // Keys: as many as there are outputs, tile_in channels; values: tile_in keys, as many channels as there are outputs.
    #pragma HLS ARRAY_PARTITION variable=buffer.k dim=2 cyclic factor=attention_sizes<C>::keys
    #pragma HLS ARRAY_PARTITION variable=buffer.k dim=3 cyclic factor=C::tile_in
    #pragma HLS ARRAY_PARTITION variable=buffer.v dim=2 cyclic factor=attention_sizes<C>::channels
    #pragma HLS ARRAY_PARTITION variable=buffer.v dim=3 cyclic factor=C::tile_in
    #pragma HLS ARRAY_PARTITION variable=buffer.q dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.q dim=4 cyclic factor=C::tile_in
    #pragma HLS ARRAY_PARTITION variable=buffer.product dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.product dim=4 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.score dim=3 cyclic factor=softmax_lanes<C>::queries
    #pragma HLS ARRAY_PARTITION variable=buffer.score dim=4 cyclic factor=softmax_lanes<C>::scores
    #pragma HLS ARRAY_PARTITION variable=buffer.best dim=3 cyclic factor=softmax_lanes<C>::queries
    #pragma HLS ARRAY_PARTITION variable=buffer.top dim=2 cyclic factor=softmax_lanes<C>::queries
    #pragma HLS ARRAY_PARTITION variable=buffer.total dim=2 cyclic factor=softmax_lanes<C>::queries
    #pragma HLS ARRAY_PARTITION variable=buffer.divisor dim=2 cyclic factor=softmax_lanes<C>::queries
    #pragma HLS ARRAY_PARTITION variable=buffer.weight dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.weight dim=4 cyclic factor=softmax_lanes<C>::scores
    #pragma HLS ARRAY_PARTITION variable=buffer.carried dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.carried dim=4 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.context dim=2 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.context dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.finished dim=2 complete
    #pragma HLS ARRAY_PARTITION variable=buffer.finished dim=3 complete
    #pragma HLS BIND_STORAGE variable=buffer.k type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=buffer.v type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=buffer.q type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=buffer.product type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=buffer.weight type=ram_s2p impl=lutram
    #pragma HLS BIND_STORAGE variable=buffer.carried type=ram_s2p impl=lutram
#ifdef M3VIT_FINISHED_IN_URAM
    #pragma HLS BIND_STORAGE variable=buffer.finished type=ram_s2p impl=uram
#endif
#ifdef M3VIT_URAM
    #pragma HLS BIND_STORAGE variable=cache.x type=ram_s2p impl=uram
#endif
#ifdef M3VIT_TILES_IN_LUT
    #pragma HLS BIND_STORAGE variable=tile.weight type=ram_s2p impl=lutram
#else
    #pragma HLS BIND_STORAGE variable=tile.weight type=ram_s2p impl=bram
#endif
#ifdef M3VIT_GATES_IN_LUT
    #pragma HLS BIND_STORAGE variable=tile.gate type=ram_s2p impl=lutram
#else
    #pragma HLS BIND_STORAGE variable=tile.gate type=ram_s2p impl=bram
#endif
    linear_state<C> linear;
    attention_state<C> attention;
    #pragma HLS ARRAY_PARTITION variable=linear.found complete dim=0
    #pragma HLS ARRAY_PARTITION variable=linear.gathered.lane complete
    #pragma HLS ARRAY_PARTITION variable=linear.tap.above complete
    #pragma HLS ARRAY_PARTITION variable=linear.tap.zero complete
    #pragma HLS ARRAY_PARTITION variable=linear.sum complete
    #pragma HLS ARRAY_PARTITION variable=linear.done complete
    #pragma HLS ARRAY_PARTITION variable=attention.stage complete
    #pragma HLS ARRAY_PARTITION variable=attention.written.lane complete
    #pragma HLS ARRAY_PARTITION variable=attention.score_sum complete
    #pragma HLS ARRAY_PARTITION variable=attention.value_sum complete
    #pragma HLS ARRAY_PARTITION variable=attention.best complete
    #pragma HLS ARRAY_PARTITION variable=attention.top complete
    #pragma HLS ARRAY_PARTITION variable=attention.total complete
    if (attends)
        begin_attention<C>(attention, A, buffer);
    else
        begin_linear<C>(linear, I, queue, tile, weights, more_weights, gates, params);
    unsigned steps = attends ? next_attention<C>(attention, A, buffer, keys, narrow_in) : next_linear<C>(linear, I, queue);
Work:
    while (steps > 0) {
        #pragma HLS LOOP_TRIPCOUNT min=1 max=1024
        pipelined<loop_compute_step, 1> step_loop;
    Step:
        for (unsigned k = 0; k < steps; k++) {
            #pragma HLS PIPELINE II=1
            step_loop.tick();
            // What is written is read at the earliest in the next tile, or a round later.
            #pragma HLS DEPENDENCE variable=tile.weight inter false
            #pragma HLS DEPENDENCE variable=tile.gate inter false
            #pragma HLS DEPENDENCE variable=cache.x inter false
            #pragma HLS DEPENDENCE variable=wide inter false
            #pragma HLS DEPENDENCE variable=more_wide inter false
            #pragma HLS DEPENDENCE variable=buffer.k inter false
            #pragma HLS DEPENDENCE variable=buffer.v inter false
            #pragma HLS DEPENDENCE variable=buffer.q inter false
            #pragma HLS DEPENDENCE variable=buffer.finished inter false
            #pragma HLS DEPENDENCE variable=buffer.divisor inter false
            #pragma HLS DEPENDENCE variable=buffer.product inter false
            #pragma HLS DEPENDENCE variable=buffer.score inter false
            #pragma HLS DEPENDENCE variable=buffer.best inter false
            #pragma HLS DEPENDENCE variable=buffer.weight inter false
            #pragma HLS DEPENDENCE variable=buffer.carried inter false
            #pragma HLS DEPENDENCE variable=buffer.context inter false
            #pragma HLS DEPENDENCE variable=buffer.total inter false
            #pragma HLS DEPENDENCE variable=buffer.top inter false
            operands<C> step;
            #pragma HLS ARRAY_PARTITION variable=step.x complete dim=0
            #pragma HLS ARRAY_PARTITION variable=step.y complete dim=0
            long long sum[C::tile_out];
            #pragma HLS ARRAY_PARTITION variable=sum complete
            array_turn turn = {false, false, false, false, 0, 0, 0};
            if (attends)
                turn = attention_before<C>(attention, A, buffer, keys, narrow_in, narrow_out, step);
            else
                linear_before<C>(linear, k, G, queue, tile, cache, step, weights, more_weights, gates, params, keys,
                                 narrow_in, narrow_out, wide_in, wide, more_wide_in, more_wide, output);
            if (step.used)
                multiply<C>(step, sum);
            if (attends)
                attention_after<C>(attention, A, buffer, turn, sum);
            else
                linear_after<C>(linear, k, step.used, sum);
        }
        if (attends) {
            steps = next_attention<C>(attention, A, buffer, keys, narrow_in);
        } else {
            end_tile<C>(linear);
            steps = next_linear<C>(linear, I, queue);
        }
    }
#ifndef __SYNTHESIS__
    if (!attends && I.op == op_experts)
        M3VIT_COUNT(expert_loads, queue.num_active);
#endif
}

} // namespace vit
} // namespace nnet
#endif
