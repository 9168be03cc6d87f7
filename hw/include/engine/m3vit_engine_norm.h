// Engines that pass over tokens once: patches of the image, position embedding, LayerNorm.
#ifndef M3VIT_ENGINE_NORM_H_
#define M3VIT_ENGINE_NORM_H_

#include "m3vit_engine.h"

namespace nnet {
namespace vit {

// Cut the image uint8 [rows p, columns p, 3] into patches in the order (y, x, colour); pixel - 128 fits 8 signed bits.
// A line of a patch begins anywhere in a word of a port, so the image's moves C::pixels values, which divide such a line and
// a narrow word.
// Cycles: rows * n_in / C::pixels.
template <class C>
void read_image(const image_fields &I, typename ports<C>::image image, typename ports<C>::narrow_out narrow) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::narrow_lanes, joined = lanes / C::pixels;
    const unsigned columns = I.columns, across = 3 * I.patch / C::pixels, line = across * columns;
    typename words<C>::narrow values;
    #pragma HLS ARRAY_PARTITION variable=values.lane complete
    unsigned t = 0, column = 0, corner = 0, x = 0, y = 0, at = 0, l = 0, w = 0; // at: of line y
    pipelined<loop_norm_pixel, 1> pixel_loop;
Pixel:
    for (unsigned n = 0; n < I.rows * (I.n_in / C::pixels); n++) {
        #pragma HLS PIPELINE II=1
        pixel_loop.tick();
        const typename words<C>::image pixels = image[corner + at + x];
        for (unsigned j = 0; j < lanes; j++) {
            #pragma HLS UNROLL
            if (j / C::pixels >= l)
                values.lane[j] = j / C::pixels == l ? (typename C::act_t)((int)pixels.lane[j % C::pixels] - pixel_zero) : 0;
        }
        const bool whole = x + 1 == across, last = whole && y + 1 == I.patch;
        if (last || l + 1 == joined)
            narrow[(I.dst + t * I.dst_pitch) / lanes + w] = values;
        w = last ? 0 : l + 1 == joined ? w + 1 : w;
        l = last || l + 1 == joined ? 0 : l + 1;
        x = whole ? 0 : x + 1;
        y = last ? 0 : whole ? y + 1 : y;
        at = last ? 0 : whole ? at + line : at;
        if (last) { // the next patch; below the last of a row, the first of the next one
            t++;
            column = column + 1 == columns ? 0 : column + 1;
            corner = column == 0 ? corner + across + (I.patch - 1) * line : corner + across;
        }
    }
    M3VIT_COUNT(image, I.rows * I.n_in);
    M3VIT_COUNT(narrow_write, I.rows * words_of<lanes>(I.n_in) * sizeof(typename words<C>::narrow));
}

// The first `prefix` tokens become those of the table, the others get it added.
// Cycles: rows * n_out / values in a word of params, of which a word of tokens holds as many or twice as many.
template <class C>
void position(const position_fields &I, typename ports<C>::params params, typename ports<C>::wide_in wide_in,
              typename ports<C>::wide wide) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::wide_lanes, some = words<C>::param_lanes, joined = lanes / some;
    const unsigned count = words_of<some>(I.n_out);
    unsigned t = 0, w = 0;
    typename words<C>::wide values;
    #pragma HLS ARRAY_PARTITION variable=values.lane complete
    pipelined<loop_norm_token, 1> token_loop;
Token:
    for (unsigned n = 0; n < I.rows * count; n++) {
        #pragma HLS PIPELINE II=1
        token_loop.tick();
        const unsigned place = (I.dst + t * I.dst_pitch) / lanes + w / joined, part = w % joined;
        const typename words<C>::params added = params[I.params / some + n];
        if (t >= I.prefix && part == 0)
            values = wide_in[place];
        for (unsigned l = 0; l < lanes; l++) {
            #pragma HLS UNROLL
            if (l / some == part) {
                const long long before = t < I.prefix ? 0 : values.lane[l], sum = before + added.lane[l % some];
                values.lane[l] = w * some + l % some < I.n_out ? (typename C::wide_t)saturate<C::wide_bits>(sum) : 0;
            } else if (l / some > part && w + 1 == count) {
                values.lane[l] = 0;
            }
        }
        if (part + 1 == joined || w + 1 == count)
            wide[place] = values;
        if (++w == count) {
            w = 0;
            t++;
        }
    }
    M3VIT_COUNT(params, I.rows * count * sizeof(typename words<C>::params));
    M3VIT_COUNT(wide_read, (I.rows - I.prefix) * words_of<lanes>(I.n_out) * sizeof(typename words<C>::wide));
    M3VIT_COUNT(wide_write, I.rows * words_of<lanes>(I.n_out) * sizeof(typename words<C>::wide));
}

