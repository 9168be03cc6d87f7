// Runs the expert engine under Verilator against a model of AXI and DDR, and says what it took.
//
//     m3vit_rtl_bench JOB MEMORY QUEUES OUT
//
// JOB: lines `name value`: the fields of the instruction, where the memories begin, and of the model `read` (cycles from a
// request to its first word), `write` (from a burst's last word to its answer), `rate` (bytes that all ports together move
// in 256 cycles) and `limit` (cycles after which it gives up). MEMORY: all of it. QUEUES: uint32 places, then of each place
// token and weight, then for each expert, and the end, where its queue begins. OUT: the memory afterwards.
// Prints a line of JSON: cycles, those of each pass, words of each port.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "Vm3vit_experts.h"
#include "verilated.h"

typedef std::vector<uint8_t> memory_t;

// Bits of a port of the model, whose types are integers and arrays of words.
template <class T> uint64_t bits(const T &value, unsigned at, unsigned count) {
    uint64_t found = 0;
    for (unsigned b = 0; b < count; b++)
        found |= (uint64_t)(((const uint8_t *)&value)[(at + b) / 8] >> (at + b) % 8 & 1) << b;
    return found;
}
template <class T> void set_bit(T &value, unsigned at, bool bit) {
    uint8_t &byte = ((uint8_t *)&value)[at / 8];
    byte = (uint8_t)((byte & ~(1 << at % 8)) | bit << at % 8);
}

static const unsigned address_bits = 40;
static uint64_t now = 0;

// What all ports share: so many bytes a cycle.
struct bandwidth_t {
    uint64_t rate, credit; // in 256ths of a byte
    unsigned bytes;
    void refill() {
        const uint64_t most = rate > bytes * 256u ? 2 * rate : 2 * bytes * 256u;
        credit = credit + rate > most ? most : credit + rate;
    }
    bool take() {
        if (credit < bytes * 256u)
            return false;
        credit -= bytes * 256u;
        return true;
    }
};

struct port_t {
    const char *name;
    uint64_t words;
    explicit port_t(const char *name) : name(name), words(0) {}
    virtual ~port_t() {}
    virtual void offer(bandwidth_t &bandwidth) = 0; // set the model's inputs for this cycle
    virtual void sample() = 0;                      // see which of them were taken, before the clock's edge
};

struct burst_t {
    uint64_t address, words, ready;
};

static memory_t memory;

template <class V, class A, class L, class D> struct read_port : port_t {
    V &arvalid, &arready, &rvalid;
    A &araddr;
    L &arlen;
    D &rdata;
    unsigned place, bytes, latency; // place: among ports that lie side by side
    std::deque<burst_t> bursts;
    bool serving;
    read_port(const char *name, V &arvalid, V &arready, A &araddr, L &arlen, V &rvalid, D &rdata, unsigned place, unsigned bytes,
              unsigned latency)
        : port_t(name), arvalid(arvalid), arready(arready), rvalid(rvalid), araddr(araddr), arlen(arlen), rdata(rdata),
          place(place), bytes(bytes), latency(latency), serving(false) {}
    void offer(bandwidth_t &bandwidth) {
        set_bit(arready, place, true);
        serving = !bursts.empty() && bursts.front().ready <= now && bandwidth.take();
        set_bit(rvalid, place, serving);
        if (serving) {
            if (bursts.front().address + bytes > memory.size()) {
                fprintf(stderr, "%s reads beyond the memory, at byte %llu\n", name, (unsigned long long)bursts.front().address);
                exit(1);
            }
            memcpy((uint8_t *)&rdata + place * bytes, &memory[bursts.front().address], bytes);
        }
    }
    void sample() {
        if (serving) {
            words++;
            bursts.front().address += bytes;
            if (--bursts.front().words == 0)
                bursts.pop_front();
        }
        if (bits(arvalid, place, 1)) {
            const burst_t burst = {bits(araddr, place * address_bits, address_bits), bits(arlen, place * 8, 8) + 1, now + latency};
            if (burst.address / 4096 != (burst.address + burst.words * bytes - 1) / 4096) {
                fprintf(stderr, "a burst of %s crosses 4 KB\n", name);
                exit(1);
            }
            bursts.push_back(burst);
        }
    }
};
template <class V, class A, class L, class D>
port_t *reading(const char *name, V &arvalid, V &arready, A &araddr, L &arlen, V &rvalid, D &rdata, unsigned place,
                unsigned bytes, unsigned latency) {
    return new read_port<V, A, L, D>(name, arvalid, arready, araddr, arlen, rvalid, rdata, place, bytes, latency);
}

