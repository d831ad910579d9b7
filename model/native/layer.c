/* Everything in a layer except attention: matrix products over the channels, fused with the layer norm before them and the GELU
 * or residual sum after them. A few rows at a time pass through all of them, so that only the feature map itself is written to
 * memory. Also the downsampling convolutions, which are matrix products as well. Requires AVX-512; bfloat16 also its bfloat16
 * instructions or matrix units (AMX). Called by model/cpu/packing.py. */

#ifdef __AVX512F__

#include "products.h"

#include <omp.h>
#include <stdlib.h>

/* SHARED_ROWS: with fewer rows per thread, all threads process all rows and divide the columns, if there are enough columns:
 * reading weights then dominates, and they are read only once.  SHARED_BYTES: most bytes of a thread's copy of these rows. */
enum { SHARED_ROWS = 256, SHARED_BYTES = 16 << 20 };

/* Rows that pass through a layer together: few, to stay in the L1 cache; or more if the weights of a layer exceed the L2 cache,
 * because every block reads them again. All threads get the same number. */
static int64_t block_rows(int64_t rows, int64_t channels, int64_t threads) {
    const int64_t most = threads * (channels <= 256 ? 64 : 256);
    const int64_t blocks = (rows + most - 1) / most * threads;
    return (rows + blocks - 1) / blocks;
}

static inline matrix in_rows(const void *data, int64_t columns) { return (matrix){(void *)data, columns, PANEL}; }

static inline matrix in_panels(void *data, int64_t rows) { return (matrix){data, PANEL, rows * PANEL}; }

/* Pack rows as the input of a product, normalized if the norm has a weight: panels of PANEL channels of all rows, so that a row
 * of an AMX tile is 64 contiguous bytes and the next row follows it. */
static ALWAYS_INLINE void lay(const norm *n, const void *x, matrix out, int64_t rows, int64_t channels, const int is_half) {
    if (n->weight) {
        normalize(n, x, out, rows, channels, is_half);
        return;
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < channels; i += PANEL)
            memcpy(element(out.data, place(out, row, i), is_half), element(x, row * channels + i, is_half),
                   PANEL * size_of(is_half));
}

/* A layer without its attention. before, after: the norms before the QKV projection and before the MLP; a null weight means no
 * norm. */
typedef struct {
    norm before, after;
    linear qkv, output, up, down;
} layer;

/* A 3 x 3 convolution of stride 2 with zero padding of 1, as a matrix product over the channels of nine positions. */
typedef struct {
    linear all;
    int64_t height, width, channels;
} convolution;

/* Work of one thread: `rows` rows of a feature map starting at `first`, and the columns of one of `parts` parts. x: the layer's
 * input.  attended: output of the attention.  laid, hidden: buffers for the rows as panels, with the inputs of a product and
 * with the hidden channels of the MLP; all parts share `hidden`. */
typedef struct {
    const void *x, *attended;
    void *out;
    int64_t first, rows, part, parts;
    matrix laid, hidden;
} work;

static ALWAYS_INLINE void project(const void *of, const work *job, const int is_half) {
    const layer *l = of;
    const int64_t channels = l->qkv.inputs, outputs = l->qkv.outputs;
    const matrix out = in_rows(element(job->out, job->first * outputs, is_half), outputs);
    lay(&l->before, element(job->x, job->first * channels, is_half), job->laid, job->rows, channels, is_half);
    multiply(job->laid, &l->qkv, job->laid, out, job->rows, job->part, job->parts, NOTHING, is_half);
}

static inline void wait_for_others(const work *job) {
    if (job->parts > 1) {
#pragma omp barrier
    }
}

static ALWAYS_INLINE void complete(const void *of, const work *job, const int is_half) {
    const layer *l = of;
    const int64_t channels = l->output.outputs, from = job->first * channels;
    const matrix x = in_rows(element(job->x, from, is_half), channels);
    const matrix out = in_rows(element(job->out, from, is_half), channels);
    lay(&(norm){0}, element(job->attended, from, is_half), job->laid, job->rows, channels, is_half);
    multiply(job->laid, &l->output, x, out, job->rows, job->part, job->parts, SUM, is_half);
    wait_for_others(job);
    lay(&l->after, out.data, job->laid, job->rows, channels, is_half);
    multiply(job->laid, &l->up, job->laid, job->hidden, job->rows, job->part, job->parts, GELU, is_half);
    wait_for_others(job);
    multiply(job->hidden, &l->down, out, out, job->rows, job->part, job->parts, SUM, is_half);
}

static ALWAYS_INLINE void convolve(const void *of, const work *job, const int is_half) {
    const convolution *c = of;
    const int64_t height = (c->height + 1) / 2, width = (c->width + 1) / 2;
    /* Pack the nine positions under the kernel as one row of 9 * channels inputs; positions outside the image are zeros. */
    for (int64_t row = 0; row < job->rows; row++)
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t at = job->first + row, image = at / width / height;
            const int64_t y = at / width % height * 2 + tap / 3 - 1, x = at % width * 2 + tap % 3 - 1;
            const int is_inside = y >= 0 && y < c->height && x >= 0 && x < c->width;
            const int64_t from = ((image * c->height + y) * c->width + x) * c->channels;
            for (int64_t i = 0; i < c->channels; i += PANEL) {
                void *to = element(job->laid.data, place(job->laid, row, tap * c->channels + i), is_half);
                if (is_inside)
                    memcpy(to, element(job->x, from + i, is_half), PANEL * size_of(is_half));
                else
                    memset(to, 0, PANEL * size_of(is_half));
            }
        }
    const matrix out = in_rows(element(job->out, job->first * c->all.outputs, is_half), c->all.outputs);
    multiply(job->laid, &c->all, job->laid, out, job->rows, job->part, job->parts, NOTHING, is_half);
}

