/* Inside ops.c and affine.c only. */
#ifndef VIP_OPS_H
#define VIP_OPS_H

#include <stddef.h>

#include "native.h"

/* Loops that the compiler turns into vector code, built for several generations of processors; the loader picks one. */
#if !defined(__x86_64__) || !defined(__GLIBC__) || defined(__clang__) || defined(VIP_PLAIN)
#define FAST
#elif __GNUC__ < 12
#define FAST __attribute__((target_clones("default", "avx2")))
#else
#define FAST __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif

/* `value` without its fraction, and no less than `low`, no more than `high`; not a number is `low`. */
static inline int32_t vip_within(double value, int32_t low, int32_t high) {
    return value > low ? value < high ? (int32_t)value : high : low;
}

/* At least `size` bytes of this thread's memory, aligned for vectors; good until the next call. */
void *vip_ops_memory(size_t size);

void vip_affine(uint8_t *rgb, int32_t height, int32_t width, const vip_op *op, const uint8_t *fill);

#endif
