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

// What one step multiplies. used: without it the products are not looked at. small: products have at most 26 bits, which
// only C-simulation reads.
template <class C> struct operands {
    static const unsigned spans = (C::tile_out + C::span - 1) / C::span;
    bool used, small;
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
#ifdef M3VIT_AS_SYNTHESISED
template <class C> void multiply(const operands<C> &step, long long sum[C::tile_out]) {
    #pragma HLS INLINE
    for (unsigned o = 0; o < C::tile_out; o += 2) {
        #pragma HLS UNROLL
        pair_of_sums<C, C::packed>::get(step, o, sum);
    }
}
#else
// One sum of C-simulation, by the vectors of processors: products of 16 bits, sums of 32.
template <unsigned COUNT> inline int sum_of_products(const int16_t x[COUNT], const int16_t y[COUNT]) {
    int sum = 0;
#ifdef __GNUC__
#pragma GCC unroll 1 // unrolled, it is not turned into vectors
#endif
    for (unsigned i = 0; i < COUNT; i++)
        sum += x[i] * y[i];
    return sum;
}

// C-simulation: the same sums. Where they may exceed 32 bits, inputs are taken in two parts.
template <class C> void multiply(const operands<C> &step, long long sum[C::tile_out]) {
    static const int low_bits = 9; // the rest of an input, 17 bits and a sign at most, has no more
    static_assert(C::tile_in <= 64, "64 products of 9 and 16 bits fit 32");
    for (unsigned s = 0; s < operands<C>::spans; s++) {
        const unsigned first = s * C::span, end = first + C::span < C::tile_out ? first + C::span : C::tile_out;
        int16_t x[C::tile_in], high[C::tile_in];
        for (unsigned i = 0; i < C::tile_in; i++) {
            x[i] = (int16_t)(step.small ? step.x[s][i] : step.x[s][i] & ((1 << low_bits) - 1));
            high[i] = (int16_t)(step.x[s][i] >> low_bits);
        }
        for (unsigned o = first; o < end; o++)
            sum[o] = sum_of_products<C::tile_in>(x, step.y[o]);
        if (step.small)
            continue;
        for (unsigned o = first; o < end; o++)
            sum[o] += sum_of_products<C::tile_in>(high, step.y[o]) * (1LL << low_bits);
    }
}
#endif

} // namespace vit
} // namespace nnet
#endif
