/* Neighborhood attention on a CPU, one tile at a time: a few queries, one per vector lane, and the keys of their windows.
 * Rows of q, k and v are read in place, without a gather in memory.
 *
 * On CPUs with matrix units (AMX), bfloat16 uses them. Called by model/attention/compiled.py; tiles are defined in
 * model/attention/tiled.py. */

#include "matrix_units.h"
#include "vectors.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* DIM: head_dim.  MOST_KEYS: maximum keys of a tile.  BLOCK: keys per iteration.  DIMS: output channels accumulated in
 * registers at once. */
enum { DIM = 32, MOST_KEYS = 256, BLOCK = 8, DIMS = LANES == 8 ? 8 : 16 };

/* Inputs and outputs of one tile. Positions are those of the flattened feature map, `stride` elements apart. bias: one row of
 * LANES values per key, -inf where the key is outside the query's window; the rows are padded with -inf to a multiple of BLOCK.
 * bias and scale include the factor log2(e), because the exponential is computed as a power of 2. */
typedef struct {
    const void *q, *k, *v;
    void *out;
    int64_t stride, out_stride;
    const int32_t *queries, *keys;
    int64_t query_count, key_count;
    const float *bias;
    float scale;
} tile;

/* 2^x for x <= 0, by its Taylor series. Relative error 2e-7, or 4e-5 with is_rough, which is far below bfloat16's precision.
 * Returns 0 below -126, where floats are denormal and slow. NaN stays NaN. */
static ALWAYS_INLINE floats power(floats x, const int is_rough) {
    static const float series[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};
#ifdef __AVX512F__
    floats whole = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    floats shifted = x + 12582912.0f, whole = shifted - 12582912.0f; /* 1.5 * 2^23: floats have no fractional bits there */
#endif
    floats rest = x - whole, y = splat(series[is_rough ? 2 : 0]);
#pragma GCC unroll 6
    for (int i = is_rough ? 3 : 1; i < 7; i++) y = y * rest + series[i];
#ifdef __AVX512F__
    __mmask16 is_there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    return (floats)_mm512_maskz_scalef_ps(is_there, (__m512)y, (__m512)whole);
#else
    return (floats)((words)~(x < -126.0f) & ((words)y + ((words)shifted << 23)));
#endif
}

static inline floats largest(const floats *some) {
    floats most = some[0];
    for (int j = 1; j < BLOCK; j++) most = larger(some[j], most);
    return most;
}

/* Replace s by 2^(s - max) for each key and lane; return the sum over keys of each lane. */
static ALWAYS_INLINE floats softmax(floats *s, int64_t count, floats most, const int is_rough) {
    floats sum = {0};
    for (int64_t key = 0; key < count; key++) {
        s[key] = power(s[key] - most, is_rough);
        sum += s[key];
    }
    return sum;
}

#ifdef __AVX512F__

/* Transpose 16 x 16 words of 32 bits: unpack pairs of rows, then pairs of pairs, then shuffle 128-bit lanes twice. */
static inline void transpose(__m512i r[16]) {
    __m512i a[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            a[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            a[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0xdd);
    }
}

/* Transpose (LANES, DIM) to (DIM, LANES). */
static inline void to_lanes(float rows[LANES][DIM], floats *columns) {
    for (int from = 0; from < DIM; from += LANES) {
        __m512i part[LANES];
        for (int lane = 0; lane < LANES; lane++) part[lane] = _mm512_loadu_si512(rows[lane] + from);
        transpose(part);
        memcpy(columns + from, part, sizeof part);
    }
}

/* Transpose (DIM, LANES) to (LANES, DIM). */
static inline void to_rows(const floats *columns, float rows[LANES][DIM]) {
    for (int from = 0; from < DIM; from += LANES) {
        __m512i part[LANES];
        memcpy(part, columns + from, sizeof part);
        transpose(part);
        for (int lane = 0; lane < LANES; lane++) _mm512_storeu_si512(rows[lane] + from, part[lane]);
    }
}

#else

static inline void to_lanes(float rows[LANES][DIM], floats *columns) {
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < DIM; i++) columns[i][lane] = rows[lane][i];
}

