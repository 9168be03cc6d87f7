// Two products a multiplier, against products one by one: all pairs of weights with inputs equal in a sum (the largest
// sums there are), and a part of the patterns of ends and signs of all operands. That it holds for the others follows from
// the range: the low products of a sum stay within 2^17 - 1, the high ones are 2^18 apart.
#include <stdint.h>
#include <stdio.h>

#include "engine/m3vit_engine_array.h"

using namespace nnet::vit;

static long long different = 0, compared = 0;

static void compare(const int x[packed_terms], const int16_t low[packed_terms], const int16_t high[packed_terms]) {
    int sums[2], expected[2] = {0, 0};
    packed_sums(x, low, high, sums);
    for (unsigned i = 0; i < packed_terms; i++) {
        expected[0] += x[i] * low[i];
        expected[1] += x[i] * high[i];
    }
    different += sums[0] != expected[0] || sums[1] != expected[1];
    compared++;
}

int main() {
    // Narrow values, and softmax weights up to 2^8 (these with values of 8 bits, not with the low bytes of gates).
    const int inputs[] = {-128, -127, -1, 0, 1, 77, 127, 255, 256};
    for (int v = 0; v < 9; v++)
        for (int a = -128; a < (inputs[v] < 128 ? 256 : 128); a++) // beyond 127: the low byte of a gate
            for (int b = -128; b < 128; b++) {
                int x[packed_terms];
                int16_t low[packed_terms], high[packed_terms];
                for (unsigned i = 0; i < packed_terms; i++) {
                    x[i] = inputs[v];
                    low[i] = (int16_t)a;
                    high[i] = (int16_t)b;
                }
                compare(x, low, high);
            }
    const int ends[] = {-128, -1, 0, 127};
    for (int pattern = 0; pattern < 1 << 24; pattern += 7) { // an end for each of the 12 operands
        int x[packed_terms];
        int16_t low[packed_terms], high[packed_terms];
        for (unsigned i = 0; i < packed_terms; i++) {
            x[i] = ends[pattern >> (2 * i) & 3];
            low[i] = (int16_t)ends[pattern >> (8 + 2 * i) & 3];
            high[i] = (int16_t)ends[pattern >> (16 + 2 * i) & 3];
        }
        compare(x, low, high);
    }
    printf("%lld %lld\n", different, compared);
    return 0;
}
