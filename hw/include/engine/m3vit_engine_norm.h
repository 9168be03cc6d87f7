// Engines that pass over tokens once: patches of the image, position embedding, LayerNorm.
#ifndef M3VIT_ENGINE_NORM_H_
#define M3VIT_ENGINE_NORM_H_

#include "m3vit_engine.h"

namespace nnet {
namespace vit {

// Cut the image uint8 [rows p, columns p, 3] into patches in the order (y, x, colour); pixel - 128 fits 8 signed bits.
// Cycles: rows * n_in.
template <class C> void read_image(const image_fields &I, const uint8_t *image, typename C::act_t *narrow) {
    #pragma HLS INLINE off
    const unsigned p = I.patch, columns = I.columns, line = 3 * p * columns;
Patch:
    for (unsigned t = 0; t < I.rows; t++) {
        const unsigned corner = t / columns * p * line + t % columns * 3 * p;
        for (unsigned y = 0; y < p; y++) {
            for (unsigned x = 0; x < 3 * p; x++) {
                #pragma HLS PIPELINE II=1
                narrow[I.dst + t * I.dst_pitch + y * 3 * p + x] =
                    (typename C::act_t)((int)image[corner + y * line + x] - pixel_zero);
            }
        }
    }
    M3VIT_COUNT(image, I.rows * I.n_in);
    M3VIT_COUNT(narrow_write, I.rows * I.n_in * sizeof(typename C::act_t));
}

// The first `prefix` tokens become those of the table, the others get it added.
// Cycles: rows * n_out.
template <class C> void position(const position_fields &I, const int32_t *params, const int32_t *wide_in, int32_t *wide) {
    #pragma HLS INLINE off
Token:
    for (unsigned t = 0; t < I.rows; t++) {
        for (unsigned d = 0; d < I.n_out; d++) {
            #pragma HLS PIPELINE II=1
            const unsigned place = I.dst + t * I.dst_pitch + d;
            const long long before = t < I.prefix ? 0 : wide_in[place];
            wide[place] = (int32_t)saturate<32>(before + params[I.params + t * I.n_out + d]);
        }
    }
    M3VIT_COUNT(params, I.rows * I.n_out * 4);
    M3VIT_COUNT(wide_read, (I.rows - I.prefix) * I.n_out * 4);
    M3VIT_COUNT(wide_write, I.rows * I.n_out * 4);
}

template <class C> void read_wide(const int32_t *wide, unsigned offset, unsigned n, int x[C::max_dim]) {
    #pragma HLS INLINE off
Read:
    for (unsigned i = 0; i < n; i++) {
        #pragma HLS PIPELINE II=1
        x[i] = wide[offset + i];
    }
    M3VIT_COUNT(wide_read, n * 4);
}

// LayerNorm of one token without its affine part, y with norm_frac fractional bits.
//
// With S = sum x and d_i = n x_i - S, (x_i - mean) / sqrt(var + eps) is d_i sqrt(n) / sqrt(sum d^2 + n^3 eps). The
// d_i are first shifted so that the largest has 24 bits: sums of squares then fit 64 bits for any variance of 32-bit
// inputs. sqrt_dim: sqrt(n) * 2^16; eps: n^3 eps * 2^(2 fractional bits of x), at least 1.
template <class C>
void normalise_row(const int x[C::max_dim], unsigned n, int sqrt_dim, long long eps, int y[C::max_dim]) {
    #pragma HLS INLINE off
    long long d[C::max_dim];
    long long sum = 0;
Sum:
    for (unsigned i = 0; i < n; i++) {
        #pragma HLS PIPELINE II=1
        sum += x[i];
    }
    unsigned long long any = 1; // all bits that occur in a magnitude
Centre:
    for (unsigned i = 0; i < n; i++) {
        #pragma HLS PIPELINE II=1
        d[i] = (long long)x[i] * n - sum;
        any |= (unsigned long long)(d[i] < 0 ? -d[i] : d[i]);
    }
    const int exponent = normalise(any).exponent;
    const int drop = exponent > 23 ? exponent - 23 : 0;
    unsigned long long squares = drop < 32 ? (unsigned long long)eps >> (2 * drop) : 0;
Square:
    for (unsigned i = 0; i < n; i++) {
        #pragma HLS PIPELINE II=1
        d[i] = shift_round(d[i], drop);
        squares += (unsigned long long)(d[i] * d[i]);
    }
    const scaled inverse = rsqrt(squares);
    const long long factor = shift_round(inverse.mantissa * (long long)sqrt_dim, 16);
Scale:
    for (unsigned i = 0; i < n; i++) {
        #pragma HLS PIPELINE II=1
        y[i] = (int)shift_round(d[i] * factor, 20 + inverse.shift - norm_frac);
    }
}

// Affine part, rounding, and to memory. scale and bias: of each channel (a bias counts 2^bias_shift).
template <class C>
void write_norm(const norm_fields &I, unsigned row, const int y[C::max_dim], const int scale[C::max_dim],
                const int bias[C::max_dim], typename C::act_t *narrow, int32_t *wide) {
    #pragma HLS INLINE off
Write:
    for (unsigned i = 0; i < I.n_in; i++) {
        #pragma HLS PIPELINE II=1
        const unsigned place = I.dst + row * I.dst_pitch + i;
        const long long z = shift_round(y[i] * (long long)scale[i] + bias[i] * (1LL << I.bias_shift), I.shift);
        if (I.mode == to_narrow)
            narrow[place] = (typename C::act_t)saturate<C::act_bits>(z);
        else
            wide[place] = (int32_t)saturate<32>(z);
    }
#ifndef __SYNTHESIS__
    if (I.mode == to_narrow)
        M3VIT_COUNT(narrow_write, I.n_in * sizeof(typename C::act_t));
    else
        M3VIT_COUNT(wide_write, I.n_in * 4);
#endif
}

// params: scales, then biases.
// Cycles: 4 * n_in a token, rows overlapped.
template <class C>
void layernorm(const norm_fields &I, const int32_t *params, const int32_t *wide_in, typename C::act_t *narrow,
               int32_t *wide_out) {
    #pragma HLS INLINE off
    int scale[C::max_dim], bias[C::max_dim];
Load:
    for (unsigned i = 0; i < I.n_in; i++) {
        #pragma HLS PIPELINE II=2
        scale[i] = params[I.params + i];
        bias[i] = params[I.params + I.n_in + i];
    }
    M3VIT_COUNT(params, I.n_in * 8);
Token:
    for (unsigned t = 0; t < I.rows; t++) {
        #pragma HLS DATAFLOW
        int x[C::max_dim], y[C::max_dim];
        read_wide<C>(wide_in, I.src + t * I.src_pitch, I.n_in, x);
        normalise_row<C>(x, I.n_in, I.sqrt_dim, I.eps, y);
        write_norm<C>(I, t, y, scale, bias, narrow, wide_out);
    }
}

} // namespace vit
} // namespace nnet
#endif
