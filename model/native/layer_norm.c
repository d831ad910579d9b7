/* Layer norm over the channels of a feature map. Called by model/cpu/fast_layers.py. */

#include "layer_norm.h"

static ALWAYS_INLINE void normalize_map(const norm *n, const void *x, void *out, int64_t rows, int64_t channels, int threads,
                                        const int is_half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row += LANES) {
        const matrix to = {element(out, row * channels, is_half), channels, PANEL};
        normalize(n, element(x, row * channels, is_half), to, rows - row < LANES ? rows - row : LANES, channels, is_half);
    }
}

/* x, out: (rows, channels), contiguous; channels is a multiple of LANES.  weight, bias: (channels). */
void dinat_layer_norm(int is_half, const void *x, void *out, int64_t rows, int64_t channels, const void *weight,
                      const void *bias, float eps, int threads) {
    const norm n = {weight, bias, eps};
    if (is_half)
        normalize_map(&n, x, out, rows, channels, threads, 1);
    else
        normalize_map(&n, x, out, rows, channels, threads, 0);
}
