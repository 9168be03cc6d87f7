// What runs processes and gives accesses their cycles, by the rules in hls_stream.h.
#ifndef M3VIT_DATAFLOW_ENGINE_H_
#define M3VIT_DATAFLOW_ENGINE_H_

#include "m3vit_dataflow.h"

namespace m3vit_timed {

class engine {
  public:
    static engine &get() {
        static engine one;
        return one;
    }

    process *current = nullptr;
    int regions = 0; // that the test bench is in

    // ---- FIFOs
    channel *open(const std::string &given) {
        const std::string place = current ? current->path : regions ? "top" : "";
        int &count = current ? current->named : regions ? top_named : bench_named;
        const std::string key = place + "#" + std::to_string(count++);
        std::unique_ptr<channel> &found = channels[key];
        if (!found) {
            found.reset(new channel);
            found->id = order.size();
            found->depth = current || regions ? assumed_depth : 0;
            found->name = key;
            order.push_back(found.get());
        }
        if (!given.empty())
            name(found.get(), given);
        return found.get();
    }
    void name(channel *fifo, const std::string &given) {
        fifo->name = current && !current->path.empty() ? current->path + "/" + given : given;
    }
    void depth(channel *fifo, long value) {
        if (current || regions)
            fifo->depth = fixed_depth > 0 ? fixed_depth : value;
    }

    bool written(channel *fifo) { // a blocking write; its value is the reader's once its cycle is known
        if (!current) {
            fifo->wrote.push_back(-1);
            fifo->writes++;
            return true;
        }
        fifo->writer = current;
        place(fifo, true, fifo->writes++);
        return true;
    }
    void read(channel *fifo, bool empty) {
        if (!current) {
            if (empty)
                fail("the test bench reads " + fifo->name + ", which is empty");
            fifo->reads++;
            return;
        }
        fifo->reader = current;
        place(fifo, false, fifo->reads++);
    }
    // What a non-blocking access finds.
    bool try_access(channel *fifo, bool write, bool only_ask = false) {
        if (!current)
            return write || fifo->reads < fifo->writes;
        process &own = *current;
        dynamic = true;
        (write ? fifo->writer : fifo->reader) = current;
        const access wanted = {stage(fifo, write), fifo, write, write ? fifo->writes : fifo->reads};
        commit(wanted.local + 1);
        const cycle t = std::max(own.at, own.at + wanted.local - own.local);
        if (!wanted.known()) {
            own.asked = t;
            own.needs = wanted;
            own.denied = false;
            sleep(asks);
        }
        const bool found = wanted.known() && wanted.ready() <= t;
        if (wanted.local > own.local) {
            own.at = t;
            own.local = wanted.local;
        }
        if (found && !only_ask) {
            (write ? fifo->writes : fifo->reads)++;
            (write ? fifo->wrote : fifo->taken).push_back(t);
            remember(fifo, write);
        }
        return found;
    }

    // ---- loops
    void begin(const rules &loop) {
        const int number = loop.number;
        if (!current)
            return;
        process &own = *current;
        if (own.open) {
            if (!own.soft) { // a loop in a pipelined one is unrolled
                own.nested++;
                return;
            }
            hollow.insert(own.site); // not the innermost, as it turns out: no pipeline of its own
            leave();
        }
        if (hollow.count(number))
            return;
        if (!own.early || own.site != number)
            iterate(loop);
        own.early = false;
        own.open = true;
        own.soft = loop.automatic;
        own.nested = 0;
    }
    void end(int number) {
        if (!current)
            return;
        process &own = *current;
        if (own.nested) {
            own.nested--;
        } else if (own.open && own.site == number) {
            own.open = false;
            own.in_iteration = own.nests > 0;
        }
    }
    // A loop with one loop in it: they are flattened, so what stands before and after the inner one is in its first and
    // last iteration.
    bool begin_nest(const rules &loop) {
        if (!current || current->open || hollow.count(loop.number) || hollow_nests.count(loop.number))
            return false;
        if (!current->early)
            iterate(loop);
        current->early = true;
        current->nests++;
        return true;
    }
    void end_nest() {
        process &own = *current;
        if (own.nests && !--own.nests)
            own.in_iteration = own.early = false;
    }
    void wait() { // ap_wait()
        if (current)
            current->late++;
    }

