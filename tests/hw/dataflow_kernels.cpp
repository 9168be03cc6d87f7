// Small dataflow kernels for tests: `timed.exe KERNEL` runs one for three frames.
#include "hls_stream.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>

const int N = 24;
typedef hls::stream<int> ints;

void twice(ints &from, ints &to) {
    for (int i = 0; i < N; i++) {
        #pragma HLS PIPELINE II=1
        to.write(2 * from.read());
    }
}
void slowly(ints &from, ints &to) {
    for (int i = 0; i < N; i++) {
        #pragma HLS pipeline II = 3
        to.write(from.read());
    }
}
// Two loops: all of a frame is kept, and then given in the other direction.
void backwards(ints &from, ints &to) {
    int kept[N];
    for (int i = 0; i < N; i++)
        kept[i] = from.read();
Give:
    for (int i = 0; i < N; i++) {
        to.write(kept[N - 1 - i]);
    }
}
// What stands before and after the only inner loop is in its first and last iteration.
void pairs(ints &from, ints &to) {
    for (int i = 0; i < N / 2; i++) {
        int sum = 0;
        for (int j = 0; j < 2; j++) {
            #pragma HLS PIPELINE
            sum += from.read();
        }
        to.write(sum);
    }
}
void both(ints &from, ints &one, ints &other) {
    for (int i = 0; i < N; i++) {
        #pragma HLS PIPELINE II=1
        const int value = from.read();
        one.write(value);
        other.write(value);
    }
}
void sums(ints &one, ints &other, ints &to) {
    for (int i = 0; i < N; i++) {
        #pragma HLS PIPELINE II=1
        to.write(one.read() + other.read());
    }
}
// Three words of one FIFO in an iteration: an iteration takes three cycles.
void thrice(ints &from, ints &to) {
    for (int i = 0; i < N / 3; i++) {
        const int value = from.read();
        for (int j = 0; j < 3; j++) {
            #pragma HLS UNROLL
            to.write(value + j);
        }
    }
    from.read();
}
void drops(ints &from, ints &to, int &dropped) {
    for (int i = 0; i < N; i++) {
        #pragma HLS PIPELINE II=1
        if (!to.write_nb(from.read()))
            dropped++;
    }
    to.write(-1);
}
void until_end(ints &from, ints &to) {
    while (true) {
        #pragma HLS PIPELINE II=4
        const int value = from.read();
        to.write(value);
        if (value < 0)
            break;
    }
}

void chain(ints &in, ints &out) {
    #pragma HLS dataflow
    hls::stream<int> fast, slow, back;
    #pragma HLS stream variable=fast depth=2
    #pragma HLS stream variable=slow depth=4
    twice(in, fast);
    slowly(fast, slow);
    backwards(slow, back);
    pairs(back, out);
}
// One branch gives its first word when it has all: the other's FIFO has to hold a frame.
void diamond(ints &in, ints &out) {
    #pragma HLS dataflow
    hls::stream<int> one("one"), other("other"), kept("kept");
    #pragma HLS stream variable=other depth=N+8
    both(in, one, other);
    backwards(one, kept);
    sums(kept, other, out);
}
void inner(ints &in, ints &out) {
    #pragma HLS dataflow
    hls::stream<int> between;
    twice(in, between);
    slowly(between, out);
}
void nested(ints &in, ints &out) {
    #pragma HLS dataflow
    hls::stream<int> three;
    #pragma HLS stream variable=three depth=5
    thrice(in, three);
    inner(three, out);
}
void dropping(ints &in, ints &out, int &dropped) {
    #pragma HLS dataflow
    hls::stream<int> few;
    drops(in, few, dropped);
    until_end(few, out);
}

int main(int argc, char **argv) {
    const std::string kernel = argv[1];
    ints in("in"), out("out");
    const int frames = kernel == "dropping" ? 1 : 3;
    for (int n = 0; n < frames; n++) {
        int dropped = 0;
        for (int i = 0; i < (kernel == "nested" ? N / 3 + 1 : N); i++)
            in.write(100 * n + i);
        if (kernel == "chain")
            chain(in, out);
        else if (kernel == "diamond")
            diamond(in, out);
        else if (kernel == "nested")
            nested(in, out);
        else
            dropping(in, out, dropped);
        for (size_t left = out.size(); left; left--)
            printf("%d ", out.read());
        printf("%d\n", dropped);
    }
}
