/* Run one kernel in an emulator. Standard input: the number of the kernel, then its arguments, each preceded by a letter (i: 8
 * bytes, f: a float, p: 8 bytes of size and as many bytes of data). Standard output: the data of all p after the call. Called by
 * tests/model/native/emulated.py. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void dinat_attend(int, const void *, const void *, const void *, void *, int64_t, int64_t, int64_t, int64_t, int64_t,
                  const int64_t *, int64_t, const int32_t *, const int32_t *, const float *, float, int);
void dinat_layer_norm(int, const void *, void *, int64_t, int64_t, const void *, const void *, float, int);
void dinat_resample(int, const uint8_t *, int64_t, int64_t, uint8_t *, uint8_t *, int64_t, int64_t, const int32_t *,
                    const int32_t *, int64_t, const int32_t *, const int32_t *, const int32_t *, int64_t);
int dinat_lanes(void);

static void take(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) exit(2);
}

int main(void) {
    int64_t kernel, n[20], sizes[20] = {0};
    float real = 0;
    void *p[20];
    take(&kernel, sizeof kernel);
    for (int i = 0, letter; (letter = getchar()) != EOF; i++) {
        if (letter == 'f') {
            take(&real, sizeof real);
            continue;
        }
        take(&n[i], sizeof *n);
        if (letter == 'p') {
            sizes[i] = n[i];
            p[i] = malloc(n[i]); /* exact size, so that memory checkers detect accesses beyond it */
            take(p[i], n[i]);
        }
    }
    if (kernel == 0)
        dinat_attend(n[0], p[1], p[2], p[3], p[4], n[5], n[6], n[7], n[8], n[9], p[10], n[11], p[12], p[13], p[14], real, n[16]);
    else if (kernel == 1)
        dinat_layer_norm(n[0], p[1], p[2], n[3], n[4], p[5], p[6], real, n[8]);
    else if (kernel == 2)
        dinat_resample(n[0], p[1], n[2], n[3], p[4], p[5], n[6], n[7], p[8], p[9], n[10], p[11], p[12], p[13], n[14]);
    else
        printf("%d", dinat_lanes());
    for (int i = 0; i < 20; i++)
        if (sizes[i]) fwrite(p[i], 1, sizes[i], stdout);
    return 0;
}
