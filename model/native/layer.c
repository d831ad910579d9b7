/* What a layer does besides its attention, in bfloat16 on matrix units (AMX): products over each position's channels, with
 * the layer norm before them and the GELU or the sum after them. A few rows at a time go through all of it, so that nothing
 * but the map itself is written to memory. model/packed.py calls it. */

#include "layer_norm.h"
#include "matrix_units.h"

#ifdef __AMX_BF16__

#include <omp.h>
#include <stdlib.h>

/* ROWS: of one step of a product, two tiles.  BLOCK_ROWS: that go through a layer together.  SHARED_ROWS: below so many for
 * each thread, all threads work on all rows, each on columns of its own: weights are then what costs, and are read once. */
enum { ROWS = 32, BLOCK_ROWS = 64, SHARED_ROWS = 256 };

/* weight: panel by panel of outputs, PANEL inputs at a time, two tiles each: row i of a tile holds inputs 2i and 2i + 1 of its
 * 16 outputs, side by side. */
typedef struct {
    const uint16_t *weight;
    const float *bias;
    int64_t inputs, outputs;
} linear;

typedef enum { NOTHING, GELU, SUM } epilogue;

/* x * Phi(x), the exact GELU to 1.2e-4, which is less than bfloat16 tells apart above 0.03: Phi(x) - 0.5 is x times a
 * polynomial of x^2, fitted for the smallest error of the GELU on [0, 4.25], beyond which Phi is 0 or 1. NaN stays NaN. */
static inline floats gelu(floats x) {
    static const float series[] = {-7.82699149e-10f, 7.15992156e-8f, -2.83341634e-6f, 6.41753568e-5f,
                                   -9.31456734e-4f,  9.22922627e-3f, -6.54216918e-2f, 3.98423643e-1f};
    floats inner = (floats)_mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(-4.25f)), _mm512_set1_ps(4.25f));
    floats square = inner * inner, y = splat(series[0]);
#pragma GCC unroll 7
    for (int i = 1; i < 8; i++) y = y * square + series[i];
    return x * (inner * y + 0.5f);
}

/* Sums of a step of a product, ROWS x PANEL: row and column say where in the output they belong. */
typedef struct {
    floats sums[ROWS][2];
    int64_t row, column, count;
} step;

/* Rows from `begin` on of a step: into the output, which has a matrix to be added beside it where `after` is SUM. */
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
        const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        memcpy((uint16_t *)out.data + place(out, s->row + i, s->column), &pair, sizeof pair);
    }
}

/* Columns of a product, those of one part out of `parts`. While the matrix units make one step, the vectors finish the one
 * before. x: panels of whole tiles, of which `rows` rows count. */
