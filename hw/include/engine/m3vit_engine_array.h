// The one array of multipliers, for linear maps, routers, convolutions and attention: tile_in x tile_out products in a
// cycle, summed over tile_in. Outputs lie in spans of C::span; each span may have inputs of its own, so that attention
// works on several queries at once. Linear maps give all spans the same.
//
// With 8-bit weights and activations two products share a multiplier (C::packed; WP486): a value times
// first + 2^18 second. Sums of four such products hold the first sum in 18 signed bits, since |value * first| is at most
// 2^15 (softmax weights are at most 2^8, values at least -2^7); what is left of the rest is the second.
#ifndef M3VIT_ENGINE_ARRAY_H_
#define M3VIT_ENGINE_ARRAY_H_

#include "m3vit_engine.h"

namespace nnet {
namespace vit {

static const unsigned packed_bits = 18, packed_terms = 4;

// What one step multiplies. used: without it the products are not looked at.
template <class C> struct operands {
    static const unsigned spans = (C::tile_out + C::span - 1) / C::span;
    bool used;
    int x[spans][C::tile_in];           // narrow values, or softmax weights
    int16_t y[C::tile_out][C::tile_in]; // weights, keys or values
};

// Both sums of packed_terms products: x * (low + 2^packed_bits high), taken apart.
inline void packed_sums(const int x[packed_terms], const int16_t low[packed_terms], const int16_t high[packed_terms],
                        int sums[2]) {
    #pragma HLS INLINE
    #pragma HLS EXPRESSION_BALANCE off // a chain, which is the DSPs' cascade
    long long joined = 0;
    for (unsigned i = 0; i < packed_terms; i++) {
        #pragma HLS UNROLL
        const int pair = high[i] * (1 << packed_bits) + low[i];
        joined += (long long)x[i] * pair;
    }
    const int first = (int)(joined & ((1 << packed_bits) - 1));
    sums[0] = first - (first >> (packed_bits - 1) << packed_bits);
    sums[1] = (int)((joined - sums[0]) >> packed_bits);
}

// The sums of an output pair o, o + 1 over the inputs.
template <class C, bool PACKED> struct pair_of_sums;
template <class C> struct pair_of_sums<C, true> {
    static void get(const operands<C> &step, unsigned o, long long sum[]) {
        #pragma HLS INLINE
        sum[o] = sum[o + 1] = 0;
        for (unsigned i = 0; i < C::tile_in; i += packed_terms) {
            #pragma HLS UNROLL
            int sums[2];
            packed_sums(step.x[o / C::span] + i, step.y[o] + i, step.y[o + 1] + i, sums);
            sum[o] += sums[0];
            sum[o + 1] += sums[1];
        }
    }
};
template <class C> struct pair_of_sums<C, false> {
    static void get(const operands<C> &step, unsigned o, long long sum[]) {
        #pragma HLS INLINE
        for (unsigned p = o; p < o + 2; p++) {
            #pragma HLS UNROLL
            long long part = 0;
            for (unsigned i = 0; i < C::tile_in; i++) {
                #pragma HLS UNROLL
                part += (long long)step.x[p / C::span][i] * step.y[p][i];
            }
            sum[p] = part;
        }
    }
};

// All sums of a step.
template <class C> void multiply(const operands<C> &step, long long sum[C::tile_out]) {
    #pragma HLS INLINE
    for (unsigned o = 0; o < C::tile_out; o += 2) {
        #pragma HLS UNROLL
        pair_of_sums<C, C::packed>::get(step, o, sum);
    }
}

} // namespace vit
} // namespace nnet
#endif
