/* Everything in a layer except attention, in bfloat16 on matrix units (AMX): matrix products over the channels, fused with the
 * layer norm before them and the GELU or residual sum after them. A few rows at a time pass through all of them, so that only
 * the feature map itself is written to memory. Also the downsampling convolutions, which are matrix products as well.
 * Called by model/cpu/packing.py. */

#include "layer_norm.h"
#include "matrix_units.h"

#ifdef __AMX_BF16__

#include <omp.h>
#include <stdlib.h>

/* ROWS: rows of one step of a product, two AMX tiles.  SHARED_ROWS: with fewer rows per thread, all threads process all rows
 * and divide the columns, if there are enough columns: reading weights then dominates, and they are read only once. */
enum { ROWS = 32, SHARED_ROWS = 256 };

/* Rows that pass through a layer together: few, to stay in the L1 cache; or more if the weights of a layer exceed the L2 cache,
 * because every block reads them again. All threads get the same number. */
static int64_t block_rows(int64_t rows, int64_t channels, int64_t threads) {
    const int64_t most = threads * (channels <= 256 ? 64 : 256);
    const int64_t blocks = (rows + most - 1) / most * threads;
    return (rows + blocks - 1) / blocks;
}

/* weight: panels of PANEL outputs; in each, blocks of PANEL inputs, each stored as two AMX tiles of 16 outputs. Row i of a tile
 * holds inputs 2i and 2i + 1 of each output as adjacent pairs. One step of a product, all tiles 16 rows of 64 bytes:
 *
 *                                  tile 6: weight, outputs 0-15     tile 7: weight, outputs 16-31
 *                                     w0,0  w1,0 | w0,1  w1,1 ..       wi,o: input i of output o
 *                                     w2,0  w3,0 | w2,1  w3,1 ..       (16 pairs of bfloat16 a row)
 *                                     ..                               ..
 *   tile 4: x, rows 0-15
 *      x0,0 x0,1 x0,2 .. x0,31     tile 0: sums, float32            tile 1: sums, float32
 *      x1,0 ..                        rows 0-15 x outputs 0-15         rows 0-15 x outputs 16-31
 *   tile 5: x, rows 16-31
 *      x16,0 ..                    tile 2: rows 16-31               tile 3: rows 16-31
 *
 * _tile_dpbf16ps(0, 4, 6) adds, for each pair i of inputs, x[r][2i] * w[2i][o] + x[r][2i+1] * w[2i+1][o] to sum (r, o). */
typedef struct {
    const uint16_t *weight;
    const float *bias;
    int64_t inputs, outputs;
} linear;

typedef enum { NOTHING, GELU, SUM } epilogue;

/* x * Phi(x), the exact GELU with an absolute error of 1.2e-4, which is below bfloat16's precision for values above 0.03.
 * Phi(x) - 0.5 is x times a polynomial of x^2, fitted for the smallest error of GELU on [0, 4.25]; beyond that, Phi is 0 or 1.
 * NaN stays NaN. */
static inline floats gelu(floats x) {
    static const float series[] = {-7.82699149e-10f, 7.15992156e-8f, -2.83341634e-6f, 6.41753568e-5f,
                                   -9.31456734e-4f,  9.22922627e-3f, -6.54216918e-2f, 3.98423643e-1f};
    floats inner = (floats)_mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(-4.25f)), _mm512_set1_ps(4.25f));
    floats square = inner * inner, y = splat(series[0]);
#pragma GCC unroll 7
    for (int i = 1; i < 8; i++) y = y * square + series[i];
    return x * (inner * y + 0.5f);
}

/* Sums of a step of a product, ROWS x PANEL. row and column: position in the output.  count: number of valid rows. */
typedef struct {
    floats sums[ROWS][2];
    int64_t row, column, count;
} step;

/* Apply the epilogue to rows begin to end of a step and write them to `out`. With SUM, the matrix `add` is added. */
static inline __attribute__((always_inline)) void finish(const step *s, int64_t begin, int64_t end, const float *bias,
                                                         matrix add, matrix out, const epilogue after) {
    const floats left = load(bias, s->column, 0), right = load(bias, s->column + LANES, 0);
    for (int64_t i = begin; i < (end < s->count ? end : s->count); i++) {
        floats a = s->sums[i][0] + left, b = s->sums[i][1] + right;
        if (after == GELU) {
            a = gelu(a);
            b = gelu(b);
        }
        if (after == SUM) {
            const int64_t from = place(add, s->row + i, s->column);
            a += load(add.data, from, 1);
            b += load(add.data, from + LANES, 1);
        }
        const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a); /* the first argument is the upper half */
        memcpy((uint16_t *)out.data + place(out, s->row + i, s->column), &pair, sizeof pair);
    }
}

