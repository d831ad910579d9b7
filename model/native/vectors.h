/* Vectors of the CPU's native width, by the vector extensions of GCC and Clang, and conversions from and to bfloat16. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* For functions with a constant parameter such as is_half: the compiler generates one version for each value. */
#define ALWAYS_INLINE inline __attribute__((always_inline))

/* 32-bit elements per vector. */
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

/* Bytes of an element: bfloat16 with is_half, else float32. */
static inline int64_t size_of(int is_half) { return is_half ? 2 : 4; }

static inline void *element(const void *data, int64_t at, int is_half) { return (char *)data + at * size_of(is_half); }

static inline floats splat(float x) { return x - (floats){0}; }

static inline floats choose(ints mask, floats a, floats b) { return (floats)((mask & (ints)a) | (~mask & (ints)b)); }

/* Maximum; returns b if an operand is NaN. */
static inline floats larger(floats a, floats b) {
#ifdef __AVX512F__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

static inline words from_halves(halves x) {
#ifdef __AVX512F__
    return (words)_mm512_cvtepu16_epi32((__m256i)x); /* not every compiler generates this instruction below */
#else
    return __builtin_convertvector(x, words);
#endif
}

/* Round to the nearest bfloat16, ties to even. The result is in the upper half of each word. NaN stays NaN. */
static inline words rounded_words(floats x) {
    words bits = (words)x;
    words odd = bits >> 16 & 1;
    words nearest = bits + odd + 0x7fff;
    words is_nan = (words)(x != x);
    return (~is_nan & nearest) | (is_nan & (bits | 0x400000));
}

/* Load LANES float32 or bfloat16 elements as floats. at: offset in elements. */
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