/* A function of the work of one thread, for each dtype: float32 and bfloat16. */
typedef void (*const by_dtype[2])(const void *of, const work *job);

#define FOR_FLOAT(name) \
    static void name##_float(const void *of, const work *job) { name(of, job, 0); }
#ifdef HAS_HALVES
#define FOR_BOTH(name) \
    FOR_FLOAT(name) \
    static void name##_half(const void *of, const work *job) { name(of, job, 1); } \
    static by_dtype name##_of = {name##_float, name##_half};
#else
#define FOR_BOTH(name) \
    FOR_FLOAT(name) \
    static by_dtype name##_of = {name##_float, 0};
#endif

FOR_BOTH(project)
FOR_BOTH(complete)
FOR_BOTH(convolve)

/* Run a function over all rows of a feature map. inputs: of its first product;  hidden: channels of the MLP;  outputs: of its
 * narrowest product.  Returns 0, or 1 if memory allocation failed. */
static int over_rows(by_dtype what, int is_half, const void *of, work all, int64_t inputs, int64_t hidden, int64_t outputs,
                     int threads) {
    const int is_small = all.rows < SHARED_ROWS * threads && all.rows * inputs * size_of(is_half) <= SHARED_BYTES;
    const int is_shared = is_small && outputs / PANEL >= threads;
    const int64_t most = is_shared ? all.rows : block_rows(all.rows, inputs, threads);
    /* Rows are rounded up to a whole step, which reads, but never uses, what follows the last valid row. */
    const int64_t held = (most + STEP_ROWS - 1) / STEP_ROWS * STEP_ROWS, size = (inputs + hidden) * held * size_of(is_half);
    char *room = aligned_alloc(64, size * threads);
    if (!room) return 1;
#pragma omp parallel num_threads(threads)
    {
#ifdef __AMX_BF16__
        tile_shapes before;
        if (is_half) take_units(&before);
#endif
        work job = all;
        char *mine = room + size * omp_get_thread_num();
        job.laid = in_panels(mine, held);
        job.hidden = in_panels((is_shared ? room : mine) + inputs * held * size_of(is_half), held);
        job.parts = 1;
        if (is_shared) {
            job.part = omp_get_thread_num();
            job.parts = omp_get_num_threads();
            what[is_half](of, &job);
        } else {
            /* The same rows in every layer, which are then still in this CPU's cache. */
#pragma omp for schedule(static)
            for (int64_t row = 0; row < all.rows; row += most) {
                job.first = row;
                job.rows = all.rows - row < most ? all.rows - row : most;
                what[is_half](of, &job);
            }
        }
#ifdef __AMX_BF16__
        if (is_half) give_units_back(&before);
#endif
    }
    free(room);
    return 0;
}

/* QKV projection of every row, with the layer norm before it.  x: (rows, channels);  out: (rows, outputs);  norm_weight: null
 * for no norm.  Returns 0, or 1 if memory allocation failed. */
int dinat_project(int is_half, const void *x, void *out, int64_t rows, int64_t channels, int64_t outputs,
                  const void *norm_weight, const void *norm_bias, float eps, const void *weight, const float *bias,
                  int threads) {
    const layer l = {.before = {norm_weight, norm_bias, eps}, .qkv = {weight, bias, channels, outputs}};
    return over_rows(project_of, is_half, &l, (work){.x = x, .out = out, .rows = rows}, channels, 0, outputs, threads);
}

/* Everything in a layer after attention.  attended: output of the attention;  x: input of the layer;  all (rows, channels).
 * Returns 0, or 1 if memory allocation failed. */
int dinat_complete(int is_half, const void *attended, const void *x, void *out, int64_t rows, int64_t channels, int64_t hidden,
                   const void *output_weight, const float *output_bias, const void *norm_weight, const void *norm_bias,
                   float eps, const void *up_weight, const float *up_bias, const void *down_weight, const float *down_bias,
                   int threads) {
    const layer l = {
        .after = {norm_weight, norm_bias, eps},
        .output = {output_weight, output_bias, channels, channels},
        .up = {up_weight, up_bias, channels, hidden},
        .down = {down_weight, down_bias, hidden, channels},
    };
    const work all = {.x = x, .attended = attended, .out = out, .rows = rows};
    return over_rows(complete_of, is_half, &l, all, channels, hidden, channels, threads);
}

/* 3 x 3 convolution of stride 2.  x: (images, height, width, channels);  out: (images, ceil(height / 2), ceil(width / 2),
 * outputs).  weight: its inputs are the channels of nine positions in row-major order.  Returns 0, or 1 if memory allocation
 * failed. */
int dinat_convolve(int is_half, const void *x, void *out, int64_t images, int64_t height, int64_t width, int64_t channels,
                   int64_t outputs, const void *weight, const float *bias, int threads) {
    const convolution c = {{weight, bias, 9 * channels, outputs}, height, width, channels};
    const work all = {.x = x, .out = out, .rows = images * ((height + 1) / 2) * ((width + 1) / 2)};
    return over_rows(convolve_of, is_half, &c, all, 9 * channels, 0, outputs, threads);
}

#endif

/* Dtypes of the functions above: 1 for float32, plus 2 for bfloat16. */
int dinat_layer_dtypes(void) {
#ifdef HAS_HALVES
    return 3;
#elif defined __AVX512F__
    return 1;
#else
    return 0;
#endif
}