template <class V, class A, class L, class D> struct write_port : port_t {
    V &awvalid, &awready, &wvalid, &wready, &wlast, &bvalid;
    A &awaddr;
    L &awlen;
    D &wdata;
    unsigned bytes, latency;
    std::deque<burst_t> bursts;
    std::deque<uint64_t> answers;
    bool room;
    write_port(const char *name, V &awvalid, V &awready, A &awaddr, L &awlen, V &wvalid, V &wready, D &wdata, V &wlast, V &bvalid,
               unsigned bytes, unsigned latency)
        : port_t(name), awvalid(awvalid), awready(awready), wvalid(wvalid), wready(wready), wlast(wlast), bvalid(bvalid),
          awaddr(awaddr), awlen(awlen), wdata(wdata), bytes(bytes), latency(latency), room(false) {}
    void offer(bandwidth_t &bandwidth) {
        awready = 1;
        room = wvalid && !bursts.empty() && bandwidth.take();
        wready = room;
        bvalid = !answers.empty() && answers.front() <= now;
        if (bvalid)
            answers.pop_front();
    }
    void sample() {
        if (room) {
            burst_t &burst = bursts.front();
            if (burst.address + bytes > memory.size() || (burst.words == 1) != (wlast != 0)) {
                fprintf(stderr, "%s writes beyond the memory, or its last word is not the burst's\n", name);
                exit(1);
            }
            memcpy(&memory[burst.address], &wdata, bytes);
            burst.address += bytes;
            words++;
            if (--burst.words == 0) {
                bursts.pop_front();
                answers.push_back(now + latency);
            }
        }
        if (awvalid) {
            const burst_t burst = {bits(awaddr, 0, address_bits), awlen + 1u, 0};
            bursts.push_back(burst);
        }
    }
};
template <class V, class A, class L, class D>
port_t *writing(const char *name, V &awvalid, V &awready, A &awaddr, L &awlen, V &wvalid, V &wready, D &wdata, V &wlast,
                V &bvalid, unsigned bytes, unsigned latency) {
    return new write_port<V, A, L, D>(name, awvalid, awready, awaddr, awlen, wvalid, wready, wdata, wlast, bvalid, bytes, latency);
}

static memory_t read_all(const char *path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        fprintf(stderr, "%s cannot be read\n", path);
        exit(1);
    }
    return memory_t((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "give JOB MEMORY QUEUES OUT\n");
        return 2;
    }
    std::map<std::string, uint64_t> job;
    std::ifstream lines(argv[1]);
    std::string name;
    for (uint64_t value; lines >> name >> value;)
        job[name] = value;
    memory = read_all(argv[2]);
    const memory_t queue_bytes = read_all(argv[3]);
    std::vector<uint32_t> queues(queue_bytes.size() / 4);
    memcpy(queues.data(), queue_bytes.data(), queues.size() * 4);

    Vm3vit_experts d;
    const auto edge = [&]() {
        d.clk = 0;
        d.eval();
        d.clk = 1;
        d.eval();
        now++;
    };
    d.start = d.queue_write = d.start_write = 0;
    d.reset = 1;
    for (unsigned k = 0; k < 4; k++)
        edge();
    d.reset = 0;
    const uint32_t places = queues[0];
    d.queue_write = 1;
    for (uint32_t p = 0; p < places; p++) {
        d.queue_place = p;
        d.queue_token = queues[1 + 2 * p];
        d.queue_weight = queues[2 + 2 * p];
        edge();
    }
    d.queue_write = 0;
    d.start_write = 1;
    for (uint32_t e = 0; e <= job["experts"]; e++) {
        d.start_expert = e;
        d.start_place = queues[1 + 2 * places + e];
        edge();
    }
    d.start_write = 0;
