// hls::stream for timed C-simulation of dataflow regions (m3vit/hw/sim/dataflow.py puts it in the place of the vendor's).
//
// Each process of a region is a coroutine, and a FIFO holds the cycle of each of its writes and reads. A process runs
// until it needs a cycle that is not known yet; so the order in which processes run does not matter, and what a
// non-blocking access finds is what it would find in that cycle.
//
// The rules. An iteration of a pipelined loop begins II cycles after the one before it. It tests in its first stage
// whether to go on, if it has a condition, reads in the next (in its only one, if depth is 1) and writes in its last. A pipeline stalls as a whole: what is due in one cycle
// happens in the first one in which all of it can. What is written can be read a cycle later; what is read makes room
// a cycle later. A loop that follows another begins when that has drained. Outside of pipelined loops accesses follow
// one another, and share a cycle if they are of different FIFOs, and all reads or all writes. A process begins
// anew, for the next frame, II + 1 cycles after its last iteration began, if it is one pipelined loop, and else
// when it has ended.
#ifndef M3VIT_DATAFLOW_STREAM_H_
#define M3VIT_DATAFLOW_STREAM_H_

#include "m3vit_dataflow_report.h"

namespace m3vit_timed {

struct iteration {
    int loop;
    iteration(const rules &of) : loop(of.number) { engine::get().begin(of); }
    ~iteration() { engine::get().end(loop); }
};

struct nest {
    bool flat;
    nest(const rules &of) : flat(engine::get().begin_nest(of)) {}
    ~nest() {
        if (flat)
            engine::get().end_nest();
    }
};

struct region {
    bool outermost;
    region() : outermost(!engine::get().current) { engine::get().regions += outermost; }
    ~region() { engine::get().regions -= outermost; }
    void process(const char *label, std::function<void()> body) { engine::get().spawn(label, std::move(body)); }
    void join() { engine::get().join(); }
};

} // namespace m3vit_timed

namespace hls {

template <class T, int DEPTH = 0> class stream {
    std::deque<T> values;

  public:
    m3vit_timed::channel *fifo;
    typedef T value_type;

    stream(const std::string &name = "") : fifo(m3vit_timed::engine::get().open(name)) {
        if (DEPTH)
            m3vit_timed::engine::get().depth(fifo, DEPTH);
    }
    stream(const stream &) = delete;
    stream &operator=(const stream &) = delete;

    T read() {
        m3vit_timed::engine::get().read(fifo, values.empty());
        T value = values.front();
        values.pop_front();
        return value;
    }
    void read(T &value) { value = read(); }
    void operator>>(T &value) { value = read(); }
    void write(const T &value) {
        values.push_back(value);
        m3vit_timed::engine::get().written(fifo);
    }
    void operator<<(const T &value) { write(value); }
    bool read_nb(T &value) {
        if (!m3vit_timed::engine::get().try_access(fifo, false))
            return false;
        value = values.front();
        values.pop_front();
        return true;
    }
    bool write_nb(const T &value) {
        // the value first: a reader may go on as soon as the write's cycle is known
        if (!m3vit_timed::engine::get().try_access(fifo, true))
            return false;
        values.push_back(value);
        return true;
    }
    bool empty() { return !m3vit_timed::engine::get().try_access(fifo, false, true); }
    bool full() { return !m3vit_timed::engine::get().try_access(fifo, true, true); }
    size_t size() const { return values.size(); }
};

} // namespace hls

namespace m3vit_timed {
template <class T, int D> void name(hls::stream<T, D> &one, const char *text) { engine::get().name(one.fifo, text); }
template <class T, int D, size_t N> void name(hls::stream<T, D> (&many)[N], const char *text) {
    for (size_t i = 0; i < N; i++)
        name(many[i], (std::string(text) + "[" + std::to_string(i) + "]").c_str());
}
template <class T, int D> void set_depth(hls::stream<T, D> &one, long depth) { engine::get().depth(one.fifo, depth); }
template <class T, int D, size_t N> void set_depth(hls::stream<T, D> (&many)[N], long depth) {
    for (size_t i = 0; i < N; i++)
        set_depth(many[i], depth);
}
} // namespace m3vit_timed
#endif
