// Test driver: reads the name of a kernel and its arguments as numbers from stdin, runs it, prints its outputs.
// Sizes and types are fixed here and repeated in test_kernels.py.
#include "m3vit_attention.h"
#include "m3vit_dense.h"
#include "m3vit_gelu.h"
#include "m3vit_head.h"
#include "m3vit_moe.h"
#include "m3vit_pixel_head.h"
#include "m3vit_position.h"

#include <cstdio>
#include <iostream>
#include <string>

typedef ap_fixed<20, 8, AP_RND, AP_SAT> data_t;
typedef ap_fixed<24, 8, AP_RND, AP_SAT> wide_t; // results: finer than the kernels' own errors
typedef ap_fixed<16, 3, AP_RND, AP_SAT> weight_t;
typedef ap_fixed<20, 3, AP_RND, AP_SAT> bias_t;

template <class T, unsigned N> struct word { // hls4ml's nnet::array
    typedef T value_type;
    static const unsigned size = N;
    T data[N];
    T &operator[](unsigned i) { return data[i]; }
    const T &operator[](unsigned i) const { return data[i]; }
};

template <class T, unsigned N> void read(T (&values)[N]) {
    for (unsigned i = 0; i < N; i++) {
        double x;
        std::cin >> x;
        values[i] = x;
    }
}

template <class T, unsigned N> void feed(hls::stream<word<T, N>> &stream, unsigned tokens) {
    for (unsigned t = 0; t < tokens; t++) {
        word<T, N> x;
        read(x.data);
        stream.write(x);
    }
}

template <class T, unsigned N> void print(hls::stream<word<T, N>> &stream) {
    while (!stream.empty()) {
        const word<T, N> y = stream.read();
        for (unsigned i = 0; i < N; i++)
            std::printf("%.17g\n", y[i].to_double());
    }
}

void feed_task(hls::stream<word<ap_uint<8>, 1>> &stream) {
    word<ap_uint<8>, 1> task;
    int id;
    std::cin >> id;
    task[0] = id;
    stream.write(task);
}

const unsigned T = 24, D = 12;
typedef word<data_t, D> token;
typedef word<wide_t, D> result;

struct gelu_config {
    static const unsigned n_tok = T, n_dim = D;
};
void gelu() {
    hls::stream<token> x;
    hls::stream<result> y;
    feed(x, T);
    nnet::vit::gelu<token, result, gelu_config>(x, y);
    print(y);
}

struct norm_config {
    static const unsigned n_tok = T, n_dim = D;
    static const unsigned sqrt_dim = 227023;          // sqrt(12) * 2^16
    static const unsigned long long eps_raw = 28991ull; // 12^3 * 1e-6 * 2^24
    typedef weight_t scale_t;
};
struct layernorm_config : norm_config {
    typedef ::bias_t bias_t;
};
void layernorm() {
    hls::stream<token> x;
    hls::stream<result> y;
    weight_t scale[D];
    bias_t bias[D];
    read(scale);
    read(bias);
    feed(x, T);
    nnet::vit::layernorm<token, result, layernorm_config>(x, y, scale, bias);
    print(y);
}

struct dense_config {
    static const unsigned n_in = D, n_out = 7;
    typedef ::weight_t weight_t;
    typedef ::bias_t bias_t;
    typedef ap_fixed<44, 19> accum_t; // 12 + 13 fractional bits: exact
};
void linear() {
    typedef dense_config C;
    weight_t w[C::n_out * C::n_in];
    bias_t b[C::n_out];
    read(w);
    read(b);
    for (unsigned t = 0; t < T; t++) {
        data_t x[C::n_in];
        data_t y[C::n_out];
        read(x);
        nnet::vit::dense_kernel<data_t, data_t, C>::dense(x, y, w, b);
        for (unsigned o = 0; o < C::n_out; o++)
            std::printf("%.17g\n", y[o].to_double());
    }
}

struct position_config {
    static const unsigned n_tok = T, n_prefix = 2, n_dim = D;
    typedef bias_t table_t;
};
void position() {
    hls::stream<token> x;
    hls::stream<result> y;
    bias_t table[T * D];
    read(table);
    feed(x, T - 2);
    nnet::vit::position<token, result, position_config>(x, y, table);
    print(y);
}

