/* Layer norm over the channels of a map, which lie side by side. */

#include "vectors.h"

enum { MOST_CHANNELS = 4096 };

static inline float total(floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

static inline __attribute__((always_inline)) void normalize(const void *x, void *out, int64_t rows, int64_t channels,
                                                            const void *weight, const void *bias, float eps, int threads,
                                                            const int is_half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        floats kept[MOST_CHANNELS / LANES], sum = {0}, squares = {0};
        const int64_t parts = channels / LANES, from = row * channels;
        for (int64_t i = 0; i < parts; i++) {
            kept[i] = load(x, from + i * LANES, is_half);
            sum += kept[i];
        }
        const floats mean = splat(total(sum) / channels);
        for (int64_t i = 0; i < parts; i++) {
            kept[i] -= mean;
            squares += kept[i] * kept[i];
        }
        const floats scale = splat(1.0f / __builtin_sqrtf(total(squares) / channels + eps));
        for (int64_t i = 0; i < parts; i++) {
            floats y = kept[i] * scale * load(weight, i * LANES, is_half) + load(bias, i * LANES, is_half);
            store(out, from + i * LANES, y, is_half);
        }
    }
}

/* x, out: rows of `channels` numbers, a multiple of LANES and at most MOST_CHANNELS.  weight, bias: of each channel. */
void dinat_layer_norm(int is_half, const void *x, void *out, int64_t rows, int64_t channels, const void *weight,
                      const void *bias, float eps, int threads) {
    if (is_half)
        normalize(x, out, rows, channels, weight, bias, eps, threads, 1);
    else
        normalize(x, out, rows, channels, weight, bias, eps, threads, 0);
}
