/* Layer norm of rows of contiguous channels. */

#include "vectors.h"

/* A matrix with element (r, c) at r * row_stride + c / PANEL * panel_stride + c % PANEL. With a panel_stride of PANEL, rows are
 * contiguous; otherwise the panels (PANEL columns of all rows) are, which is the input format of products. */
enum { PANEL = 32 };

typedef struct {
    void *data;
    int64_t row_stride, panel_stride;
} matrix;

static inline int64_t place(matrix m, int64_t row, int64_t column) {
    return row * m.row_stride + column / PANEL * m.panel_stride + column % PANEL;
}

typedef struct {
    const void *weight, *bias;
    float eps;
} norm;

static inline float total(floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* x: (rows, channels); channels is a multiple of LANES. Means and variances of LANES rows are computed first, so that one
 * vector square root and one division serve all of them. */
static ALWAYS_INLINE void normalize(const norm *n, const void *x, matrix out, int64_t rows, int64_t channels,
                                    const int is_half) {
    for (int64_t first = 0; first < rows; first += LANES) {
        const int64_t count = rows - first < LANES ? rows - first : LANES;
        floats mean = {0}, scale = {0};
        for (int64_t j = 0; j < count; j++) {
            floats sum = {0}, squares = {0};
            const int64_t from = (first + j) * channels;
            for (int64_t i = 0; i < channels; i += LANES) sum += load(x, from + i, is_half);
            const float middle = total(sum) / channels;
            for (int64_t i = 0; i < channels; i += LANES) {
                floats y = load(x, from + i, is_half) - middle;
                squares += y * y;
            }
            mean[j] = middle;
            scale[j] = total(squares) / channels;
        }
        for (int j = 0; j < LANES; j++) scale[j] = 1.0f / __builtin_sqrtf(scale[j] + n->eps);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < channels; i += LANES) {
                floats y = (load(x, (first + j) * channels + i, is_half) - mean[j]) * scale[j];
                y = y * load(n->weight, i, is_half) + load(n->bias, i, is_half);
                store(out.data, place(out, first + j, i), y, is_half);
            }
    }
}