// LayerNorm's values in the width that they need, which decides how many DSPs a product takes: channels fewer than
// 2^dim_bits, n x - S, the same shifted so that it has 24 bits (25 if it was rounded up), its factor, and what is scaled.
struct norm_types {
    static const unsigned dim_bits = 11;
    typedef sums<dim_bits + 1>::type dim;
    typedef sums<32 + dim_bits + 1>::type centred;
    typedef sums<26>::type shifted;
    typedef sums<27>::type factor, normal;
};

// What one stage of LayerNorm hands to the next of a row.
struct norm_row {
    long long sum;
    unsigned long long any; // all bits that occur in a magnitude
    int drop;
    unsigned long long squares;
    norm_types::factor factor;
    int shift;
};

static const unsigned norm_span = 16; // steps of a row at least: what a stage writes is there when the next row reads it
static const unsigned norm_pairs = 4; // places for pairs of rows that are read, summed and centred

// Value l of a step whose first word is `word`, of row t, where layernorm keeps what it read.
template <class C, class ROWS> int value_of(const ROWS &x, unsigned t, unsigned word, unsigned l) {
    #pragma HLS INLINE
    static const unsigned lanes = words<C>::wide_lanes, most = (C::max_dim + lanes - 1) / lanes;
    static const unsigned longest = (most + C::norm_words - 1) / C::norm_words;
    const unsigned at = word + l / lanes, place = t / 2 % norm_pairs * longest + at / C::norm_words;
    return x[at % C::norm_words][place].lane[l % lanes];
}