static inline __attribute__((always_inline)) void multiply(matrix x, const linear *w, matrix add, matrix out, int64_t rows,
                                                           int64_t part, int64_t parts, const epilogue after) {
    const int64_t panels = w->outputs / PANEL, inner = w->inputs / PANEL, share = (ROWS + inner - 1) / inner;
    step steps[2], *now = &steps[0], *before = &steps[1];
    before->row = before->column = before->count = 0;
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint16_t *from = (const uint16_t *)x.data + row * x.row_stride;
            const uint16_t *weight = w->weight + panel * PANEL * w->inputs;
            const int is_whole = rows - row > 16;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < inner; k++, from += x.panel_stride, weight += PANEL * PANEL) {
                _tile_loadd(6, weight, 64);
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
            _tile_stored(0, &now->sums[0][0], sizeof *now->sums);
            _tile_stored(1, &now->sums[0][1], sizeof *now->sums);
            if (is_whole) {
                _tile_stored(2, &now->sums[16][0], sizeof *now->sums);
                _tile_stored(3, &now->sums[16][1], sizeof *now->sums);
            }
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

/* Rows as they are, or normalized, for a product. */
static inline void lay(const norm *n, const uint16_t *x, matrix out, int64_t rows, int64_t channels) {
    if (n->weight) {
        normalize(n, x, out, rows, channels, 1);
        return;
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < channels; i += PANEL)
            memcpy((uint16_t *)out.data + place(out, row, i), x + row * channels + i, PANEL * sizeof *x);
}

/* A layer but for its attention. before, after: their norms; a weight of 0 is none. */
typedef struct {
    norm before, after;
    linear qkv, output, up, down;
} layer;

/* One thread's work: rows of a map, columns of one part out of `parts`. x: the map that came in.  attended: what attention
 * made of it.  laid, hidden: room for the rows as panels, with the channels of the map and of the MLP; hidden is shared by all
 * parts. */
typedef struct {
    const uint16_t *x, *attended;
    uint16_t *out;
    int64_t rows, part, parts;
    matrix laid, hidden;
} work;

static void project(const layer *l, const work *job) {
    lay(&l->before, job->x, job->laid, job->rows, l->qkv.inputs);
    multiply(job->laid, &l->qkv, job->laid, in_rows(job->out, l->qkv.outputs), job->rows, job->part, job->parts, NOTHING);
}

static inline void wait_for_others(const work *job) {
    if (job->parts > 1) {
#pragma omp barrier
    }
}

static void complete(const layer *l, const work *job) {
    const int64_t channels = l->output.outputs;
    const matrix x = in_rows(job->x, channels), out = in_rows(job->out, channels), laid = job->laid, hidden = job->hidden;
    lay(&(norm){0}, job->attended, laid, job->rows, channels);
    multiply(laid, &l->output, x, out, job->rows, job->part, job->parts, SUM);
    wait_for_others(job);
    lay(&l->after, job->out, laid, job->rows, channels);
    multiply(laid, &l->up, laid, hidden, job->rows, job->part, job->parts, GELU);
    wait_for_others(job);
    multiply(hidden, &l->down, out, out, job->rows, job->part, job->parts, SUM);
}

/* Do a part of a layer to all rows of a map. Returns 0, or 1 where there is no memory. */
static int over_rows(void (*part_of_layer)(const layer *, const work *), const layer *l, const uint16_t *x,
                     const uint16_t *attended, uint16_t *out, int64_t rows, int64_t inputs, int64_t outputs, int threads) {
    const int is_shared = rows < SHARED_ROWS * threads;
    const int64_t most = is_shared ? rows : BLOCK_ROWS, held = (most + ROWS - 1) / ROWS * ROWS;
    uint16_t *room = aligned_alloc(64, (inputs + l->up.outputs) * held * threads * sizeof *room);
    if (!room) return 1;
#pragma omp parallel num_threads(threads)
    {
        tile_shapes before;
        take_units(&before);
        uint16_t *laid = room + (inputs + l->up.outputs) * held * omp_get_thread_num();
        work job = {x, attended, out, rows, 0, 1, in_panels(laid, held), in_panels(laid + inputs * held, held)};
        if (is_shared) {
            job.part = omp_get_thread_num();
            job.parts = omp_get_num_threads();
            job.hidden.data = room + inputs * held;
            part_of_layer(l, &job);
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
                job.x = x + row * inputs;
                job.attended = attended + row * inputs;
                job.out = out + row * outputs;
                job.rows = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
                part_of_layer(l, &job);
            }
        }
        give_units_back(&before);
    }
    free(room);
    return 0;
}

/* Query, key and value of every row.  x: (rows, channels);  out: (rows, outputs);  norm_weight: none if 0.  Returns 0, or 1
 * where there is no memory. */
int dinat_project(const void *x, void *out, int64_t rows, int64_t channels, int64_t outputs, const void *norm_weight,
                  const void *norm_bias, float eps, const void *weight, const float *bias, int threads) {
    const layer l = {.before = {norm_weight, norm_bias, eps}, .qkv = {weight, bias, channels, outputs}};
    return over_rows(project, &l, x, 0, out, rows, channels, outputs, threads);
}

/* The rest of a layer.  attended: what attention made;  x: what came in;  all (rows, channels).  Returns as dinat_project. */
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
    return over_rows(complete, &l, x, attended, out, rows, channels, channels, threads);
}

#endif
