/* The matrix units (AMX) in plain C, for CPUs without them: force-included before the kernels' sources, with __AMX_BF16__ set.
 * Each thread has eight tiles and a configuration; a tile instruction without a configuration aborts, as a CPU would. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static __thread uint8_t tiles[8][16][64];
static __thread uint8_t configuration[64]; /* palette, start, 14 unused, 16 x bytes of a row (uint16), 16 x rows */

static inline int tile_rows(int tile) {
    if (configuration[0] != 1) abort();
    return configuration[48 + tile];
}

static inline int tile_bytes(int tile) { return configuration[16 + 2 * tile] + 256 * configuration[17 + 2 * tile]; }

static inline float to_float(const uint8_t *half) {
    uint32_t word = (uint32_t)(half[0] + 256 * half[1]) << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline uint16_t to_half(float value) { /* rounded to nearest even; NaN stays NaN */
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? (word >> 16) | 64 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

static inline void configure(const void *from) {
    memcpy(configuration, from, sizeof configuration);
    memset(tiles, 0, sizeof tiles);
}

static inline void load_tile(int tile, const void *from, int64_t stride) {
    for (int row = 0; row < tile_rows(tile); row++)
        memcpy(tiles[tile][row], (const uint8_t *)from + row * stride, tile_bytes(tile));
}

static inline void store_tile(int tile, void *to, int64_t stride) {
    for (int row = 0; row < tile_rows(tile); row++) memcpy((uint8_t *)to + row * stride, tiles[tile][row], tile_bytes(tile));
}

/* sums (m, n) += left (m, 2k) x right (k, 2n), whose rows hold pairs of inputs of each output. */
static inline void multiply_tiles(int sums, int left, int right) {
    for (int m = 0; m < tile_rows(sums); m++)
        for (int n = 0; n < tile_bytes(sums) / 4; n++) {
            float sum;
            memcpy(&sum, &tiles[sums][m][4 * n], sizeof sum);
            for (int k = 0; k < 2 * tile_rows(right); k++)
                sum += to_float(&tiles[left][m][2 * k]) * to_float(&tiles[right][k / 2][4 * n + k % 2 * 2]);
            memcpy(&tiles[sums][m][4 * n], &sum, sizeof sum);
        }
}

static inline __m256bh half_vector(__m512 x) {
    float values[16];
    uint16_t halves[16];
    _mm512_storeu_ps(values, x);
    for (int i = 0; i < 16; i++) halves[i] = to_half(values[i]);
    __m256bh packed;
    memcpy(&packed, halves, sizeof packed);
    return packed;
}

static inline __m512bh half_vectors(__m512 high, __m512 low) {
    __m256bh parts[2] = {half_vector(low), half_vector(high)};
    __m512bh packed;
    memcpy(&packed, parts, sizeof packed);
    return packed;
}

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) configure(from)
#define _tile_storeconfig(to) memcpy(to, configuration, sizeof configuration)
#define _tile_release() memset(configuration, 0, sizeof configuration)
#define _tile_zero(tile) memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_loadd(tile, from, stride) load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) store_tile(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) multiply_tiles(sums, left, right)
#define _mm512_cvtneps_pbh(x) half_vector(x)
#define _mm512_cvtne2ps_pbh(high, low) half_vectors(high, low)
#define syscall(...) 0 /* the request for AMX */