static inline void to_rows(const floats *columns, float rows[LANES][DIM]) {
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < DIM; i++) rows[lane][i] = columns[i][lane];
}

#endif

static inline void read_row(const void *from, int64_t at, float *row, int is_half) {
    for (int i = 0; i < DIM; i += LANES) store(row, i, load(from, at + i, is_half), 0);
}

static inline void write_row(const float *row, void *to, int64_t at, int is_half) {
    for (int i = 0; i < DIM; i += LANES) store(to, at + i, load(row, i, 0), is_half);
}

static ALWAYS_INLINE void attend_by_vectors(const tile *t, const int is_half) {
    floats s[MOST_KEYS], q[DIM], out[DIM];
    float keys[MOST_KEYS][DIM], values[MOST_KEYS][DIM], rows[LANES][DIM] = {{0}};
    const int64_t count = t->key_count, padded = (count + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t lane = 0; lane < t->query_count; lane++)
        read_row(t->q, t->queries[lane] * t->stride, rows[lane], is_half);
    to_lanes(rows, q);
    for (int64_t key = 0; key < count; key++) {
        read_row(t->k, t->keys[key] * t->stride, keys[key], is_half);
        read_row(t->v, t->keys[key] * t->stride, values[key], is_half);
    }
    memset(keys[count], 0, (padded - count) * sizeof *keys);
    floats most[BLOCK];
    for (int j = 0; j < BLOCK; j++) most[j] = splat(-__builtin_inff());
    for (int64_t key = 0; key < padded; key += BLOCK) {
        floats sums[BLOCK] = {{0}};
        for (int i = 0; i < DIM; i++)
#pragma GCC unroll 8
            for (int j = 0; j < BLOCK; j++) sums[j] += q[i] * keys[key + j][i];
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK; j++) {
            s[key + j] = sums[j] * t->scale + load(t->bias, (key + j) * LANES, 0);
            most[j] = larger(s[key + j], most[j]);
        }
    }
    floats sum = softmax(s, count, largest(most), is_half), share = 1.0f / sum;
    for (int from = 0; from < DIM; from += DIMS) {
        floats sums[DIMS] = {{0}};
        for (int64_t key = 0; key < count; key++) {
            floats weight = s[key];
#pragma GCC unroll 16
            for (int i = 0; i < DIMS; i++) sums[i] += weight * values[key][from + i];
        }
        for (int i = 0; i < DIMS; i++) out[from + i] = sums[i] * share;
    }
    to_rows(out, rows);
    for (int64_t lane = 0; lane < t->query_count; lane++)
        write_row(rows[lane], t->out, t->queries[lane] * t->out_stride, is_half);
}

static void attend_float(const tile *t) { attend_by_vectors(t, 0); }

#if !defined __AMX_BF16__ && !defined __AVX512BF16__

static void attend_bfloat16(const tile *t) { attend_by_vectors(t, 1); }

#else

static inline words bfloats(floats x) { return from_halves((halves)_mm512_cvtneps_pbh((__m512)x)); }

/* Scale the scores of all keys and add the bias. Returns the maximum of each lane. */
static inline floats add_bias(const tile *t, floats *s) {
    floats most[BLOCK];
    for (int j = 0; j < BLOCK; j++) most[j] = splat(-__builtin_inff());
    for (int64_t key = 0; key < t->key_count; key += BLOCK)
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK; j++) {
            s[key + j] = s[key + j] * t->scale + load(t->bias, (key + j) * LANES, 0);
            most[j] = larger(s[key + j], most[j]);
        }
    return largest(most);
}

/* Load the queries as words, pairs of channels, and transpose them: (16 lanes, 16 pairs) to (16 pairs, 16 lanes). */
static inline void queries_to_lanes(const tile *t, __m512i q[16]) {
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t query = t->queries[lane < t->query_count ? lane : 0];
        q[lane] = _mm512_loadu_si512((const uint16_t *)t->q + query * t->stride);
    }
    transpose(q);
}

