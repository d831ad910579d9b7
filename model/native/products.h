/* Matrix products over the channels of a few rows, fused with the GELU or residual sum after them: bfloat16 by matrix units
 * (AMX), or by vectors of pairs (AVX512-BF16), and float32 by vectors (AVX-512). Used by layer.c. */

#include "layer_norm.h"
#include "matrix_units.h"

#if defined __AVX512BF16__ || defined __AMX_BF16__
#define HAS_HALVES 1
#endif

/* STEP_ROWS: most rows of one step of a product, two AMX tiles.  VECTOR_ROWS: rows of a step by vectors, or one more if one
 * would remain, as of 7 x 7: their 26 sums, two weights and one input fit the 32 registers.  TOGETHER: fewer rows are computed
 * in whole groups of this size.  RESIDENT_WORDS: weights, 16 KiB, that stay in the L1 cache (32 or 48 KiB) with the inputs and
 * sums of GROUP_STEPS steps by vectors. */
enum { STEP_ROWS = 32, VECTOR_ROWS = 12, TOGETHER = 4, RESIDENT_WORDS = 4096, GROUP_STEPS = 8 };

/* weight: panels of PANEL outputs; in each, blocks of PANEL inputs; in each, two parts of 16 outputs. A row of a part, 64
 * bytes, is a word (32 bits) of each of 16 outputs: one float32, or inputs 2i and 2i + 1 as a pair of bfloat16. With pairs, a
 * part is an AMX tile. */
typedef struct {
    const void *weight;
    const float *bias;
    int64_t inputs, outputs;
} linear;

typedef enum { NOTHING, GELU, SUM } epilogue;

/* NaN stays NaN: max_ps and min_ps return their second operand then. */
static inline floats at_least(floats x, float least) { return (floats)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x); }
static inline floats at_most(floats x, float most) { return (floats)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x); }

static ALWAYS_INLINE floats polynomial(floats x, const float *series, const int terms) {
    floats y = splat(series[0]);
#pragma GCC unroll 8
    for (int i = 1; i < terms; i++) y = y * x + series[i];
    return y;
}

/* x * Phi(x), the exact GELU. Phi(x) - 0.5 is x times a function of x^2: with is_half, a polynomial fitted for the smallest
 * error of GELU on [0, 4.25], an absolute error of 1.2e-4, which is below bfloat16's precision for values above 0.03; else a
 * quotient fitted on [0, 5.2], an error of 2.1e-7 |x|. Beyond that, Phi is nearly 0 or 1: smaller x count as the smallest one,
 * so that they do not multiply the difference from 0. NaN stays NaN. */
static ALWAYS_INLINE floats gelu(floats x, const int is_half) {
    static const float rough[] = {-7.82699149e-10f, 7.15992156e-8f, -2.83341634e-6f, 6.41753568e-5f,
                                  -9.31456734e-4f,  9.22922627e-3f, -6.54216918e-2f, 3.98423643e-1f};
    static const float above[] = {2.47311505e-8f, 6.40789267e-6f, 1.56861643e-4f,
                                  4.60864557e-3f, 3.25445570e-2f, 3.98942262e-1f};
    static const float below[] = {1.25886947e-6f, 7.04961349e-5f, 1.81720289e-3f, 2.79266909e-2f, 2.48243451e-1f, 1.0f};
    const float most = is_half ? 4.25f : 5.2f;
    x = at_least(x, -most);
    const floats inner = at_most(x, most), square = inner * inner;
    if (is_half) return x * (inner * polynomial(square, rough, 8) + 0.5f);
    return x * (inner * polynomial(square, above, 6) / polynomial(square, below, 6) + 0.5f);
}

/* Sums of a step of a product, rows x PANEL. row and column: position in the output.  count: number of valid rows. */
typedef struct {
    floats sums[STEP_ROWS][2];
    int64_t row, column, count;
} step;

static ALWAYS_INLINE void store_pair(void *to, int64_t at, floats a, floats b, const int is_half) {
#ifdef HAS_HALVES
    if (is_half) {
        const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a); /* the first argument is the upper half */
        memcpy((uint16_t *)to + at, &pair, sizeof pair);
        return;
    }
#endif
    store(to, at, a, is_half);
    store(to, at + LANES, b, is_half);
}

