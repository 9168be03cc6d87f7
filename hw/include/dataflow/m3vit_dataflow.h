// Processes, FIFOs and loops of timed C-simulation: what hls_stream.h is made of.
#ifndef M3VIT_DATAFLOW_H_
#define M3VIT_DATAFLOW_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace m3vit_timed {

typedef int64_t cycle;
struct process;

struct channel {
    std::string name;
    long depth;                      // 0: of no end, as the streams of a test bench
    long reads = 0, writes = 0;      // begun
    std::vector<cycle> wrote, taken; // the cycles of those that are done
    process *writer = nullptr, *reader = nullptr;
    cycle empty = 0, full = 0; // cycles that its reader, and its writer, stood still for it
    int id = 0;
};

struct access {
    cycle local;
    channel *fifo;
    bool write;
    long number;
    bool known() const {
        return write ? !fifo->depth || number < fifo->depth || (long)fifo->taken.size() > number - fifo->depth
                     : (long)fifo->wrote.size() > number;
    }
    cycle ready() const {
        if (!write)
            return fifo->wrote[number] + 1;
        return fifo->depth && number >= fifo->depth ? fifo->taken[number - fifo->depth] + 1 : 0;
    }
};

// What the file has of a loop, line by line: see m3vit/hw/dataflow.py.
struct pass {
    int process, site;
    cycle trips;
    unsigned ii;
};
struct record {
    uint32_t pass, fifo, late; // fifo: twice its number, and 1 if written; late: cycles after its stage
    uint32_t iteration;
};

enum state { running, waits, asks, joins, ended };

struct process {
    std::string path;
    int id = 0;
    process *parent = nullptr;
    ucontext_t context;
    std::function<void()> body;
    void *stack = nullptr;
    state is = ended;
    access needs;            // of `waits`
    cycle asked = 0;         // of `asks`
    bool denied = false;     // its question will not be answered: what it asks for did not happen
    int children = 0;        // that have not ended
    cycle at = 0, local = 0; // the last cycle in which something happened, and the same without stalls
    std::vector<access> due; // by `local`
    // the program: cycles without stalls
    cycle cursor = 0, begun = 0; // of what is outside of loops, of the iteration
    int site = -1, depth = 0, passes = 0, nested = 0;
    unsigned ii = 1;
    cycle trips = 0, late = 0;
    bool straight = false; // outside of loops, and so not
    bool in_iteration = false, open = false, soft = false, early = false;
    int nests = 0, waits = 0, first = 0;
    std::vector<channel *> now; // accesses in this iteration, or in this cycle outside of loops
    bool now_read = false;
    int pass_id = -1;
    int named = 0;
};

struct site {
    int ii, depth, first; // first: the stage in which it reads
};

// What the source says of a loop. depth: 0 if it is what is assumed of all; waits: ap_wait()s in an iteration; counted:
// it tests whether to go on before anything else; automatic: no pragma asks for its pipeline.
struct rules {
    int number, ii, depth, waits;
    bool counted, automatic;
};

} // namespace m3vit_timed
#endif