struct attention_config {
    static const unsigned n_tok = T, n_dim = D, n_head = 3;
};
void attention() {
    hls::stream<word<data_t, 3 * D>> x;
    hls::stream<result> y;
    feed(x, T);
    nnet::vit::attention<word<data_t, 3 * D>, result, attention_config>(x, y);
    print(y);
}

struct moe_config {
    static const unsigned n_tok = T, n_dim = D, n_hid = 8, n_exp = 5, n_top = 2, n_task = 3, layer = 7;
    typedef weight_t router_w_t;
    typedef bias_t router_b_t;
    typedef weight_t w1_t;
    typedef bias_t b1_t;
    typedef weight_t w2_t;
    typedef bias_t b2_t;
    typedef data_t hidden_t;
    typedef data_t expert_t;
};
void moe() {
    typedef moe_config C;
    hls::stream<token> x;
    hls::stream<result> y;
    hls::stream<word<ap_uint<8>, 1>> task;
    static weight_t rw[C::n_task * C::n_exp * D], w1[C::n_exp * C::n_hid * D], w2[C::n_exp * D * C::n_hid];
    static bias_t rb[C::n_task * C::n_exp], b1[C::n_exp * C::n_hid], b2[C::n_exp * D];
    read(rw);
    read(rb);
    read(w1);
    read(b1);
    read(w2);
    read(b2);
    feed_task(task);
    feed(x, T);
    nnet::vit::moe<token, word<ap_uint<8>, 1>, result, C>(x, task, y, rw, rb, w1, b1, w2, b2);
    print(y);
    std::printf("%lu\n", nnet::vit::expert_loads());
}

struct head_config {
    static const unsigned n_tok = T, n_dim = D, n_prefix = 1, n_out = 5, n_task = 3, n_rows = 10;
    static const unsigned sqrt_dim = norm_config::sqrt_dim;
    static const unsigned long long eps_raw = norm_config::eps_raw;
    typedef ::weight_t weight_t;
    typedef ::bias_t bias_t;
    static unsigned first_row(unsigned task) {
        static const unsigned t[n_task + 1] = {0, 3, 8, 10};
        return t[task];
    }
};
void head() {
    hls::stream<token> x;
    hls::stream<word<wide_t, 5>> y;
    hls::stream<word<ap_uint<8>, 1>> task;
    weight_t w[10 * D];
    bias_t b[10];
    read(w);
    read(b);
    feed_task(task);
    feed(x, T);
    nnet::vit::task_head<token, word<ap_uint<8>, 1>, word<wide_t, 5>, head_config>(x, task, y, w, b);
    print(y);
}

struct pixel_head_config {
    static const unsigned n_tok = T, n_dim = D, n_row = 4, n_column = 6, n_scale = 2, n_out = 12, n_task = 3, n_rows = 6;
    static const unsigned n_unrectified = 1;
    typedef ::weight_t weight_t;
    typedef ::bias_t bias_t;
    static unsigned first_row(unsigned task) {
        static const unsigned t[n_task + 1] = {0, 1, 4, 6};
        return t[task];
    }
};
void pixel_head() {
    hls::stream<token> x;
    hls::stream<word<data_t, 12>> y;
    hls::stream<word<ap_uint<8>, 1>> task;
    weight_t w[6 * 9 * 3];
    bias_t b[6];
    read(w);
    read(b);
    feed_task(task);
    feed(x, T);
    nnet::vit::pixel_head<token, word<ap_uint<8>, 1>, word<data_t, 12>, pixel_head_config>(x, task, y, w, b);
    print(y);
}

void top_k() { // many rows of 8 logits
    unsigned rows;
    std::cin >> rows;
    for (unsigned r = 0; r < rows; r++) {
        long long logit[8];
        read(logit);
        unsigned expert[3];
        nnet::vit::top_k<8, 3>(logit, expert);
        std::printf("%u\n%u\n%u\n", expert[0], expert[1], expert[2]);
    }
}

int main() {
    std::string kernel;
    while (std::cin >> kernel) {
        if (kernel == "gelu")
            gelu();
        else if (kernel == "layernorm")
            layernorm();
        else if (kernel == "linear")
            linear();
        else if (kernel == "position")
            position();
        else if (kernel == "attention")
            attention();
        else if (kernel == "moe")
            moe();
        else if (kernel == "head")
            head();
        else if (kernel == "pixel_head")
            pixel_head();
        else if (kernel == "top_k")
            top_k();
        else
            return 1;
    }
    return 0;
}
