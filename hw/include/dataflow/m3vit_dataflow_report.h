// What is written of a run, for m3vit/hw/dataflow.py.
#ifndef M3VIT_DATAFLOW_REPORT_H_
#define M3VIT_DATAFLOW_REPORT_H_

#include "m3vit_dataflow_engine.h"

namespace m3vit_timed {

inline void list(FILE *file, const char *name, const std::vector<cycle> &values) {
    fprintf(file, "\"%s\": [%ld", name, (long)values.size());
    // the first and last of each frame are enough, but frames are the reader's to know
    if (!values.empty())
        fprintf(file, ", %ld, %ld", (long)values.front(), (long)values.back());
    fputs("]", file);
}
// A line of JSON, and, for another evaluation, the passes and accesses of the first frame.
inline void engine::report(const std::string &stuck) {
    const char *path = getenv("M3VIT_DATAFLOW_TRACE");
    FILE *file = path ? fopen(path, "wb") : 0;
    if (!file)
        return;
    fprintf(file, "{\"deadlock\": [%s], \"dynamic\": %s, \"frames\": %ld, ", stuck.c_str(), dynamic ? "true" : "false",
            (long)frames.size());
    fputs("\"fifos\": [", file);
    for (size_t i = 0; i < order.size(); i++) {
        fprintf(file, "%s{\"name\": \"%s\", \"depth\": %ld, ", i ? ", " : "", order[i]->name.c_str(), order[i]->depth);
        fprintf(file, "\"empty\": %ld, \"full\": %ld, ", (long)order[i]->empty, (long)order[i]->full);
        fprintf(file, "\"writer\": %d, \"reader\": %d, ", order[i]->writer ? order[i]->writer->id : -1,
                order[i]->reader ? order[i]->reader->id : -1);
        list(file, "wrote", order[i]->wrote);
        fputs(", ", file);
        list(file, "taken", order[i]->taken);
        if (!order[i]->depth && order[i]->writer) { // what leaves: every cycle, for intervals between frames
            fputs(", \"cycles\": [", file);
            const char *comma = "";
            for (cycle at : order[i]->wrote)
                if (at >= 0) { // not what a test bench writes
                    fprintf(file, "%s%ld", comma, (long)at);
                    comma = ", ";
                }
            fputs("]", file);
        }
        fputs("}", file);
    }
    fputs("], \"processes\": [", file);
    for (size_t i = 0; i < all.size(); i++)
        fprintf(file, "%s{\"name\": \"%s\", \"end\": %ld}", i ? ", " : "", all[i]->path.c_str(), (long)all[i]->at);
    fputs("], \"loops\": [", file);
    bool first = true;
    for (const std::pair<const int, site> &one : seen) {
        fprintf(file, "%s[%d, %d, %d, %d]", first ? "" : ", ", one.first, one.second.ii, one.second.depth, one.second.first);
        first = false;
    }
    fprintf(file, "], \"passes\": %ld, \"accesses\": %ld}\n", (long)passes.size(), (long)records.size());
    fwrite(passes.data(), sizeof(pass), passes.size(), file);
    fwrite(records.data(), sizeof(record), records.size(), file);
    fclose(file);
}

} // namespace m3vit_timed
#endif