/* Compute the columns of a product that belong to one of `parts` parts. While the matrix units compute a step, the vector units
 * finish the previous one. x: panels of whole AMX tiles, of which `rows` rows are valid. */
static inline __attribute__((always_inline)) void multiply(matrix x, const linear *w, matrix add, matrix out, int64_t rows,
                                                           int64_t part, int64_t parts, const epilogue after) {
    const int64_t panels = w->outputs / PANEL, inner = w->inputs / PANEL, share = (ROWS + inner - 1) / inner;
    const int64_t groups = (rows + ROWS - 1) / ROWS, lines = (PANEL + groups - 1) / groups; /* to prefetch per step */
    step steps[2], *now = &steps[0], *before = &steps[1];
    before->row = before->column = before->count = 0;
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint16_t *from = (const uint16_t *)x.data + row * x.row_stride; /* in its first panel */
            const uint16_t *weight = w->weight + panel * PANEL * w->inputs;
            const int is_whole = rows - row > 16; /* else the lower two tiles of sums have no valid row */
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            ORDER_MEMORY();
            for (int64_t k = 0; k < inner; k++, from += x.panel_stride, weight += PANEL * PANEL) {
                _tile_loadd(6, weight, 64); /* 32 inputs of outputs 0-15: 16 lines of 64 bytes, one after another */
                /* Prefetch this row step's share of the next panel's block, so that all row steps together fetch all of it. */
                const uint16_t *next = weight + PANEL * w->inputs + row / ROWS * lines * PANEL;
                for (int64_t line = 0; line < lines; line++) _mm_prefetch(next + line * PANEL, _MM_HINT_T1);
                _tile_loadd(4, from, x.row_stride * 2);
                _tile_loadd(7, weight + 16 * PANEL, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (is_whole) {
                    _tile_loadd(5, from + 16 * x.row_stride, x.row_stride * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                finish(before, k * share, (k + 1) * share, w->bias, add, out, after);
            }
            /* A row of a step has the 16 sums of tile 0 (or 2), then those of tile 1 (or 3): the order of the outputs. */
            _tile_stored(0, &now->sums[0][0], sizeof *now->sums);
            _tile_stored(1, &now->sums[0][1], sizeof *now->sums);
            if (is_whole) {
                _tile_stored(2, &now->sums[16][0], sizeof *now->sums);
                _tile_stored(3, &now->sums[16][1], sizeof *now->sums);
            }
            ORDER_MEMORY();
            now->row = row;
            now->column = panel * PANEL;
            now->count = rows - row < ROWS ? rows - row : ROWS;
            step *done = before;
            before = now;
            now = done;
        }
    finish(before, 0, ROWS, w->bias, add, out, after);
}

static inline matrix in_rows(const void *data, int64_t columns) { return (matrix){(void *)data, columns, PANEL}; }

static inline matrix in_panels(void *data, int64_t rows) { return (matrix){data, PANEL, rows * PANEL}; }

/* Pack rows as the input of a product, normalized if the norm has a weight: panels of PANEL channels of all rows, so that a row
 * of an AMX tile is 64 contiguous bytes and the next row follows it. */
static inline void lay(const norm *n, const uint16_t *x, matrix out, int64_t rows, int64_t channels) {
    if (n->weight) {
        normalize(n, x, out, rows, channels, 1);
        return;
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < channels; i += PANEL)
            memcpy((uint16_t *)out.data + place(out, row, i), x + row * channels + i, PANEL * sizeof *x);
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
    const uint16_t *x, *attended;
    uint16_t *out;
    int64_t first, rows, part, parts;
    matrix laid, hidden;
} work;

static void project(const void *of, const work *job) {
    const layer *l = of;
    const int64_t channels = l->qkv.inputs, outputs = l->qkv.outputs;
    const matrix out = in_rows(job->out + job->first * outputs, outputs);
    lay(&l->before, job->x + job->first * channels, job->laid, job->rows, channels);
    multiply(job->laid, &l->qkv, job->laid, out, job->rows, job->part, job->parts, NOTHING);
}

static inline void wait_for_others(const work *job) {
    if (job->parts > 1) {
#pragma omp barrier
    }
}

static void complete(const void *of, const work *job) {
    const layer *l = of;
    const int64_t channels = l->output.outputs, from = job->first * channels;
    const matrix x = in_rows(job->x + from, channels), out = in_rows(job->out + from, channels), laid = job->laid;
    lay(&(norm){0}, job->attended + from, laid, job->rows, channels);
    multiply(laid, &l->output, x, out, job->rows, job->part, job->parts, SUM);
    wait_for_others(job);
    lay(&l->after, out.data, laid, job->rows, channels);
    multiply(laid, &l->up, laid, job->hidden, job->rows, job->part, job->parts, GELU);
    wait_for_others(job);
    multiply(job->hidden, &l->down, out, out, job->rows, job->part, job->parts, SUM);
}

static void convolve(const void *of, const work *job) {
    const convolution *c = of;
    const int64_t height = (c->height + 1) / 2, width = (c->width + 1) / 2;
    /* Pack the nine positions under the kernel as one row of 9 * channels inputs; positions outside the image are zeros. */
    for (int64_t row = 0; row < job->rows; row++)
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t at = job->first + row, image = at / width / height;
            const int64_t y = at / width % height * 2 + tap / 3 - 1, x = at % width * 2 + tap % 3 - 1;
            const int is_inside = y >= 0 && y < c->height && x >= 0 && x < c->width;
            const uint16_t *from = job->x + ((image * c->height + y) * c->width + x) * c->channels;
            for (int64_t i = 0; i < c->channels; i += PANEL) {
                uint16_t *to = (uint16_t *)job->laid.data + place(job->laid, row, tap * c->channels + i);
                if (is_inside)
                    memcpy(to, from + i, PANEL * sizeof *to);
                else
                    memset(to, 0, PANEL * sizeof *to);
            }
        }
    const matrix out = in_rows(job->out + job->first * c->all.outputs, c->all.outputs);
    multiply(job->laid, &c->all, job->laid, out, job->rows, job->part, job->parts, NOTHING);
}

/* Run a function over all rows of a feature map. inputs: of its first product;  hidden: channels of the MLP;  outputs: of its
 * narrowest product.  Returns 0, or 1 if memory allocation failed. */
static int over_rows(void (*what)(const void *, const work *), const void *of, work all, int64_t inputs, int64_t hidden,
                     int64_t outputs, int threads) {
    const int is_shared = all.rows < SHARED_ROWS * threads && outputs / PANEL >= threads;
    const int64_t most = is_shared ? all.rows : block_rows(all.rows, inputs, threads), held = (most + ROWS - 1) / ROWS * ROWS;
    /* Rows are rounded up to a whole step: tiles read, but never use, what follows the last valid row. */
    uint16_t *room = aligned_alloc(64, (inputs + hidden) * held * threads * sizeof *room);
    if (!room) return 1;
#pragma omp parallel num_threads(threads)
    {
        tile_shapes before;
        take_units(&before);
        work job = all;
        uint16_t *mine = room + (inputs + hidden) * held * omp_get_thread_num();
        job.laid = in_panels(mine, held);
        job.hidden = in_panels((is_shared ? room : mine) + inputs * held, held);
        job.parts = 1;
        if (is_shared) {
            job.part = omp_get_thread_num();
            job.parts = omp_get_num_threads();
            what(of, &job);
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < all.rows; row += most) {
                job.first = row;
                job.rows = all.rows - row < most ? all.rows - row : most;
                what(of, &job);
            }
        }
        give_units_back(&before);
    }
    free(room);
    return 0;
}

