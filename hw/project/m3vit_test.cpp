// C-simulation test bench of a time-multiplexed project: runs frames through the accelerator's C++, no other library.
//
//   ./csim.exe                                   the frames of tb_data/, compared word for word with the expected outputs
//   ./csim.exe WEIGHTS IMAGES TASKS OUTPUTS [COUNTERS [ROUTING [MEMORIES [START]]]]
//
// IMAGES: uint8 frames [n, H, W, 3]; TASKS: uint8 [n], or [2, n]: tasks, then budgets; OUTPUTS: int32 words of each frame; COUNTERS: a JSON line for
// each frame and instruction that ran; ROUTING: uint16 expert ids, in order of frames, MoE layers, tokens and rank;
// MEMORIES: the narrow, then the wide memory after each frame; START: the same before every frame (else a pattern).
// Exit code: 0; 1 if frames differ from the expected outputs; 2 if a file cannot be used.
#include <chrono>

#include "m3vit_host.h"

using nnet::vit::counters;

static void print_counters(FILE *file, int frame, int pc, const counters &c) {
    fprintf(file,
            "{\"frame\": %d, \"pc\": %d, \"saturated\": %llu, \"image\": %llu, \"weights\": %llu, \"gates\": %llu, "
            "\"params\": %llu, \"narrow_read\": %llu, \"narrow_write\": %llu, \"wide_read\": %llu, \"wide_write\": %llu, "
            "\"output\": %llu, \"expert_loads\": %llu}\n",
            frame, pc, c.saturated, c.image, c.weights, c.gates, c.params, c.narrow_read, c.narrow_write, c.wide_read,
            c.wide_write, c.output, c.expert_loads);
}

int main(int argc, char **argv) {
    const bool check = argc < 5;
    std::vector<char> images, tasks, expected, start;
    device_memory memory;
    if (!memory.load(check ? "firmware/weights/weights.bin" : argv[1]) ||
        !read_file(check ? "tb_data/images.bin" : argv[2], images) ||
        !read_file(check ? "tb_data/tasks.bin" : argv[3], tasks))
        return 2;
    if (check && !read_file("tb_data/expected_outputs.bin", expected))
        return 2;
    const size_t narrow_bytes = (size_t)memory.head.narrow * sizeof(vit_cfg::act_t);
    const size_t wide_bytes = (size_t)memory.head.wide * sizeof(vit_cfg::wide_t);
    if (argc > 8 && (!read_file(argv[8], start) || start.size() != narrow_bytes + wide_bytes)) {
        fprintf(stderr, "csim: %s is not %zu bytes of memories\n", argv[8], narrow_bytes + wide_bytes);
        return 2;
    }
    const size_t frame_bytes = (size_t)memory.head.image;
    const size_t frames = frame_bytes ? images.size() / frame_bytes : tasks.size();
    if (tasks.size() != 2 * frames)
        tasks.resize(tasks.size() + frames); // the first budget
    const size_t output_bytes = (size_t)memory.head.output * sizeof(int32_t);
    if (images.size() != frames * frame_bytes || tasks.size() != 2 * frames ||
        (check && expected.size() != frames * output_bytes)) {
        fprintf(stderr, "csim: %zu bytes of images (and %zu of outputs) are not %zu frames of %zu\n", images.size(),
                expected.size(), frames, frame_bytes);
        return 2;
    }
    FILE *out = fopen(check ? "tb_data/csim_outputs.bin" : argv[4], "wb");
    FILE *log = argc > 5 ? fopen(argv[5], "w") : 0;
    nnet::vit::routing_log() = argc > 6 ? fopen(argv[6], "wb") : 0;
    FILE *memories = argc > 7 ? fopen(argv[7], "wb") : 0;
    if (!out || (argc > 7 && !memories) || (argc > 5 && !log) || (argc > 6 && !nnet::vit::routing_log())) {
        fprintf(stderr, "csim: cannot write the outputs\n");
        return 2;
    }
    std::vector<counters> counts((size_t)memory.head.instructions + 1);
    nnet::vit::program_counters() = counts.data();
    size_t different = 0;
    unsigned long long saturated = 0;
    double seconds = 0;
    for (size_t frame = 0; frame < frames; frame++) {
        memset(counts.data(), 0, counts.size() * sizeof(counters));
        memory.fill((int)frame);
        if (!start.empty()) {
            memcpy((void *)memory.narrow.data(), start.data(), narrow_bytes);
            memcpy((void *)memory.wide.data(), start.data() + narrow_bytes, wide_bytes);
        }
        const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
        memory.run((const uint8_t *)images.data() + frame * frame_bytes, (unsigned char)tasks[frame],
                   (unsigned char)tasks[frames + frame]);
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        fwrite(memory.output.data(), 1, output_bytes, out);
        if (memories) {
            fwrite(memory.narrow.data(), 1, narrow_bytes, memories);
            fwrite(memory.wide.data(), 1, wide_bytes, memories);
        }
        for (size_t pc = 0; pc < counts.size(); pc++) {
            saturated += counts[pc].saturated;
            if (log)
                print_counters(log, (int)frame, (int)pc, counts[pc]);
        }
        if (check && memcmp(memory.output.data(), expected.data() + frame * output_bytes, output_bytes) != 0)
            different++;
    }
    fclose(out);
    if (log)
        fclose(log);
    if (memories)
        fclose(memories);
    if (nnet::vit::routing_log())
        fclose(nnet::vit::routing_log());
    printf("csim: %zu frames, %.3f s a frame, %llu values saturated\n", frames, seconds / (double)(frames ? frames : 1),
           saturated);
    if (check)
        printf("csim: %zu of %zu frames differ from the expected outputs\n", different, frames);
    return different ? 1 : 0;
}
