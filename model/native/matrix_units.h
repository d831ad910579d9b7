/* Configuration of the CPU's matrix units (AMX) while a kernel runs: eight tiles of 16 rows of 64 bytes. */

#if defined __AMXBF16__ && !defined __AMX_BF16__ /* name in Clang before 15 */
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

/* Mark the whole struct as accessed: GCC declares that _tile_loadconfig and _tile_storeconfig access only eight bytes of it. */
#define ALL_OF(shapes) __asm__ volatile("" : "+m"(shapes))

/* Order memory accesses: GCC declares neither what _tile_loadd reads nor what _tile_stored writes. Takes no instruction. */
#define ORDER_MEMORY() __asm__ volatile("" ::: "memory")

/* Configure the tiles. before: receives the previous configuration, which may belong to another library. */
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