    // ---- regions
    process *spawn(const std::string &label, std::function<void()> body) {
        const std::string path = (current && !current->path.empty() ? current->path + "/" : "") + label;
        std::unique_ptr<process> &found = processes[path];
        if (!found) {
            found.reset(new process);
            found->path = path;
            found->id = all.size();
            all.push_back(found.get());
        }
        process &own = *found;
        own.parent = current;
        if (current) {
            current->children++;
            own.at = std::max(own.at, current->at);
        } else {
            top_children++;
        }
        own.body = body;
        own.local = own.cursor = 0;
        own.site = -1;
        own.passes = own.trips = own.named = 0;
        own.straight = own.in_iteration = own.open = own.early = false;
        own.nests = own.nested = 0;
        own.now.clear();
        if (!own.stack)
            own.stack = mmap(0, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (own.stack == MAP_FAILED)
            fail("no memory for the stack of " + path);
        getcontext(&own.context);
        own.context.uc_stack.ss_sp = own.stack;
        own.context.uc_stack.ss_size = stack_bytes;
        own.context.uc_link = 0;
        makecontext(&own.context, (void (*)())enter, 0);
        own.is = running;
        live.push_back(&own);
        return &own;
    }
    void join() {
        if (current) {
            if (current->children)
                sleep(joins);
            return;
        }
        schedule();
        top_named = 0;
        frames.push_back(std::vector<cycle>());
        recording = false; // a frame's accesses are what is recorded
    }

    [[noreturn]] void fail(const std::string &why) {
        fprintf(stderr, "%s\n", why.c_str());
        exit(4);
    }

  private:
    std::map<std::string, std::unique_ptr<channel>> channels;
    std::map<std::string, std::unique_ptr<process>> processes;
    std::vector<channel *> order;
    std::vector<process *> all, live;
    std::map<int, site> assumed, seen;
    std::set<int> hollow, hollow_nests; // loops with loops in what they call
    std::vector<pass> passes;
    std::vector<record> records;
    std::vector<std::vector<cycle>> frames;
    ucontext_t main_context;
    int top_named = 0, bench_named = 0, top_children = 0;
    long asked_in_vain = 0;
    long assumed_depth = 2, fixed_depth = 0;
    int loop_depth = 12;
    bool dynamic = false, recording = true;
    const size_t stack_bytes = size_t(64) << 20;

    static long number_of(const char *name, long otherwise) {
        const char *text = getenv(name);
        return text ? atol(text) : otherwise;
    }
    engine() {
        loop_depth = number_of("M3VIT_DATAFLOW_DEPTH", loop_depth);
        fixed_depth = number_of("M3VIT_DATAFLOW_FIFO", 0);
        if (fixed_depth)
            assumed_depth = fixed_depth;
        // "loop II depth" of those that have others than their pragma's and the default
        if (const char *path = getenv("M3VIT_DATAFLOW_LOOPS")) {
            if (FILE *file = fopen(path, "r")) {
                int loop, ii, depth;
                while (fscanf(file, "%d %d %d", &loop, &ii, &depth) == 3)
                    assumed[loop] = {ii, depth, 0};
                fclose(file);
            }
        }
    }
    ~engine() { report(""); }

    void iterate(const rules &loop) {
        process &own = *current;
        if (own.early) { // another loop than the one that was thought to be the only one
            hollow_nests.insert(own.site);
            leave();
        }
        if (loop.number != own.site || own.straight) {
            drain();
            const site known = as_assumed(loop);
            own.site = loop.number;
            own.ii = known.ii;
            own.depth = known.depth;
            own.waits = loop.waits;
            own.first = known.first;
            own.begun = own.cursor;
            own.trips = 0;
            own.passes++;
            begin_pass(loop.number, known.ii);
        } else {
            own.begun += std::max<cycle>(own.ii, most_accesses());
        }
        own.straight = false;
        own.trips++;
        own.late = 0;
        own.now.clear();
        own.in_iteration = true;
    }
    void leave() {
        current->open = current->in_iteration = current->early = false;
        current->nests = 0;
        drain();
    }
    site as_assumed(const rules &loop) {
        site value = {std::max(1, loop.ii), loop.depth ? loop.depth : loop_depth, 0};
        std::map<int, site>::iterator other = assumed.find(loop.number);
        if (other != assumed.end())
            value = other->second;
        value.depth = std::max(1, value.depth);
        value.first = std::min(loop.counted ? 1 : 0, value.depth - 1);
        seen[loop.number] = value;
        return value;
    }
    cycle most_accesses() const {
        cycle most = 1;
        for (channel *one : current->now)
            most = std::max<cycle>(most, std::count(current->now.begin(), current->now.end(), one));
        return most;
    }
    void begin_pass(int number, unsigned ii) {
        if (!recording)
            return;
        current->pass_id = passes.size();
        passes.push_back({current->id, number, 0, ii});
    }
    void close_pass(cycle trips) {
        if (recording && current->pass_id >= 0)
            passes[current->pass_id].trips = trips;
        current->pass_id = -1;
    }
    // What follows a loop begins when it has drained.
    void drain() {
        process &own = *current;
        if (own.straight) {
            own.cursor++;
            close_pass(own.cursor - own.begun);
        } else if (own.site >= 0) {
            own.cursor = own.begun + std::max<cycle>(own.depth, own.ii) + 1;
            close_pass(own.trips);
        }
        own.straight = false;
        own.site = -1;
        own.now.clear();
    }
    int first_stage(bool write) const {
        const int last = current->depth - 1;
        return write ? std::max(0, last - current->waits) : current->first;
    }
    // The cycle, without stalls, of an access by the process that runs.
    cycle stage(channel *fifo, bool write) {
        process &own = *current;
        const cycle again = std::count(own.now.begin(), own.now.end(), fifo);
        if (own.in_iteration) {
            own.now.push_back(fifo);
            return own.begun + first_stage(write) + own.late + again;
        }
        if (!own.straight) {
            drain();
            own.straight = true;
            own.passes++;
            own.begun = own.cursor;
            own.late = 0;
            begin_pass(-1, 1);
        } else if (again || write == own.now_read) {
            own.cursor++;
            own.now.clear();
        }
        own.now.push_back(fifo);
        own.now_read = !write;
        return own.cursor;
    }
    void remember(channel *fifo, bool write) {
        process &own = *current;
        if (!recording || own.pass_id < 0)
            return;
        const uint32_t iteration = own.in_iteration ? own.trips - 1 : own.cursor - own.begun;
        const uint32_t again = own.in_iteration ? std::count(own.now.begin(), own.now.end(), fifo) - 1 : 0;
        records.push_back({(uint32_t)own.pass_id, uint32_t(2 * fifo->id + write), uint32_t(own.late) + again, iteration});
    }
    void place(channel *fifo, bool write, long number) {
        process &own = *current;
        const access one = {stage(fifo, write), fifo, write, number};
        remember(fifo, write);
        // Before this, nothing is due any more; what the next iterations read is due before what this one writes.
        commit(write && own.in_iteration ? own.begun + own.first : one.local);
        if (!write)
            while (!one.known()) {
                own.needs = one;
                sleep(waits);
            }
        std::vector<access>::iterator after = own.due.end();
        while (after != own.due.begin() && (after - 1)->local > one.local)
            --after;
        own.due.insert(after, one);
    }
    // Let everything happen that is due before a cycle.
    void commit(cycle before) {
        process &own = *current;
        while (!own.due.empty() && own.due.front().local < before) {
            const cycle due = own.due.front().local;
            size_t last = 0;
            const cycle unhindered = own.at + due - own.local;
            cycle t = unhindered;
            const access *slowest = nullptr;
            for (; last < own.due.size() && own.due[last].local == due; last++) {
                const access &one = own.due[last];
                while (!one.known()) {
                    own.needs = one;
                    sleep(waits);
                }
                if (one.ready() > t) {
                    t = one.ready();
                    slowest = &one;
                }
            }
            if (slowest)
                (slowest->write ? slowest->fifo->full : slowest->fifo->empty) += t - unhindered;
            for (size_t i = 0; i < last; i++)
                (own.due[i].write ? own.due[i].fifo->wrote : own.due[i].fifo->taken).push_back(t);
            own.due.erase(own.due.begin(), own.due.begin() + last);
            own.at = t;
            own.local = due;
        }
    }
    void finish() {
        process &own = *current;
        const bool one_loop = own.passes == 1 && own.site >= 0;
        const cycle last = own.begun, again = last + std::max<cycle>(own.ii, 1) + 1;
        drain();
        cycle from = one_loop ? again : own.cursor;
        // When the next frame may begin: stalls of what is due before then count.
        commit(from);
        const cycle restart = own.at + from - own.local;
        commit(INT64_MAX);
        own.at = std::max<cycle>(restart, 0);
        own.is = ended;
        if (own.parent)
            own.parent->children--;
        else
            top_children--;
    }
    static void enter() {
        engine &own = get();
        own.current->body();
        own.finish();
        process *me = own.current;
        own.current = nullptr;
        swapcontext(&me->context, &own.main_context);
    }
    void sleep(state why) {
        process *me = current;
        me->is = why;
        current = nullptr;
        swapcontext(&me->context, &main_context);
        current = me;
        me->is = running;
    }
    static bool can_run(const process &one) {
        switch (one.is) {
        case waits:
            return one.needs.known();
        case asks:
            return one.denied || one.needs.known();
        case joins:
            return one.children == 0;
        default:
            return one.is == running;
        }
    }
    void schedule() {
        while (top_children) {
            bool ran = false, answered = false;
            for (size_t i = 0; i < live.size(); i++) {
                process *one = live[i];
                if (!can_run(*one))
                    continue;
                ran = true;
                answered |= one->is != asks || !one->denied;
                current = one;
                swapcontext(&main_context, &one->context);
            }
            live.erase(std::remove_if(live.begin(), live.end(), [](process *one) { return one->is == ended; }), live.end());
            if (ran) {
                asked_in_vain = answered ? 0 : asked_in_vain;
                continue;
            }
            // Nobody can go on: what the earliest of those that ask asks for will not have happened.
            process *first = nullptr;
            for (process *one : live)
                if (one->is == asks && (!first || one->asked < first->asked))
                    first = one;
            if (!first)
                deadlock();
            first->denied = true;
            if (++asked_in_vain > 1000000)
                deadlock();
        }
    }
    void deadlock() {
        std::string stuck;
        for (process *one : live)
            if (one->is == waits || one->is == asks) {
                const access &needs = one->needs;
                process *other = needs.write ? needs.fifo->reader : needs.fifo->writer;
                stuck += std::string(stuck.empty() ? "" : ", ") + "[\"" + one->path + "\", \"" +
                         (needs.write ? "writes" : "reads") + "\", \"" + needs.fifo->name + "\", " +
                         std::to_string(needs.fifo->depth) + ", \"" + (other ? other->path : "") + "\"]";
            }
        report(stuck);
        _Exit(3);
    }
    void report(const std::string &stuck);
};

} // namespace m3vit_timed
#endif
