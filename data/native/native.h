/* The native core of the loader: from a JPEG's bytes to the pixels of one augmented sample, without Python's lock.
 *
 * Nothing here keeps state between calls except scratch memory, which is per thread. Every function may be called from any
 * number of threads. Conventions are Pillow's throughout: the same resampling filters, the same rounding of the operations.
 */
#ifndef VIP_NATIVE_H
#define VIP_NATIVE_H

#include <stdint.h>

#define VIP_MAX_OPS 8
#define VIP_API __attribute__((visibility("default")))

/* What became of an image. Anything but OK sends it through Pillow, which decides whether it is bad and says why. */
enum { VIP_OK = 0, VIP_ODD = 1, VIP_UNREADABLE = 2 };

/* Filters, numbered as Pillow numbers them. */
enum { VIP_BILINEAR = 2, VIP_BICUBIC = 3 };

/* Operations on pixels; `args` of each in brackets. Pillow's (and for SOLARIZE_ADD timm's) definitions. */
enum {
    VIP_NONE = 0,
    VIP_AUTOCONTRAST = 1,
    VIP_EQUALIZE = 2,
    VIP_INVERT = 3,
    VIP_POSTERIZE = 4,    /* [bits to keep, 0..8] */
    VIP_SOLARIZE = 5,     /* [threshold] */
    VIP_SOLARIZE_ADD = 6, /* [added value] below 128 */
    VIP_COLOR = 7,        /* [factor]: ImageEnhance.Color, and so on below */
    VIP_CONTRAST = 8,
    VIP_BRIGHTNESS = 9,
    VIP_SHARPNESS = 10,
    VIP_AFFINE = 11, /* [a, b, c, d, e, f]: Image.transform(AFFINE), output to input; uses `filter` and the fill colour */
    VIP_BLUR = 12,   /* [radius]: ImageFilter.GaussianBlur */
};

typedef struct {
    int32_t kind;
    int32_t filter;
    double args[6];
} vip_op;

/* One sample. The box of the source image (its own pixels; what lies outside does not count) is resized to
 * resized_height x resized_width, of which the window of the output's size that begins at (window_top, window_left) is kept;
 * then it is mirrored left to right where `flip` is set, then the operations follow in order. */
typedef struct {
    int32_t top, left, height, width;
    int32_t resized_height, resized_width, window_top, window_left;
    int32_t filter;
    int32_t flip;
    int32_t num_ops;
    uint8_t fill[4]; /* red, green, blue of what AFFINE leaves empty */
    vip_op ops[VIP_MAX_OPS];
} vip_sample;

/* core.c: decode the region, resize, mirror, operate. `out` is (num, out_height, out_width, 3) RGB; status (num). */
VIP_API void vip_sizes(int32_t num, const uint8_t *const *jpegs, const int64_t *lengths, int32_t *heights, int32_t *widths,
                       int32_t *status);
VIP_API void vip_load(int32_t num, const uint8_t *const *jpegs, const int64_t *lengths, const vip_sample *samples,
                      int32_t out_height, int32_t out_width, uint8_t *out, int32_t *status);
/* The same from decoded RGB pixels (height, width, 3), for what Pillow had to decode and for raw packs. VIP_ODD for a
 * sample that is not possible, of which `out` then says nothing. */
VIP_API int32_t vip_render(const uint8_t *rgb, int32_t height, int32_t width, const vip_sample *sample,
                           int32_t out_height, int32_t out_width, uint8_t *out);
/* sizeof(vip_sample), for a caller to compare with what it believes. */
VIP_API int64_t vip_sample_size(void);
/* One image of vip_load, for the other files of the library. */
int vip_load_one(const uint8_t *jpeg, int64_t length, const vip_sample *sample, int32_t out_height, int32_t out_width,
                 uint8_t *out);

/* files.c: whole files, one after the other, into `arena`; where and how long. Returns the bytes that all of them need: more
 * than `capacity` means that some were not read, and that a larger arena is wanted. VIP_UNREADABLE for what is no regular
 * file, empty, over 1 GiB or in trouble: the caller's careful reader says what it is. */
VIP_API int64_t vip_read_files(int32_t num, const char *const *paths, uint8_t *arena, int64_t capacity,
                               int64_t *offsets, int64_t *lengths, int32_t *status);

/* ops.c: the operations of a sample on (height, width, 3) RGB, in place. */
VIP_API void vip_apply_ops(uint8_t *rgb, int32_t height, int32_t width, const vip_op *ops, int32_t num_ops,
                           const uint8_t *fill);

/* frame.c: JPEGs re-framed with restart markers, see there. Pointers to scratch memory are valid until the thread's next call. */
/* A JPEG's coefficients coded anew in segments of about `segment_pixels`; `head`: bytes in front of the first one.
 * VIP_ODD for what is better kept as it is: no JPEG of 8 bits and 1 or 3 components, too large, or the least bit
 * damaged. */
VIP_API int32_t vip_reframe(const uint8_t *jpeg, int64_t length, int32_t segment_pixels, const uint8_t **out,
                            int64_t *out_length, int32_t *head);

/* cut.c: of a re-framed JPEG a smaller one that covers the region, whose corner is then at (*top, *left); VIP_ODD where
 * the file was not re-framed. Its pixels within the region are those of the whole, to the last bit. */
VIP_API int vip_cut(const uint8_t *record, int64_t length, int32_t *top, int32_t *left, int32_t height, int32_t width,
                    const uint8_t **out, int64_t *out_length);
/* vip_load from records of packs (data/pack.py): record i is at offsets[i] of the open file files[i]; heads[i] is 0 for
 * one that is to be decoded whole. */
VIP_API void vip_load_pack(int32_t num, const int32_t *files, const int64_t *offsets, const int64_t *lengths,
                           const int32_t *heads, const vip_sample *samples, int32_t out_height, int32_t out_width,
                           uint8_t *out, int32_t *status);

#endif
