// hls4ml's compile() and predict(): inputs and outputs as the ModelGraph has them, in front of the accelerator's C++.
//
// tokens: [T, 3 p^2] of pixel / 256 in the order (colour, y, x); task: [1]; outputs: [T, widest task], as numbers.
#include <math.h>
#include <stdlib.h>

#include "firmware/model.h"
#include "m3vit_host.h"

static device_memory &memory() {
    static device_memory loaded;
    static const bool ok = loaded.load(WEIGHTS_DIR "/weights.bin");
    if (!ok)
        abort();
    return loaded;
}

template <class T> static void run(const T *tokens, const T *task, T *outputs) {
    const int p = vit_model::patch, line = vit_model::columns * p;
    std::vector<uint8_t> image((size_t)memory().head.image);
    for (int t = 0; t < vit_model::rows * vit_model::columns; t++) {
        for (int i = 0; i < 3 * p * p; i++) {
            const int y = t / vit_model::columns * p + i / p % p, x = t % vit_model::columns * p + i % p;
            const double value = tokens[t * 3 * p * p + i];
            image[(size_t)((y * line + x) * 3 + i / (p * p))] = (uint8_t)lround(value * 256);
        }
    }
    const unsigned id = (unsigned)task[0] < (unsigned)memory().head.tasks ? (unsigned)task[0] : 0;
    memory().fill(0);
    memory().run(image.data(), id);
    // Rows of the output memory begin at words of its port; those of predict() lie side by side.
    const int32_t *words = (const int32_t *)memory().output.data();
    const int count = vit_model::pixel_outputs(id), pitch = vit_model::pixel_pitch(id);
    for (int t = 0; t < vit_model::rows * vit_model::columns; t++) {
        for (int i = 0; i < vit_model::outputs; i++) {
            const bool own = i < vit_model::pixels * count; // else of a wider task
            const int32_t word = own ? words[t * vit_model::token_pitch + i / count * pitch + i % count] : 0;
            outputs[t * vit_model::outputs + i] = (T)ldexp((double)word, -vit_model::output_frac(id));
        }
    }
}

extern "C" {
void m3vit_float(float *tokens, float *task, float *outputs) { run(tokens, task, outputs); }
void m3vit_double(double *tokens, double *task, double *outputs) { run(tokens, task, outputs); }
}
