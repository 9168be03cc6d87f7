// Timed C-simulation: with -DM3VIT_TIMED, loops and ports are objects that write down what they do; without it a port is
// a pointer, and a loop's object is empty: the code is the same.
//
// A record is one pass of a pipelined loop: its trips, the last of them that reached a port that is written to (from 1 on,
// 0: none), and what it moved through each port, in words and in runs of consecutive ones. It holds no time: m3vit/hw/timed.py makes cycles of it, under assumptions that it prints, as often as
// wanted. Records go to the file that the environment's M3VIT_TIMED_TRACE names, after a line of JSON with the names.
#ifndef M3VIT_TIMED_H_
#define M3VIT_TIMED_H_

#include <stdint.h>

namespace nnet {
namespace vit {

// The pipelined loops, file by file. Each has an object `pipelined<loop, II>` before it, with the II of its pragma.
enum loop_id {
    loop_engine_fetch,
    loop_attention_rest,
    loop_attention_first,
    loop_compute_step,
    loop_linear_first,
    loop_norm_pixel,
    loop_norm_token,
    loop_norm_load,
    loop_norm_row,
    loop_router_reset,
    loop_router_token,
    loop_router_start,
    loop_router_place,
    num_loops
};

enum port_id {
    port_image,
    port_weights,
    port_more_weights,
    port_gates,
    port_params,
    port_keys,
    port_narrow_in,
    port_narrow_out,
    port_wide_in,
    port_wide,
    port_more_wide_in,
    port_more_wide,
    port_output,
    num_ports
};

#ifndef M3VIT_TIMED

template <class T, port_id PORT> struct port {
    typedef T *type;
};
template <loop_id LOOP, unsigned II> struct pipelined {
    void tick() const {}
};
inline void begin_instruction(unsigned, bool) {
    #pragma HLS INLINE
}

#else

} // namespace vit
} // namespace nnet

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace nnet {
namespace vit {

// What goes to the file.
struct timed_record {
    uint32_t frame, pc, loop, ii, trips, written, words[num_ports], runs[num_ports];
};

class timed_trace {
  public:
    static timed_trace &get() {
        static timed_trace trace;
        return trace;
    }
    void begin_instruction(unsigned pc, bool first) {
        frames += first;
        at = pc;
    }
    void begin(uint32_t loop, uint32_t ii) {
        end();
        memset(&now, 0, sizeof now);
        memset(following, 0xff, sizeof following);
        now.frame = frames - 1;
        now.pc = at;
        now.loop = loop;
        now.ii = ii;
        running = true;
    }
    void tick() { now.trips++; }
    void access(uint32_t port, size_t word) {
        now.words[port]++;
        if (port == port_narrow_out || port == port_wide || port == port_more_wide || port == port_output)
            now.written = now.trips;
        now.runs[port] += word != following[port];
        following[port] = word + 1;
    }

  private:
    FILE *file;
    timed_record now;
    bool running;
    unsigned frames, at;
    size_t following[num_ports];

    timed_trace() : file(0), running(false), frames(0), at(0) {
        const char *path = getenv("M3VIT_TIMED_TRACE");
        file = path ? fopen(path, "wb") : 0;
        if (file)
            fputs("{\"loops\": [\"engine_fetch\", \"attention_rest\", \"attention_first\", \"compute_step\", \"linear_first\", \"norm_pixel\", "
                  "\"norm_token\", \"norm_load\", \"norm_row\", \"router_reset\", \"router_token\", "
                  "\"router_start\", \"router_place\"], "
                  "\"ports\": [\"image\", \"weights\", \"more_weights\", \"gates\", \"params\", \"keys\", \"narrow_in\", "
                  "\"narrow_out\", \"wide_in\", \"wide\", \"more_wide_in\", "
                  "\"more_wide\", \"output\"]}\n",
                  file);
    }
    ~timed_trace() {
        end();
        if (file)
            fclose(file);
    }
    void end() {
        if (running && file)
            fwrite(&now, sizeof now, 1, file);
        running = false;
    }
};

template <class T, port_id PORT> class timed_port {
    T *data;

  public:
    timed_port(T *pointer) : data(pointer) {}
    T &operator[](size_t word) const {
        timed_trace::get().access(PORT, word);
        return data[word];
    }
};
template <class T, port_id PORT> struct port {
    typedef timed_port<T, PORT> type;
};
template <loop_id LOOP, unsigned II> struct pipelined {
    pipelined() { timed_trace::get().begin(LOOP, II); }
    void tick() const { timed_trace::get().tick(); }
};
inline void begin_instruction(unsigned pc, bool first) { timed_trace::get().begin_instruction(pc, first); }

#endif

} // namespace vit
} // namespace nnet
#endif
