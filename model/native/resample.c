/* Image resizing, bit-exact with Pillow: a horizontal and a vertical pass, each with fixed-point weights and integer sums.
 * Called by model/cpu/resize.py. */

#include "vectors.h"

enum { BITS = 22, HALF = 1 << (BITS - 1), TAPS = LANES / 4, ROWS = 4 };

typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int32_t quad __attribute__((vector_size(16)));
typedef uint8_t pixel __attribute__((vector_size(4)));

static inline ints from_bytes(const uint8_t *from) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); /* not every compiler generates this below */
#else
    bytes x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, ints);
#endif
}

/* Round fixed-point sums to pixels, clamped to 0 to 255. */
static inline pixel rounded(quad sum) {
    sum = (sum + HALF) >> BITS;
    sum &= ~(sum >> 31); /* negative values become 0 */
    quad above = sum > 255;
    return __builtin_convertvector((above & 255) | (~above & sum), pixel);
}

/* Resize `rows` rows of `width` pixels of 4 bytes to `out_width` pixels of `channels` bytes. Several rows are processed
 * together, so that weights are read once and the sums are independent. Output pixel x is the sum of steps * TAPS input pixels
 * starting at starts[x], each byte multiplied by its weight. */
static ALWAYS_INLINE void along_some(const uint8_t *image, const int rows, int64_t width, uint8_t *out,
                                                             int64_t out_width, const int channels, const int32_t *starts,
                                                             const int32_t *weights, int64_t steps) {
    for (int64_t x = 0; x < out_width; x++) {
        const uint8_t *from = image + starts[x] * 4;
        const int32_t *weight = weights + x * steps * LANES;
        ints sums[ROWS] = {{0}}, w;
        for (int64_t step = 0; step < steps; step++) {
            memcpy(&w, weight + step * LANES, sizeof w);
            for (int row = 0; row < rows; row++) sums[row] += from_bytes(from + row * width * 4 + step * LANES) * w;
        }
        for (int row = 0; row < rows; row++) {
            quad parts[TAPS], sum = {0};
            memcpy(parts, &sums[row], sizeof parts);
            for (int tap = 0; tap < TAPS; tap++) sum += parts[tap];
            pixel made = rounded(sum);
            memcpy(out + (row * out_width + x) * channels, &made, channels);
        }
    }
}

static ALWAYS_INLINE void along_rows(const uint8_t *image, int64_t height, int64_t width,
                                                             uint8_t *out, int64_t out_width, const int channels,
                                                             const int32_t *starts, const int32_t *weights, int64_t steps) {
    int64_t y = 0;
    for (; y + ROWS <= height; y += ROWS)
        along_some(image + y * width * 4, ROWS, width, out + y * out_width * channels, out_width, channels, starts, weights,
                   steps);
    for (; y < height; y++)
        along_some(image + y * width * 4, 1, width, out + y * out_width * channels, out_width, channels, starts, weights,
                   steps);
}

/* Resize rows of `width` pixels of 4 bytes to `out_height` rows of pixels of `channels` bytes. Output row y is the sum of
 * counts[y] input rows starting at starts[y], each multiplied by its weight; `weights` has `most` entries per output row. The
 * width must be at least TAPS. */
static ALWAYS_INLINE void along_columns(const uint8_t *image, int64_t width, uint8_t *out,
                                                                int64_t out_height, const int channels, const int32_t *starts,
                                                                const int32_t *counts, const int32_t *weights, int64_t most) {
    for (int64_t y = 0; y < out_height; y++) {
        const uint8_t *from = image + starts[y] * width * 4;
        uint8_t *to = out + y * width * channels;
        for (int64_t next = 0; next < width; next += TAPS) {
            const int64_t x = next + TAPS <= width ? next : width - TAPS; /* the last pixels may be computed twice */
            ints sums = {0};
            for (int64_t row = 0; row < counts[y]; row++)
                sums += from_bytes(from + (row * width + x) * 4) * weights[y * most + row];
            quad parts[TAPS];
            memcpy(parts, &sums, sizeof sums);
            for (int i = 0; i < TAPS; i++) {
                pixel made = rounded(parts[i]);
                memcpy(to + (x + i) * channels, &made, channels);
            }
        }
    }
}

/* image: (height, width, 4).  out: (out_height, out_width, 3).  between: (height, out_width, 4), or (out_height, width, 4) with
 * columns_first, which runs the vertical pass first.  x_weights: LANES per step, the weight of each tap repeated four times. */
void dinat_resample(int columns_first, const uint8_t *image, int64_t height, int64_t width, uint8_t *between, uint8_t *out,
                    int64_t out_height, int64_t out_width, const int32_t *x_starts, const int32_t *x_weights, int64_t x_steps,
                    const int32_t *y_starts, const int32_t *y_counts, const int32_t *y_weights, int64_t y_most) {
    if (columns_first) {
        along_columns(image, width, between, out_height, 4, y_starts, y_counts, y_weights, y_most);
        along_rows(between, out_height, width, out, out_width, 3, x_starts, x_weights, x_steps);
    } else {
        along_rows(image, height, width, between, out_width, 4, x_starts, x_weights, x_steps);
        along_columns(between, out_width, out, out_height, 3, y_starts, y_counts, y_weights, y_most);
    }
}
