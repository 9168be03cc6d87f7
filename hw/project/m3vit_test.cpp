// C-simulation test bench of a time-multiplexed project: runs frames through the accelerator's C++, no other library.
//
//   ./csim.exe                                   the frames of tb_data/, compared word for word with the expected outputs
//   ./csim.exe WEIGHTS IMAGES TASKS OUTPUTS [COUNTERS [ROUTING]]
//
// IMAGES: uint8 frames [n, H, W, 3]; TASKS: uint8 [n]; OUTPUTS: int32 words of each frame; COUNTERS: a JSON line for each
// frame and instruction that ran; ROUTING: uint16 expert ids, in order of frames, MoE layers, tokens and rank.
// Memories are filled with another pattern before each frame, so nothing can be carried over from the one before.
#include <stdio.h>
#include <string.h>

#include <chrono>
#include <vector>

#include "firmware/m3vit.h"

using nnet::vit::counters;

struct file_header { // m3vit/hw/program.py
    int64_t magic, params_at, params_words, weights_at, weights_words, gates_at, gates_words, weight_bits, act_bits, narrow,
        wide, output, image, tasks, instructions, unused[5];
};

static bool read_file(const char *path, std::vector<char> &data) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "csim: cannot read %s\n", path);
        return false;
    }
    fseek(file, 0, SEEK_END);
    data.resize((size_t)ftell(file));
    rewind(file);
    const bool ok = fread(data.data(), 1, data.size(), file) == data.size();
    fclose(file);
    return ok;
}

static void print_counters(FILE *file, int frame, int pc, const counters &c) {
    fprintf(file,
            "{\"frame\": %d, \"pc\": %d, \"saturated\": %llu, \"image\": %llu, \"weights\": %llu, \"gates\": %llu, "
            "\"params\": %llu, \"narrow_read\": %llu, \"narrow_write\": %llu, \"wide_read\": %llu, \"wide_write\": %llu, "
            "\"output\": %llu, \"expert_loads\": %llu}\n",
            frame, pc, c.saturated, c.image, c.weights, c.gates, c.params, c.narrow_read, c.narrow_write, c.wide_read,
            c.wide_write, c.output, c.expert_loads);
}

template <class T> std::vector<T> section(const std::vector<char> &data, int64_t place, int64_t words) {
    std::vector<T> part((size_t)words + 1); // one more: an empty section has an address too
    memcpy(part.data(), data.data() + place, (size_t)words * sizeof(T));
    return part;
}

int main(int argc, char **argv) {
    const bool check = argc < 5;
    const char *weights_path = check ? "firmware/weights/weights.bin" : argv[1];
    const char *outputs_path = check ? "tb_data/csim_outputs.bin" : argv[4];
    std::vector<char> data, images, tasks, expected;
    if (!read_file(weights_path, data) || !read_file(check ? "tb_data/images.bin" : argv[2], images) ||
        !read_file(check ? "tb_data/tasks.bin" : argv[3], tasks))
        return 2;
    if (check && !read_file("tb_data/expected_outputs.bin", expected))
        return 2;
    file_header head;
    if (data.size() < sizeof head)
        return 2;
    memcpy(&head, data.data(), sizeof head);
    if (head.weight_bits != (int64_t)(8 * sizeof(vit_cfg::wt_t)) || head.act_bits != vit_cfg::act_bits) {
        fprintf(stderr, "csim: %s is for %d-bit words and %d-bit activations, not this accelerator's\n", weights_path,
                (int)head.weight_bits, (int)head.act_bits);
        return 2;
    }
    const std::vector<int32_t> params = section<int32_t>(data, head.params_at, head.params_words);
    const std::vector<vit_cfg::wt_t> weights = section<vit_cfg::wt_t>(data, head.weights_at, head.weights_words);
    const std::vector<int16_t> gates = section<int16_t>(data, head.gates_at, head.gates_words);
    std::vector<vit_cfg::act_t> narrow((size_t)head.narrow);
    std::vector<int32_t> wide((size_t)head.wide), output((size_t)head.output);
    const size_t frames = tasks.size();
    if (images.size() != frames * (size_t)head.image) {
        fprintf(stderr, "csim: %zu bytes of images are not %zu frames of %d\n", images.size(), frames, (int)head.image);
        return 2;
    }
    FILE *out = fopen(outputs_path, "wb");
    FILE *log = argc > 5 ? fopen(argv[5], "w") : 0;
    nnet::vit::routing_log() = argc > 6 ? fopen(argv[6], "wb") : 0;
    if (!out || (argc > 5 && !log) || (argc > 6 && !nnet::vit::routing_log())) {
        fprintf(stderr, "csim: cannot write the outputs\n");
        return 2;
    }
    std::vector<counters> counts((size_t)head.instructions + 1);
    nnet::vit::program_counters() = counts.data();
    size_t different = 0;
    unsigned long long saturated = 0;
    double seconds = 0;
    for (size_t frame = 0; frame < frames; frame++) {
        memset(counts.data(), 0, counts.size() * sizeof(counters));
        memset(narrow.data(), (int)(0x5a + frame), narrow.size() * sizeof(vit_cfg::act_t));
        memset(wide.data(), (int)(0x35 + frame), wide.size() * sizeof(int32_t));
        memset(output.data(), 0, output.size() * sizeof(int32_t));
        const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
        m3vit((const uint8_t *)images.data() + frame * (size_t)head.image, (unsigned char)tasks[frame],
              (unsigned)head.tasks, weights.data(), gates.data(), params.data(), narrow.data(), narrow.data(),
              narrow.data(), wide.data(), wide.data(), output.data());
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        fwrite(output.data(), sizeof(int32_t), output.size(), out);
        for (size_t pc = 0; pc < counts.size(); pc++) {
            saturated += counts[pc].saturated;
            if (log)
                print_counters(log, (int)frame, (int)pc, counts[pc]);
        }
        if (check && (expected.size() != frames * output.size() * 4 ||
                      memcmp(output.data(), expected.data() + frame * output.size() * 4, output.size() * 4) != 0))
            different++;
    }
    fclose(out);
    if (log)
        fclose(log);
    if (nnet::vit::routing_log())
        fclose(nnet::vit::routing_log());
    printf("csim: %zu frames, %.3f s a frame, %llu values saturated\n", frames, seconds / (double)(frames ? frames : 1),
           saturated);
    if (check)
        printf("csim: %zu of %zu frames differ from the expected outputs\n", different, frames);
    return different ? 1 : 0;
}
