/* The processor's matrix units (AMX): eight tiles of 16 rows of 64 bytes, for as long as a kernel runs. */

#if defined __AMXBF16__ && !defined __AMX_BF16__ /* Clang's name before its release 15 */
#define __AMX_BF16__ 1
#endif

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <stdint.h>

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) tile_shapes;

/* For a compiler that believes GCC's own functions, by which eight bytes of a tile_shapes are read or written. */
#define ALL_OF(shapes) __asm__ volatile("" : "+m"(shapes))

/* before: gets what was there, which may be another library's. */
static inline void take_units(tile_shapes *before) {
    tile_shapes mine = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        mine.bytes[i] = 64;
        mine.rows[i] = 16;
    }
    ALL_OF(mine);
    _tile_storeconfig(before);
    ALL_OF(*before);
    _tile_loadconfig(&mine);
}

static inline void give_units_back(const tile_shapes *before) {
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}

#endif
