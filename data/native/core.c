/* Samples: from a JPEG, or from pixels, to the network's size, augmented. */
#include "native.h"

#include <string.h>

#include "jpeg.h"
#include "resize.h"

int64_t vip_sample_size(void) {
    return sizeof(vip_sample);
}

void vip_sizes(int32_t num, const uint8_t *const *jpegs, const int64_t *lengths, int32_t *heights, int32_t *widths,
               int32_t *status) {
    for (int32_t i = 0; i < num; i++)
        status[i] = vip_jpeg_size(jpegs[i], lengths[i], &heights[i], &widths[i]);
}

/* Whether the box lies within the image and the window within the resized box. */
static int is_possible(const vip_sample *sample, int32_t height, int32_t width, int32_t out_height, int32_t out_width) {
    return sample->top >= 0 && sample->height > 0 && (int64_t)sample->top + sample->height <= height &&
           sample->left >= 0 && sample->width > 0 && (int64_t)sample->left + sample->width <= width &&
           sample->window_top >= 0 && out_height > 0 &&
           (int64_t)sample->window_top + out_height <= sample->resized_height && sample->window_left >= 0 &&
           out_width > 0 && (int64_t)sample->window_left + out_width <= sample->resized_width && sample->num_ops >= 0 &&
           sample->num_ops <= VIP_MAX_OPS && (sample->filter == VIP_BILINEAR || sample->filter == VIP_BICUBIC);
}

/* Scratch memory with the weights of a sample; NULL when the sample is not possible, or there is no memory. */
static vip_scratch *prepare(const vip_sample *sample, int32_t height, int32_t width, int32_t out_height,
                            int32_t out_width) {
    if (!is_possible(sample, height, width, out_height, out_width))
        return NULL;
    vip_scratch *scratch = vip_get_scratch();
    if (scratch == NULL ||
        vip_make_taps(&scratch->across, sample->width, sample->resized_width, sample->window_left, out_width,
                      sample->filter, sample->flip) != 0 ||
        vip_make_taps(&scratch->down, sample->height, sample->resized_height, sample->window_top, out_height,
                      sample->filter, 0) != 0)
        return NULL;
    return scratch;
}

int vip_load_one(const uint8_t *jpeg, int64_t length, const vip_sample *sample, int32_t out_height, int32_t out_width,
                 uint8_t *out) {
    int32_t height, width;
    if (vip_jpeg_size(jpeg, length, &height, &width) != VIP_OK)
        return VIP_ODD;
    vip_scratch *scratch = prepare(sample, height, width, out_height, out_width);
    if (scratch == NULL || vip_jpeg_resize(jpeg, length, sample, scratch, out) != VIP_OK)
        return VIP_ODD;
    vip_apply_ops(out, out_height, out_width, sample->ops, sample->num_ops, sample->fill);
    return VIP_OK;
}

void vip_load(int32_t num, const uint8_t *const *jpegs, const int64_t *lengths, const vip_sample *samples,
              int32_t out_height, int32_t out_width, uint8_t *out, int32_t *status) {
    const size_t size = (size_t)out_height * (size_t)out_width * 3;
    for (int32_t i = 0; i < num; i++)
        status[i] = vip_load_one(jpegs[i], lengths[i], &samples[i], out_height, out_width, out + (size_t)i * size);
}

typedef struct {
    const uint8_t *next; /* the first pixel of the region in the next row */
    size_t stride;
    int32_t width;
} pixel_rows;

/* RGB to RGBX: the fourth byte is whatever comes next, of which there is none behind the last pixel. */
static void next_rows(void *source, uint8_t *rows, size_t stride, int32_t num) {
    pixel_rows *pixels = source;
    const size_t last = (size_t)pixels->width - 1;
    for (; num > 0; num--, rows += stride, pixels->next += pixels->stride) {
        for (size_t i = 0; i < last; i++)
            memcpy(rows + i * 4, pixels->next + i * 3, 4);
        memcpy(rows + last * 4, pixels->next + last * 3, 3);
    }
}

int32_t vip_render(const uint8_t *rgb, int32_t height, int32_t width, const vip_sample *sample, int32_t out_height,
                   int32_t out_width, uint8_t *out) {
    vip_scratch *scratch = prepare(sample, height, width, out_height, out_width);
    if (scratch == NULL)
        return VIP_ODD;
    const size_t row = (size_t)sample->top + (size_t)scratch->down.begin;
    const size_t column = (size_t)sample->left + (size_t)scratch->across.begin;
    const size_t stride = (size_t)width * 3;
    pixel_rows pixels = {rgb + row * stride + column * 3, stride, scratch->across.end - scratch->across.begin};
    const size_t scratch_stride = vip_reserve_rows(scratch, pixels.width);
    if (scratch_stride == 0)
        return VIP_ODD;
    vip_resize(scratch, scratch_stride, 0, next_rows, &pixels, out);
    vip_apply_ops(out, out_height, out_width, sample->ops, sample->num_ops, sample->fill);
    return VIP_OK;
}