#endif

#if defined __AVX512BF16__ && !defined __AMX_BF16__

/* Broadcast a pair of bfloat16, which may be aligned to two bytes only. */
static inline __m512bh broadcast(const void *pair) {
    int32_t word;
    memcpy(&word, pair, sizeof word);
    return (__m512bh)_mm512_set1_epi32(word);
}

/* Products of pairs: of two channels for the scores, of two keys for the outputs. */
static void attend_bfloat16(const tile *t) {
    floats s[MOST_KEYS + 1], out[DIM];
    float rows[LANES][DIM];
    __m512i q[16], values[(MOST_KEYS + 1) / 2][2];
    const uint16_t *k = t->k, *v = t->v;
    const int64_t count = t->key_count;
    queries_to_lanes(t, q);
    for (int64_t key = 0; key < count; key += BLOCK) {
        const uint16_t *keys[BLOCK];
        for (int j = 0; j < BLOCK; j++) /* keys that follow the last one have a bias of -inf */
            keys[j] = k + t->keys[key + j < count ? key + j : count - 1] * t->stride;
        floats sums[BLOCK] = {{0}};
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
#pragma GCC unroll 8
            for (int j = 0; j < BLOCK; j++)
                sums[j] = (floats)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)q[i], broadcast(keys[j] + 2 * i));
        memcpy(s + key, sums, sizeof sums);
    }
    const floats sum = softmax(s, count, add_bias(t, s), 1), share = 1.0f / sum;
    s[count] = splat(0);
    for (int64_t key = 0; key < count; key += 2) {
        const __m512i first = _mm512_loadu_si512(v + t->keys[key] * t->stride);
        const __m512i second = key + 1 < count ? _mm512_loadu_si512(v + t->keys[key + 1] * t->stride) : _mm512_setzero_si512();
        values[key / 2][0] = _mm512_unpacklo_epi16(first, second); /* channels 0-3, 8-11, 16-19, 24-27 */
        values[key / 2][1] = _mm512_unpackhi_epi16(first, second); /* channels 4-7, 12-15, 20-23, 28-31 */
        s[key / 2] = (floats)(bfloats(s[key]) | bfloats(s[key + 1]) << 16);
    }
    for (int half = 0; half < 2; half++) {
        floats sums[16] = {{0}};
        for (int64_t pair = 0; pair < (count + 1) / 2; pair++)
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                sums[i] = (floats)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)s[pair],
                                                   broadcast((const char *)&values[pair][half] + 4 * i));
        for (int i = 0; i < 16; i++) out[i / 4 * 8 + half * 4 + i % 4] = sums[i] * share;
    }
    to_rows(out, rows);
    for (int64_t lane = 0; lane < t->query_count; lane++)
        write_row(rows[lane], t->out, t->queries[lane] * t->out_stride, 1);
}

#endif

#ifndef __AMX_BF16__

const char *dinat_units(void) { return "vectors"; }

#else

/* Scores are computed as keys x queries, so that softmax needs no operation across lanes. Outputs are computed as queries x
 * channels, the memory layout of `out`. */