// LayerNorm of rows, its affine part, rounding, and to memory. params: scales, and from `biases` on biases (a bias counts
// 2^bias_shift).
//
// With S = sum x and d_i = n x_i - S, (x_i - mean) / sqrt(var + eps) is d_i sqrt(n) / sqrt(sum d^2 + n^3 eps). The
// d_i are first shifted so that the largest has 24 bits: sums of squares then fit 64 bits for any variance of 32-bit
// inputs. sqrt_dim: sqrt(n) * 2^16; eps: n^3 eps * 2^(2 fractional bits of x), at least 1.
// One loop passes over all rows, C::norm_words words a step, read through as many ports (one, if results are wide: these go
// out through one). Each port reads its part of the rows, whole rows one after the other, and rows are taken from all
// parts in turn once they were read: while the loop sums a row it centres the one before, squares the one before that
// and scales and writes a fourth. A stage's result for a row is used from the next row on.
// Results of two bytes each are written twice, a word of high bytes and one of low ones, so their rows take twice the steps.
// Cycles: (rows + ports + 3) * n_in / values of a step, or norm_span a row if there are fewer.
template <class C>
void layernorm(const norm_fields &I, typename ports<C>::params params, typename ports<C>::wide_in wide_in,
               typename ports<C>::more_wide_in more_wide_in, typename ports<C>::narrow_out narrow,
               typename ports<C>::wide wide_out) {
    #pragma HLS INLINE off
    static const unsigned lanes = words<C>::wide_lanes, most = (C::max_dim + lanes - 1) / lanes;
    static const unsigned side = C::norm_words * lanes;           // values of a step
    static const unsigned longest = (most + C::norm_words - 1) / C::norm_words;
    static const unsigned joined = words<C>::narrow_lanes / side; // steps whose values a narrow word holds
    static const unsigned some = words<C>::param_lanes, loads = lanes / some; // words of params for a wide one
    static_assert(joined > 0, "a step's values are of one narrow word");
    // Rows that were read: odd or even, by word of a step. Each is written by one port and read by one stage.
    static typename words<C>::wide x[2][C::norm_words][norm_pairs * longest];
    static int scale[C::norm_words][most][lanes], bias[C::norm_words][most][lanes];
    static norm_types::centred centred[4][most][side];
    static norm_types::shifted shifted[4][most][side];
    static_assert(C::max_dim < 1 << norm_types::dim_bits, "the widths of products hold");
    #pragma HLS ARRAY_PARTITION variable=scale dim=1 complete
    #pragma HLS ARRAY_PARTITION variable=bias dim=1 complete
    #pragma HLS ARRAY_RESHAPE variable=scale dim=3 complete
    #pragma HLS ARRAY_RESHAPE variable=bias dim=3 complete
    #pragma HLS ARRAY_PARTITION variable=x dim=1 complete
    #pragma HLS ARRAY_PARTITION variable=x dim=2 complete
    #pragma HLS ARRAY_RESHAPE variable=centred dim=3 complete
    #pragma HLS ARRAY_RESHAPE variable=shifted dim=3 complete
    // together: words of a step, and ports; row 2 p is the p-th one of the first port's, row 2 p + 1 of the second's.
    const unsigned n = I.n_in, count = words_of<lanes>(n), together = I.mode == to_narrow ? C::norm_words : 1;
    const bool two = C::two_bytes && I.mode == to_narrow && I.dst_low > 0;
    const unsigned steps = (count + together - 1) / together, least = steps > norm_span ? steps : norm_span;
    const unsigned writes = two ? 2 * joined * words_of<words<C>::narrow_lanes>(n) : steps;
    const unsigned span = writes > least ? writes : least;
    const unsigned half = (I.rows + together - 1) / together; // rows of the first port
    const unsigned param_count = words_of<some>(n);
    int loaded[lanes];
    #pragma HLS ARRAY_PARTITION variable=loaded complete
    pipelined<loop_norm_load, 1> load_loop;
Load:
    for (unsigned w = 0; w < 2 * param_count; w++) {
        #pragma HLS PIPELINE II=1
        load_loop.tick();
        const bool second = w >= param_count;
        const unsigned place = second ? w - param_count : w, at = place / loads;
        const typename words<C>::params values = params[(I.params + (second ? I.biases : 0)) / some + place];
        for (unsigned l = 0; l < lanes; l++) {
            #pragma HLS UNROLL
            if (l / some >= place % loads)
                loaded[l] = l / some == place % loads ? values.lane[l % some] : 0;
        }
        if (place % loads + 1 == loads || place + 1 == param_count) {
            for (unsigned l = 0; l < lanes; l++) {
                #pragma HLS UNROLL
                if (second)
                    bias[at % together][at / together][l] = loaded[l];
                else
                    scale[at % together][at / together][l] = loaded[l];
            }
        }
    }
    M3VIT_COUNT(params, 2 * param_count * sizeof(typename words<C>::params));
    norm_row summed, centring, squared, scaling; // of the rows t, t - 1, t - 2, t - 3: t is `together` after what is read
    summed.sum = centring.any = squared.squares = 0;
    scaling.factor = scaling.shift = squared.drop = 0;
    typename words<C>::narrow gathered;
    #pragma HLS ARRAY_PARTITION variable=gathered.lane complete
    unsigned pass = 0, w = 0;
    pipelined<loop_norm_row, 1> row_loop;
Row:
    for (unsigned k = 0; k < (I.rows + together + 3) * span; k++) {
        #pragma HLS PIPELINE II=1
        row_loop.tick();
        #pragma HLS DEPENDENCE variable=x inter false
        #pragma HLS DEPENDENCE variable=centred inter false
        #pragma HLS DEPENDENCE variable=shifted inter false
        if (w == 0) { // each stage takes the row that the one before it has finished
            const scaled inverse = rsqrt(squared.squares > 0 ? squared.squares : 1);
            scaling.factor = norm_types::factor(shift_round(inverse.mantissa * (long long)I.sqrt_dim, 16));
            scaling.shift = inverse.shift;
            const int exponent = normalise(centring.any | 1).exponent;
            squared.drop = exponent > 23 ? exponent - 23 : 0;
            squared.squares = squared.drop < 32 ? (unsigned long long)I.eps >> (2 * squared.drop) : 0;
            centring.sum = summed.sum;
            centring.any = 1;
            summed.sum = 0;
        }
        const bool within = w < steps;
        const unsigned word = w * together; // the first of this step; of its values, `inside` are of the row
        const unsigned left = n - word * lanes, inside = left < together * lanes ? left : together * lanes;
        // Of a row a port reads a part in each of so many passes as there are ports.
        const unsigned turn = pass % together, at = turn * steps + w, first = pass - turn;
        if (within && at < count) {
            const unsigned place = first / 2 % norm_pairs * longest + at / C::norm_words;
            const unsigned row = I.src + first / together * I.src_pitch;
            if (first < I.rows)
                x[first & 1][at % C::norm_words][place] = wide_in[row / lanes + at];
            if (together == 2 && first + 1 < I.rows) // the same memory through another port
                x[1][at % C::norm_words][place] = more_wide_in[(row + half * I.src_pitch) / lanes + at];
        }
        const unsigned t = pass - together; // below 0 it is beyond all rows
        if (within && t < I.rows) {
            for (unsigned l = 0; l < side; l++) {
                #pragma HLS UNROLL
                summed.sum += l < inside ? value_of<C>(x[t & 1], t, word, l) : 0;
            }
        }
        if (within && t - 1 < I.rows) {
            for (unsigned l = 0; l < side; l++) {
                #pragma HLS UNROLL
                const long long product = (long long)(norm_types::dim(n) * value_of<C>(x[(t - 1) & 1], t - 1, word, l));
#ifdef M3VIT_NORM_IN_LUT
                #pragma HLS BIND_OP variable=product op=mul impl=fabric
#endif
                const long long d = l < inside ? product - centring.sum : 0;
                centred[(t - 1) & 3][w][l] = norm_types::centred(d);
                centring.any |= (unsigned long long)(d < 0 ? -d : d);
            }
        }
        if (within && t - 2 < I.rows) {
            for (unsigned l = 0; l < side; l++) {
                #pragma HLS UNROLL
                const norm_types::shifted d(shift_round((long long)centred[(t - 2) & 3][w][l], squared.drop));
                shifted[(t - 2) & 3][w][l] = d;
                squared.squares += (unsigned long long)(d * d);
            }
        }
        if (w < writes && t - 3 < I.rows) {
            typename words<C>::wide values;
            const narrow_step at_step = step_of<C>(w, joined, two);
            const bool whole = at_step.part == joined - 1 || w == writes - 1;
            // Of two bytes the last word's steps may be more than there are values for.
            const unsigned u = at_step.values < steps ? at_step.values : 0, word_of_step = u * together;
            const unsigned rest = at_step.values < steps ? n - word_of_step * lanes : 0;
            const unsigned some_inside = rest < together * lanes ? rest : together * lanes;
            for (unsigned l = 0; l < side; l++) {
                #pragma HLS UNROLL
                const long long scaled_up = (long long)(shifted[(t - 3) & 3][u][l] * scaling.factor);
                const norm_types::normal y(shift_round(scaled_up, 20 + scaling.shift - norm_frac));
                const long long of_bias = bias[l / lanes][u][l % lanes] * (1LL << I.bias_shift);
                const long long z = shift_round((long long)(y * scale[l / lanes][u][l % lanes]) + of_bias, I.shift);
                if (I.mode == to_narrow)
                    gathered.lane[at_step.part * side + l] =
                        l < some_inside ? stored<C>(hold_narrow<C>(z, at_step.form), at_step.form) : (typename C::act_t)0;
                else if (l < lanes)
                    values.lane[l] = l < some_inside ? (typename C::wide_t)saturate<C::wide_bits>(z) : 0;
            }
            const unsigned row = (t - 3) / together + (t - 3) % together * half;
            const unsigned place = I.dst + row * I.dst_pitch;
            if (I.mode != to_narrow) {
                wide_out[place / lanes + word] = values;
            } else if (whole) {
                for (unsigned l = 0; l < joined * side; l++) {
                    #pragma HLS UNROLL
                    if (l >= (at_step.part + 1) * side)
                        gathered.lane[l] = 0;
                }
                narrow[place / (joined * side) + at_step.word] = gathered;
            }
        }
        if (++w == span) {
            w = 0;
            pass++;
        }
    }
    M3VIT_COUNT(wide_read, I.rows * count * sizeof(typename words<C>::wide));
#ifndef __SYNTHESIS__
    if (I.mode == to_narrow)
        M3VIT_COUNT(narrow_write, I.rows * words_of<words<C>::narrow_lanes>(n) * sizeof(typename words<C>::narrow) *
                                      (two ? 2 : 1));
    else
        M3VIT_COUNT(wide_write, I.rows * count * sizeof(typename words<C>::wide));
#endif
}

} // namespace vit
} // namespace nnet
#endif
