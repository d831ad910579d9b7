/* Resizing of pictures, to the bit as Pillow does it: along rows and along columns, each pixel the sum of whole numbers. */

#include "vectors.h"

enum { BITS = 22, HALF = 1 << (BITS - 1), TAPS = LANES / 4, ROWS = 4 };

typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int32_t quad __attribute__((vector_size(16)));
typedef uint8_t pixel __attribute__((vector_size(4)));

static inline ints from_bytes(const uint8_t *from) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); /* which not every compiler finds by itself */
#else
    bytes x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, ints);
#endif
}

/* The pixel that a sum stands for, 0 to 255. */
static inline pixel rounded(quad sum) {
    sum = (sum + HALF) >> BITS;
    sum &= ~(sum >> 31); /* below 0: 0 */
    quad above = sum > 255;
    return __builtin_convertvector((above & 255) | (~above & sum), pixel);
}

/* Some rows of `width` pixels of 4 bytes to `out_width` pixels of `kept` bytes, together: so weights are read once, and sums do
 * not wait for each other. A pixel is the sum of `steps` times TAPS pixels from starts[x] on, each of their four bytes times its
 * number in `weights`. */
static inline __attribute__((always_inline)) void along_some(const uint8_t *picture, const int rows, int64_t width, uint8_t *out,
                                                             int64_t out_width, const int kept, const int32_t *starts,
                                                             const int32_t *weights, int64_t steps) {
    for (int64_t x = 0; x < out_width; x++) {
        const uint8_t *from = picture + starts[x] * 4;
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
            memcpy(out + (row * out_width + x) * kept, &made, kept);
        }
    }
}

static inline __attribute__((always_inline)) void along_rows(const uint8_t *picture, int64_t height, int64_t width,
                                                             uint8_t *out, int64_t out_width, const int kept,
                                                             const int32_t *starts, const int32_t *weights, int64_t steps) {
    int64_t y = 0;
    for (; y + ROWS <= height; y += ROWS)
        along_some(picture + y * width * 4, ROWS, width, out + y * out_width * kept, out_width, kept, starts, weights, steps);
    for (; y < height; y++)
        along_some(picture + y * width * 4, 1, width, out + y * out_width * kept, out_width, kept, starts, weights, steps);
}

/* Rows of `width` pixels of 4 bytes to `out_height` rows of as many of `kept` bytes. Row y is the sum of counts[y] rows from
 * starts[y] on, each times its number in `weights`, `most` for each y. At least TAPS pixels wide. */
static inline __attribute__((always_inline)) void along_columns(const uint8_t *picture, int64_t width, uint8_t *out,
                                                                int64_t out_height, const int kept, const int32_t *starts,
                                                                const int32_t *counts, const int32_t *weights, int64_t most) {
    for (int64_t y = 0; y < out_height; y++) {
        const uint8_t *from = picture + starts[y] * width * 4;
        uint8_t *to = out + y * width * kept;
        for (int64_t next = 0; next < width; next += TAPS) {
            const int64_t x = next + TAPS <= width ? next : width - TAPS; /* the last ones perhaps twice */
            ints sums = {0};
            for (int64_t row = 0; row < counts[y]; row++)
                sums += from_bytes(from + (row * width + x) * 4) * weights[y * most + row];
            quad parts[TAPS];
            memcpy(parts, &sums, sizeof sums);
            for (int i = 0; i < TAPS; i++) {
                pixel made = rounded(parts[i]);
                memcpy(to + (x + i) * kept, &made, kept);
            }
        }
    }
}

/* picture: (height, width, 4).  out: (out_height, out_width, 3).  between: (height, out_width, 4), or with columns_first
 * (out_height, width, 4).  x_weights: LANES for each step, a tap's number four times. */
void dinat_resample(int columns_first, const uint8_t *picture, int64_t height, int64_t width, uint8_t *between, uint8_t *out,
                    int64_t out_height, int64_t out_width, const int32_t *x_starts, const int32_t *x_weights, int64_t x_steps,
                    const int32_t *y_starts, const int32_t *y_counts, const int32_t *y_weights, int64_t y_most) {
    if (columns_first) {
        along_columns(picture, width, between, out_height, 4, y_starts, y_counts, y_weights, y_most);
        along_rows(between, out_height, width, out, out_width, 3, x_starts, x_weights, x_steps);
    } else {
        along_rows(picture, height, width, between, out_width, 4, x_starts, x_weights, x_steps);
        along_columns(between, out_width, out, out_height, 3, y_starts, y_counts, y_weights, y_most);
    }
}