static void attend_bfloat16(const tile *t) {
    floats s[MOST_KEYS];
    __m512i left[16], right[2][16];
    const uint16_t *k = t->k, *v = t->v;
    const int64_t count = t->key_count;
    queries_to_lanes(t, left);
    ORDER_MEMORY();
    _tile_loadd(0, left, 64);
    for (int64_t key = 0; key < count; key += 16) {
        for (int j = 0; j < 16; j++) {
            int64_t at = t->keys[key + j < count ? key + j : count - 1];
            right[0][j] = _mm512_loadu_si512(k + at * t->stride);
        }
        _tile_zero(2);
        ORDER_MEMORY();
        _tile_loadd(1, right[0], 64);
        _tile_dpbf16ps(2, 1, 0);
        _tile_stored(2, s + key, 64);
    }
    ORDER_MEMORY();
    floats sum = softmax(s, count, add_bias(t, s), 1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t key = 0; key < count; key += 32) {
        for (int j = 0; j < 16; j++) {
            int64_t first = key + 2 * j, second = first + 1;
            words low = {0}, high = {0};
            __m512i v0 = _mm512_setzero_si512(), v1 = v0;
            if (first < count) {
                low = bfloats(s[first]);
                v0 = _mm512_loadu_si512(v + t->keys[first] * t->stride);
            }
            if (second < count) {
                high = bfloats(s[second]) << 16;
                v1 = _mm512_loadu_si512(v + t->keys[second] * t->stride);
            }
            left[j] = (__m512i)(low | high);
            for (int half = 0; half < 2; half++) {
                __m256i part0 = half ? _mm512_extracti64x4_epi64(v0, 1) : _mm512_castsi512_si256(v0);
                __m256i part1 = half ? _mm512_extracti64x4_epi64(v1, 1) : _mm512_castsi512_si256(v1);
                __m512i wide1 = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part1), 16);
                right[half][j] = _mm512_or_si512(_mm512_cvtepu16_epi32(part0), wide1);
            }
        }
        transpose(left);
        ORDER_MEMORY();
        _tile_loadd(0, left, 64);
        _tile_loadd(1, right[0], 64);
        _tile_loadd(4, right[1], 64);
        _tile_dpbf16ps(2, 0, 1);
        _tile_dpbf16ps(3, 0, 4);
    }
    floats out[LANES][2], share = 1.0f / sum;
    _tile_stored(2, out, sizeof *out);
    _tile_stored(3, &out[0][1], sizeof *out);
    ORDER_MEMORY();
    for (int64_t lane = 0; lane < t->query_count; lane++) {
        out[lane][0] *= share[lane];
        out[lane][1] *= share[lane];
        write_row((const float *)out[lane], t->out, t->queries[lane] * t->out_stride, 1);
    }
}

/* Request AMX from Linux for this process. Returns 0 if it is denied. */
const char *dinat_units(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? "matrix units" : 0;
}

#endif

int dinat_lanes(void) { return LANES; }

/* Compute all tiles of all heads and images.
 *
 * q, k, v: contiguous heads of DIM elements; positions are `stride` elements apart, images `image_stride`.  out: contiguous.
 * tiles: five numbers per tile: the offsets of its queries, keys and bias, and its numbers of queries and keys.
 * bias: for each group of tiles with the same bias, the rows of its heads one after another. */
void dinat_attend(int is_half, const void *q, const void *k, const void *v, void *out, int64_t images, int64_t positions,
                  int64_t heads, int64_t stride, int64_t image_stride, const int64_t *tiles, int64_t tile_count,
                  const int32_t *queries, const int32_t *keys, const float *bias, float scale, int threads) {
    const int64_t size = is_half ? 2 : 4;
#pragma omp parallel num_threads(threads)
    {
#ifdef __AMX_BF16__
        tile_shapes before;
        if (is_half) take_units(&before);
#endif
#pragma omp for schedule(static)
        for (int64_t item = 0; item < images * tile_count * heads; item++) {
            const int64_t head = item % heads, image = item / heads / tile_count;
            const int64_t *numbers = tiles + 5 * (item / heads % tile_count);
            const int64_t from = (image * image_stride + head * DIM) * size;
            const int64_t rows = (numbers[4] + BLOCK - 1) / BLOCK * BLOCK;
            const tile t = {
                .q = (const char *)q + from,
                .k = (const char *)k + from,
                .v = (const char *)v + from,
                .out = (char *)out + (image * positions * heads + head) * DIM * size,
                .stride = stride,
                .out_stride = heads * DIM,
                .queries = queries + numbers[0],
                .keys = keys + numbers[1],
                .bias = bias + (numbers[2] + head * rows) * LANES,
                .query_count = numbers[3],
                .key_count = numbers[4],
                .scale = scale,
            };
            if (is_half)
                attend_bfloat16(&t);
            else
                attend_float(&t);
        }
#ifdef __AMX_BF16__
        if (is_half) give_units_back(&before);
#endif
    }
}