/* Apply the epilogue to rows begin to end of a step and write them to `out`. With SUM, the matrix `add` is added. */
static ALWAYS_INLINE void finish(const step *s, int64_t begin, int64_t end, const float *bias, matrix add,
                                 matrix out, const epilogue after, const int is_half) {
    const floats left = load(bias, s->column, 0), right = load(bias, s->column + LANES, 0);
    for (int64_t i = begin; i < (end < s->count ? end : s->count); i++) {
        floats a = s->sums[i][0] + left, b = s->sums[i][1] + right;
        if (after == GELU) {
            a = gelu(a, is_half);
            b = gelu(b, is_half);
        }
        if (after == SUM) {
            const int64_t from = place(add, s->row + i, s->column);
            a += load(add.data, from, is_half);
            b += load(add.data, from + LANES, is_half);
        }
        store_pair(out.data, place(out, s->row + i, s->column), a, b, is_half);
    }
}

/* A part of a panel of weights for a step by vectors.  words: its weights, of `blocks` blocks of PANEL inputs.  next: what to
 * prefetch of the next panel, `lines` cache lines for each block. */
typedef struct {
    const uint32_t *words, *next;
    int64_t blocks, lines;
    int is_first; /* whether the sums of the step start from zero */
} weights;

/* Add the products of `rows` rows and a part of a panel to the sums, by vectors. x: the rows in the part's first panel of inputs,
 * as words. */
static ALWAYS_INLINE void add_rows(const uint32_t *x, int64_t panel_words, const weights *w, floats (*sums)[2], const int rows,
                                   const int is_half) {
    const int words_per_row = is_half ? PANEL / 2 : PANEL, part = words_per_row * LANES;
    const uint32_t *weight = w->words, *next = w->next;
    floats s[VECTOR_ROWS + 1][2] = {{{0}}};
    if (!w->is_first)
#pragma GCC unroll 13
        for (int row = 0; row < rows; row++) memcpy(s[row], sums[row], sizeof s[row]);
    for (int64_t k = 0; k < w->blocks; k++, x += panel_words, weight += 2 * part, next += 2 * part) {
        for (int64_t i = 0; i < w->lines; i++) _mm_prefetch(next + i * LANES, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int i = 0; i < words_per_row; i++) {
            const floats left = load(weight, i * LANES, 0), right = load(weight, part + i * LANES, 0);
#pragma GCC unroll 13
            for (int row = 0; row < rows; row++) {
                const __m512i word = _mm512_set1_epi32(x[row * words_per_row + i]);
#ifdef __AVX512BF16__
                if (is_half) {
                    s[row][0] = (floats)_mm512_dpbf16_ps((__m512)s[row][0], (__m512bh)left, (__m512bh)word);
                    s[row][1] = (floats)_mm512_dpbf16_ps((__m512)s[row][1], (__m512bh)right, (__m512bh)word);
                    continue;
                }
#endif
                s[row][0] += left * (floats)word;
                s[row][1] += right * (floats)word;
            }
        }
    }
#pragma GCC unroll 13
    for (int row = 0; row < rows; row++) memcpy(sums[row], s[row], sizeof s[row]);
}

static ALWAYS_INLINE void add_step(const uint32_t *x, int64_t panel_words, const weights *w, step *now, const int is_half) {
    if (now->count > VECTOR_ROWS)
        add_rows(x, panel_words, w, now->sums, VECTOR_ROWS + 1, is_half);
    else if (now->count > 2 * TOGETHER)
        add_rows(x, panel_words, w, now->sums, VECTOR_ROWS, is_half);
    else if (now->count > TOGETHER)
        add_rows(x, panel_words, w, now->sums, 2 * TOGETHER, is_half);
    else
        add_rows(x, panel_words, w, now->sums, TOGETHER, is_half);
}

/* Compute the columns of a product that belong to one of `parts` parts, by vectors. A part of a panel of weights stays in the L1
 * cache for a group of steps. x: panels of rows, a multiple of TOGETHER, of which `rows` are valid. */
