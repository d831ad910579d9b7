/* Vectors of the processor's own width, in plain C with the extensions of GCC and Clang, and bfloat16 to and from them. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* Numbers of a vector. */
#if defined __AVX512F__
enum { LANES = 16 };
#elif defined __AVX__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline floats splat(float x) { return x - (floats){0}; }

static inline floats choose(ints mask, floats a, floats b) { return (floats)((mask & (ints)a) | (~mask & (ints)b)); }

/* b where one is NaN. */
static inline floats larger(floats a, floats b) {
#ifdef __AVX512F__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

static inline words from_halves(halves x) {
#ifdef __AVX512F__
    return (words)_mm512_cvtepu16_epi32((__m256i)x); /* which not every compiler finds by itself */
#else
    return __builtin_convertvector(x, words);
#endif
}

/* To the nearest bfloat16, of two as near the even one, in the upper half of each word. NaN stays NaN. */
static inline words rounded_words(floats x) {
    words bits = (words)x;
    words odd = bits >> 16 & 1;
    words nearest = bits + odd + 0x7fff;
    words is_nan = (words)(x != x);
    return (~is_nan & nearest) | (is_nan & (bits | 0x400000));
}

/* LANES numbers from where they lie, as floats; `at` counts numbers. */
static inline floats load(const void *from, int64_t at, int is_half) {
    if (is_half) {
        halves half;
        memcpy(&half, (const uint16_t *)from + at, sizeof half);
        return (floats)(from_halves(half) << 16);
    }
    floats x;
    memcpy(&x, (const float *)from + at, sizeof x);
    return x;
}

static inline void store(void *to, int64_t at, floats x, int is_half) {
    if (!is_half) {
        memcpy((float *)to + at, &x, sizeof x);
        return;
    }
#ifdef __AVX512BF16__
    halves half = (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    halves half = __builtin_convertvector(rounded_words(x) >> 16, halves);
#endif
    memcpy((uint16_t *)to + at, &half, sizeof half);
}
