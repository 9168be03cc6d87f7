// What a program that runs the accelerator's C++ needs: the weights file in memory, and the memories of one frame.
#ifndef M3VIT_HOST_H_
#define M3VIT_HOST_H_

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "firmware/m3vit.h"

inline bool read_file(const char *path, std::vector<char> &data) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "m3vit: cannot read %s\n", path);
        return false;
    }
    fseek(file, 0, SEEK_END);
    data.resize((size_t)ftell(file));
    rewind(file);
    const bool ok = fread(data.data(), 1, data.size(), file) == data.size();
    fclose(file);
    return ok;
}

// DDR as the accelerator sees it.
struct device_memory {
    nnet::vit::file_header head;
    std::vector<vit_words::params> params, output;
    std::vector<vit_words::wide> wide;
    std::vector<vit_words::weights> weights;
    std::vector<vit_words::gates> gates;
    std::vector<vit_words::narrow> narrow;

    bool load(const char *path) {
        std::vector<char> data;
        if (!read_file(path, data) || data.size() < sizeof head)
            return false;
        memcpy(&head, data.data(), sizeof head);
        const int wide_bits = head.wide_bits ? (int)head.wide_bits : 32; // 0 in older files
        if (head.weight_bits != (int64_t)(8 * sizeof(vit_cfg::wt_t)) || head.act_bits != vit_cfg::act_bits ||
            wide_bits != vit_cfg::wide_bits) {
            fprintf(stderr, "m3vit: %s is for %d-bit words and %d-bit activations, and a residual stream of %d bits, not this "
                    "accelerator's\n", path, (int)head.weight_bits, (int)head.act_bits, wide_bits);
            return false;
        }
        if (head.two_bytes && !vit_cfg::two_bytes) {
            fprintf(stderr, "m3vit: %s has activations of two bytes, which this accelerator has not\n", path);
            return false;
        }
        section(data, head.params_at, head.params_words * (int64_t)sizeof(int32_t), params);
        section(data, head.weights_at, head.weights_words * (int64_t)sizeof(vit_cfg::wt_t), weights);
        section(data, head.gates_at, head.gates_words * (int64_t)sizeof(int16_t), gates);
        narrow.resize(whole<vit_words::narrow>(head.narrow * (int64_t)sizeof(vit_cfg::act_t)));
        wide.resize(whole<vit_words::wide>(head.wide * (int64_t)sizeof(vit_cfg::wide_t)));
        output.resize(whole<vit_words::params>(head.output * (int64_t)sizeof(int32_t)));
        return true;
    }

    // Fill the memories with a pattern: nothing of the frame before can be read.
    void fill(int pattern) {
        memset((void *)narrow.data(), 0x5a + pattern, narrow.size() * sizeof(vit_words::narrow));
        memset((void *)wide.data(), 0x35 + pattern, wide.size() * sizeof(vit_words::wide));
    }

    // The instruction that a frame of a budget begins with; an unknown one is 0.
    unsigned entry(unsigned budget) const {
        return budget < (unsigned)head.programs ? (unsigned)((const int32_t *)params.data())[head.programs_at + budget] : 0;
    }

    // Run one frame.
    void run(const uint8_t *image, unsigned task, unsigned budget = 0) {
        memset((void *)output.data(), 0, output.size() * sizeof(vit_words::params));
        m3vit((const vit_words::image *)image, task, (unsigned)head.tasks, entry(budget), weights.data(), weights.data(),
              gates.data(), params.data(), narrow.data(), narrow.data(), narrow.data(), wide.data(), wide.data(),
              wide.data(), wide.data(), output.data());
    }

  private:
    // How many words of a port hold so many bytes.
    template <class T> static size_t whole(int64_t bytes) { return ((size_t)bytes + sizeof(T) - 1) / sizeof(T); }

    template <class T>
    static void section(const std::vector<char> &data, int64_t place, int64_t bytes, std::vector<T> &part) {
        part.resize(whole<T>(bytes) + 1); // one more: an empty section has an address too
        memcpy((void *)part.data(), data.data() + place, (size_t)bytes);
    }
};

#endif