static ALWAYS_INLINE void multiply_by_vectors(matrix x, const linear *w, matrix add, matrix out, int64_t rows, int64_t part,
                                              int64_t parts, const epilogue after, const int is_half) {
    const int words_per_row = is_half ? PANEL / 2 : PANEL, block = 2 * words_per_row * LANES;
    const int64_t panels = w->outputs / PANEL, inner = w->inputs / PANEL, panel_words = x.panel_stride * words_per_row / PANEL;
    const int64_t steps = rows > 1 ? (rows + VECTOR_ROWS - 2) / VECTOR_ROWS : 1;
    const int64_t lines = (2 * words_per_row + steps - 1) / steps; /* to prefetch per step */
    const int64_t most = steps > 1 ? RESIDENT_WORDS / block : inner;
    step group[GROUP_STEPS];
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++)
        for (int64_t first = 0; first < steps; first += GROUP_STEPS)
            for (int64_t k = 0; k < inner; k += most)
                for (int64_t i = first; i < steps && i < first + GROUP_STEPS; i++) {
                    const uint32_t *words = (const uint32_t *)w->weight + (panel * inner + k) * block;
                    const uint32_t *next = words + inner * block + i * lines * LANES;
                    const int64_t blocks = inner - k < most ? inner - k : most;
                    step *now = &group[i - first];
                    now->row = i * VECTOR_ROWS;
                    now->column = panel * PANEL;
                    now->count = i < steps - 1 ? VECTOR_ROWS : rows - now->row;
                    add_step((const uint32_t *)x.data + k * panel_words + now->row * words_per_row, panel_words,
                             &(weights){words, next, blocks, lines, k == 0}, now, is_half);
                    if (k + blocks == inner) finish(now, 0, now->count, w->bias, add, out, after, is_half);
                }
}

#ifdef __AMX_BF16__

/* One step of a product by matrix units, all tiles 16 rows of 64 bytes:
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

/* Compute the columns of a product that belong to one of `parts` parts, by matrix units. While they compute a step, the vector
 * units finish the previous one. x: panels of whole AMX tiles, of which `rows` rows are valid. */
static ALWAYS_INLINE void multiply_by_tiles(matrix x, const linear *w, matrix add, matrix out, int64_t rows,
                                            int64_t part, int64_t parts, const epilogue after) {
    const int64_t panels = w->outputs / PANEL, inner = w->inputs / PANEL, share = (STEP_ROWS + inner - 1) / inner;
    const int64_t groups = (rows + STEP_ROWS - 1) / STEP_ROWS, lines = (PANEL + groups - 1) / groups; /* to prefetch per step */
    step steps[2], *now = &steps[0], *before = &steps[1];
    before->row = before->column = before->count = 0;
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++)
        for (int64_t row = 0; row < rows; row += STEP_ROWS) {
            const uint16_t *from = (const uint16_t *)x.data + row * x.row_stride; /* in its first panel */
            const uint16_t *weight = (const uint16_t *)w->weight + panel * PANEL * w->inputs;
            const int is_whole = rows - row > 16; /* else the lower two tiles of sums have no valid row */
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            ORDER_MEMORY();
            for (int64_t k = 0; k < inner; k++, from += x.panel_stride, weight += PANEL * PANEL) {
                _tile_loadd(6, weight, 64); /* 32 inputs of outputs 0-15: 16 lines of 64 bytes, one after another */
                /* Prefetch this row step's share of the next panel's block, so that all row steps together fetch all of it. */
                const uint16_t *next = weight + PANEL * w->inputs + row / STEP_ROWS * lines * PANEL;
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
                finish(before, k * share, (k + 1) * share, w->bias, add, out, after, 1);
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
            now->count = rows - row < STEP_ROWS ? rows - row : STEP_ROWS;
            step *done = before;
            before = now;
            now = done;
        }
    finish(before, 0, STEP_ROWS, w->bias, add, out, after, 1);
}

#endif

static ALWAYS_INLINE void multiply(matrix x, const linear *w, matrix add, matrix out, int64_t rows, int64_t part,
                                   int64_t parts, const epilogue after, const int is_half) {
#ifdef __AMX_BF16__
    if (is_half) {
        multiply_by_tiles(x, w, add, out, rows, part, parts, after);
        return;
    }
#endif
    multiply_by_vectors(x, w, add, out, rows, part, parts, after, is_half);
}