#define FIELD(field) d.field = job[#field]
    FIELD(experts);
    FIELD(n_in);
    FIELD(n_out);
    FIELD(src);
    FIELD(src_pitch);
    FIELD(dst);
    FIELD(dst_pitch);
    FIELD(weights);
    FIELD(weights_step);
    FIELD(params);
    FIELD(params_step);
    FIELD(hidden);
    FIELD(hidden_pitch);
    FIELD(gelu_in);
    FIELD(gelu_out);
    FIELD(weights_base);
    FIELD(params_base);
    FIELD(narrow_base);
    FIELD(wide_base);

    const unsigned bytes = sizeof d.params_rdata, read = job["read"], write = job["write"];
    bandwidth_t bandwidth = {job["rate"], 0, bytes};
    std::vector<port_t *> ports;
    static const char *const weight_names[] = {"weights", "more_weights"};
    for (unsigned p = 0; p < sizeof d.weights_rdata / bytes; p++)
        ports.push_back(reading(weight_names[p], d.weights_arvalid, d.weights_arready, d.weights_araddr, d.weights_arlen,
                                d.weights_rvalid, d.weights_rdata, p, bytes, read));
#define READING(port)                                                                                                  \
    ports.push_back(reading(#port, d.port##_arvalid, d.port##_arready, d.port##_araddr, d.port##_arlen, d.port##_rvalid,   \
                            d.port##_rdata, 0, bytes, read))
#define WRITING(port)                                                                                                  \
    ports.push_back(writing(#port, d.port##_awvalid, d.port##_awready, d.port##_awaddr, d.port##_awlen, d.port##_wvalid,   \
                            d.port##_wready, d.port##_wdata, d.port##_wlast, d.port##_bvalid, bytes, write))
    READING(params);
    READING(narrow_in);
    READING(keys);
    READING(wide_in);
    READING(more_wide_in);
    WRITING(narrow_out);
    WRITING(wide);
    WRITING(more_wide);

    const uint64_t began = now, limit = job["limit"];
    uint64_t pass_began = began;
    std::vector<uint64_t> passes;
    d.start = 1;
    for (;;) {
        bandwidth.refill();
        for (size_t p = 0; p < ports.size(); p++) // a different one first each time
            ports[(p + now) % ports.size()]->offer(bandwidth);
        d.clk = 0;
        d.eval();
        for (size_t p = 0; p < ports.size(); p++)
            ports[p]->sample();
        d.clk = 1;
        d.eval();
        now++;
        d.start = 0;
        if (d.pass_done) {
            passes.push_back(now - pass_began);
            pass_began = now;
        }
        if (d.done)
            break;
        if (now - began > limit) {
            fprintf(stderr, "not done after %llu cycles, %zu passes\n", (unsigned long long)limit, passes.size());
            return 1;
        }
    }
    std::ofstream out(argv[4], std::ios::binary);
    out.write((const char *)memory.data(), (std::streamsize)memory.size());
    printf("{\"cycles\": %llu, \"passes\": [", (unsigned long long)(now - began));
    for (size_t p = 0; p < passes.size(); p++)
        printf("%s%llu", p ? ", " : "", (unsigned long long)passes[p]);
    printf("], \"words\": {");
    for (size_t p = 0; p < ports.size(); p++)
        printf("%s\"%s\": %llu", p ? ", " : "", ports[p]->name, (unsigned long long)ports[p]->words);
    printf("}}\n");
    return out ? 0 : 1;
}
