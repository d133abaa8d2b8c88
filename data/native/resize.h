/* Resampling as Pillow does it: inside the library only. */
#ifndef VIP_RESIZE_H
#define VIP_RESIZE_H

#include <stddef.h>
#include <stdint.h>

#define VIP_ROWS 4 /* rows that the pass along rows takes at once */

/* What each of `num` output pixels takes along one axis: `counts` source pixels from `starts` on (counted from `begin`)
 * times `weights`, `stride` to an output pixel, in units of 2 ** -bits, zero beyond the count.
 * Source pixels begin..end are all that is needed. */
typedef struct {
    int32_t num, stride, bits, begin, end;
    int32_t *starts, *counts;
    int16_t *weights;
    double *exact;
    size_t capacity; /* of the memory that all four share */
} vip_taps;

/* Memory of one thread, kept between calls and freed with the thread. */
typedef struct {
    vip_taps across, down;
    uint8_t *rows, *narrow; /* source rows, RGBX; the rows after the pass along them, RGB */
    size_t rows_capacity, narrow_capacity;
} vip_scratch;

/* NULL when there is no memory. */
vip_scratch *vip_get_scratch(void);

/* Makes `*memory` at least `size` bytes long; what it held is lost. Returns 0, or -1 when there is no memory. */
int vip_reserve(uint8_t **memory, size_t *capacity, size_t size);

/* Weights of output pixels first .. first + num - 1 when in_size pixels become out_size, in reverse order where `flip`
 * is set. Returns 0, or -1 when there is no memory. */
int vip_make_taps(vip_taps *taps, int32_t in_size, int32_t out_size, int32_t first, int32_t num, int32_t filter,
                  int32_t flip);

/* Writes the next `num` source rows, RGBX, to `rows`, which are `stride` bytes apart. May leave by longjmp. */
typedef void (*vip_next_rows)(void *source, uint8_t *rows, size_t stride, int32_t num);

/* Room for rows of `width` RGBX pixels, and for what scratch->across and scratch->down will make of them.
 * Returns the bytes from row to row, or 0 when there is no memory. */
size_t vip_reserve_rows(vip_scratch *scratch, int32_t width);

/* The output, (down.num, across.num, 3) RGB. `skip` pixels of each source row precede across.begin. */
void vip_resize(vip_scratch *scratch, size_t stride, int32_t skip, vip_next_rows next, void *source, uint8_t *out);

#endif