/* QKV projection of every row, with the layer norm before it.  x: (rows, channels);  out: (rows, outputs);  norm_weight: null
 * for no norm.  Returns 0, or 1 if memory allocation failed. */
int dinat_project(const void *x, void *out, int64_t rows, int64_t channels, int64_t outputs, const void *norm_weight,
                  const void *norm_bias, float eps, const void *weight, const float *bias, int threads) {
    const layer l = {.before = {norm_weight, norm_bias, eps}, .qkv = {weight, bias, channels, outputs}};
    return over_rows(project, &l, (work){.x = x, .out = out, .rows = rows}, channels, 0, outputs, threads);
}

/* Everything in a layer after attention.  attended: output of the attention;  x: input of the layer;  all (rows, channels).
 * Returns 0, or 1 if memory allocation failed. */
int dinat_complete(const void *attended, const void *x, void *out, int64_t rows, int64_t channels, int64_t hidden,
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
    return over_rows(complete, &l, all, channels, hidden, channels, threads);
}

/* 3 x 3 convolution of stride 2.  x: (images, height, width, channels);  out: (images, ceil(height / 2), ceil(width / 2),
 * outputs).  weight: its inputs are the channels of nine positions in row-major order.  Returns 0, or 1 if memory allocation
 * failed. */
int dinat_convolve(const void *x, void *out, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                   const void *weight, const float *bias, int threads) {
    const convolution c = {{weight, bias, 9 * channels, outputs}, height, width, channels};
    const work all = {.x = x, .out = out, .rows = images * ((height + 1) / 2) * ((width + 1) / 2)};
    return over_rows(convolve, &c, all, 9 * channels, 0, outputs, threads);
}

#endif
