/* The operations on pixels, but for AFFINE, which has its own file: Pillow's results to the last bit.
 *
 * Pillow's enhancers blend the image with a degenerate one: black, gray, its own gray version or a smoothed one. So do
 * these, row by row, in single precision like Pillow.
 */
#include "ops.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    size_t size;
    uint8_t *bytes;
} memory;

static pthread_key_t memory_key;
static pthread_once_t memory_once = PTHREAD_ONCE_INIT;

static void free_memory(void *own) {
    free(((memory *)own)->bytes);
    free(own);
}

static void make_key(void) {
    pthread_key_create(&memory_key, free_memory);
}

void *vip_ops_memory(size_t size) {
    pthread_once(&memory_once, make_key);
    memory *own = pthread_getspecific(memory_key);
    if (own == NULL && (own = calloc(1, sizeof *own)) != NULL)
        pthread_setspecific(memory_key, own);
    if (own != NULL && own->size < size) {
        free(own->bytes);
        own->size = (size + 63) / 64 * 64;
        own->bytes = aligned_alloc(64, own->size);
    }
    if (own == NULL || own->bytes == NULL) { /* a result that lacks an operation would be worse than none */
        fprintf(stderr, "vip: no memory for %zu bytes of pixels\n", size);
        abort();
    }
    return own->bytes;
}

/* Operations that treat every value for itself by a rule: below `limit` add, elsewhere flip bits; then keep `mask`. */
FAST static void step_pixels(uint8_t *rgb, size_t num, int limit, int add, uint8_t flip, uint8_t mask) {
    for (size_t i = 0; i < num; i++) {
        const int raised = rgb[i] + add < 255 ? rgb[i] + add : 255;
        rgb[i] = (uint8_t)(rgb[i] < limit ? raised : rgb[i] ^ flip) & mask;
    }
}

static void look_up(uint8_t *rgb, size_t num, uint8_t tables[3][256]) {
    for (size_t i = 0; i < num; i += 3) {
        rgb[i] = tables[0][rgb[i]];
        rgb[i + 1] = tables[1][rgb[i + 1]];
        rgb[i + 2] = tables[2][rgb[i + 2]];
    }
}

enum { BLOCK = 96 }; /* bytes: whole pixels and whole vectors */

FAST static void widen_range(const uint8_t *restrict rgb, uint8_t *restrict low, uint8_t *restrict high) {
    for (int i = 0; i < BLOCK; i++) {
        low[i] = rgb[i] < low[i] ? rgb[i] : low[i];
        high[i] = rgb[i] > high[i] ? rgb[i] : high[i];
    }
}

static void autocontrast(uint8_t *rgb, size_t num) {
    uint8_t low[BLOCK], high[BLOCK], tables[3][256];
    int changes = 0;
    memset(low, 255, BLOCK);
    memset(high, 0, BLOCK);
    size_t i = 0;
    for (; i + BLOCK <= num; i += BLOCK)
        widen_range(rgb + i, low, high);
    for (; i < num; i++) {
        low[i % 3] = rgb[i] < low[i % 3] ? rgb[i] : low[i % 3];
        high[i % 3] = rgb[i] > high[i % 3] ? rgb[i] : high[i % 3];
    }
    for (int c = 0; c < 3; c++) {
        for (int k = c + 3; k < BLOCK; k += 3) {
            low[c] = low[k] < low[c] ? low[k] : low[c];
            high[c] = high[k] > high[c] ? high[k] : high[c];
        }
        const double scale = high[c] > low[c] ? 255.0 / (high[c] - low[c]) : 1;
        const double offset = high[c] > low[c] ? -low[c] * scale : 0;
        changes |= scale != 1;
        for (int value = 0; value < 256; value++)
            tables[c][value] = (uint8_t)vip_within(value * scale + offset, 0, 255);
    }
    if (changes)
        look_up(rgb, num, tables);
}

static void equalize_table(const uint32_t *counts, uint8_t *table) {
    int64_t total = 0, last = 0;
    for (int value = 0; value < 256; value++) {
        total += counts[value];
        last = counts[value] ? counts[value] : last;
    }
    const int64_t step = (total - last) / 255;
    int64_t sum = step / 2;
    for (int value = 0; value < 256; value++) {
        table[value] = (uint8_t)(step == 0 ? value : sum / step < 255 ? sum / step : 255);
        sum += counts[value];
    }
}

static void equalize(uint8_t *rgb, size_t num) {
    uint32_t counts[2][3][256] = {0}; /* neighbours are often equal: counted apart, they do not wait for each other */
    uint8_t tables[3][256];
    for (size_t i = 0, turn = 0; i < num; i += 3, turn ^= 1)
        for (int c = 0; c < 3; c++)
            counts[turn][c][rgb[i + c]]++;
    for (int c = 0; c < 3; c++) {
        for (int value = 0; value < 256; value++)
            counts[0][c][value] += counts[1][c][value];
        equalize_table(counts[0][c], tables[c]);
    }
    look_up(rgb, num, tables);
}

/* From the degenerate values (factor 0) to those of the image (factor 1) and beyond; fractions are dropped. */
FAST static void blend(uint8_t *restrict rgb, const uint8_t *restrict degenerate, size_t num, float factor) {
    for (size_t i = 0; i < num; i++) {
        const float value = degenerate[i] + factor * (float)(rgb[i] - degenerate[i]);
        rgb[i] = (uint8_t)(int32_t)(value > 0 ? value < 255 ? value : 255 : 0);
    }
}

static inline uint8_t gray(const uint8_t *pixel) {
    return (uint8_t)((pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16);
}

FAST static uint32_t sum_gray(const uint8_t *rgb, int32_t width) {
    uint32_t sum = 0;
    for (int32_t x = 0; x < width; x++)
        sum += gray(rgb + 3 * x);
    return sum;
}

FAST static void gray_row(const uint8_t *restrict rgb, int32_t width, uint8_t *restrict out) {
    for (int32_t x = 0; x < width; x++)
        out[3 * x] = out[3 * x + 1] = out[3 * x + 2] = gray(rgb + 3 * x);
}

static void blend_gray(uint8_t *rgb, int32_t height, int32_t width, float factor) {
    uint8_t *degenerate = vip_ops_memory(3 * (size_t)width);
    for (int32_t y = 0; y < height; y++, rgb += 3 * (size_t)width) {
        gray_row(rgb, width, degenerate);
        blend(rgb, degenerate, 3 * (size_t)width, factor);
    }
}

static void blend_flat(uint8_t *rgb, int32_t height, int32_t width, uint8_t value, float factor) {
    uint8_t *degenerate = vip_ops_memory(3 * (size_t)width);
    memset(degenerate, value, 3 * (size_t)width);
    for (int32_t y = 0; y < height; y++)
        blend(rgb + (size_t)y * 3 * (size_t)width, degenerate, 3 * (size_t)width, factor);
}

static uint8_t mean_gray(const uint8_t *rgb, int32_t height, int32_t width) {
    double sum = 0;
    for (int32_t y = 0; y < height; y++)
        sum += sum_gray(rgb + (size_t)y * 3 * (size_t)width, width);
    return (uint8_t)(sum / ((double)height * width) + 0.5);
}

/* ImageFilter.SMOOTH: thirteenths, rounded. Between three rows, for all but the first and the last pixel. */
FAST static void smooth_row(const uint8_t *restrict above, const uint8_t *restrict here, const uint8_t *restrict below,
                            uint8_t *restrict out, size_t num) {
    for (size_t i = 3; i < num - 3; i++) {
        const uint32_t top = above[i - 3] + above[i] + above[i + 3], bottom = below[i - 3] + below[i] + below[i + 3];
        const uint32_t sum = top + bottom + here[i - 3] + 5 * here[i] + here[i + 3];
        out[i] = (uint8_t)(((sum + 6) * 5042) >> 16); /* division by 13, right up to 13 * 255 + 6 */
    }
}

static void sharpen(uint8_t *rgb, int32_t height, int32_t width, float factor) {
    const size_t num = 3 * (size_t)width;
    uint8_t *above = vip_ops_memory(3 * num), *here = above + num, *degenerate = here + num;
    if (height < 3 || width < 3)
        return;
    memcpy(above, rgb, num);
    for (int32_t y = 1; y < height - 1; y++) {
        uint8_t *row = rgb + (size_t)y * num;
        memcpy(here, row, num);
        memcpy(degenerate, row, num);
        smooth_row(above, here, row + num, degenerate, num);
        blend(row, degenerate, num, factor);
        uint8_t *free_row = above;
        above = here;
        here = free_row;
    }
}

/* An extended box: `radius` whole pixels to either side with weight `whole`, one more with weight `edge` (2 ** -24). */
typedef struct {
    int32_t radius;
    uint32_t whole, edge;
} box;

/* The box of which three in a row come near a Gaussian of deviation `radius` (Gwosdek et al., 2011); Pillow's mix of
 * single and double precision. */
static box make_box(float radius) {
    const float sigma2 = radius * radius / 3, length = (float)sqrt(12.0 * sigma2 + 1.0);
    const float whole = (float)floor((length - 1.0) / 2.0);
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2);
    part /= 6 * (sigma2 - (whole + 1) * (whole + 1));
    const float size = whole + part;
    box made = {(int32_t)size, (uint32_t)((1 << 24) / (size * 2 + 1)), 0};
    made.edge = ((1 << 24) - (uint32_t)(made.radius * 2 + 1) * made.whole) / 2;
    return made;
}

FAST static void add_line(uint32_t *restrict sums, const uint8_t *restrict line, size_t num) {
    for (size_t i = 0; i < num; i++)
        sums[i] += line[i];
}

FAST static void weigh_line(uint32_t *restrict sums, const uint8_t *first, const uint8_t *last, box size, size_t num,
                            uint8_t *restrict out) {
    for (size_t i = 0; i < num; i++) {
        const uint32_t edges = (uint32_t)(first[i] + last[i]) * size.edge;
        out[i] = (uint8_t)((sums[i] * size.whole + edges + (1 << 23)) >> 24);
        sums[i] = 0;
    }
}

/* `line` has room for radius + 1 pixels on either side of the row. */
static void blur_row(uint8_t *row, int32_t width, box size, uint8_t *line, uint32_t *sums) {
    const size_t num = 3 * (size_t)width, margin = 3 * ((size_t)size.radius + 1);
    for (size_t i = 0; i < margin; i += 3) {
        memcpy(line + i, row, 3);
        memcpy(line + margin + num + i, row + num - 3, 3);
    }
    memcpy(line + margin, row, num);
    for (size_t i = 3; i < 2 * margin; i += 3)
        add_line(sums, line + i, num);
    weigh_line(sums, line, line + 2 * margin, size, num, row);
}

static void blur_columns(const uint8_t *from, uint8_t *to, int32_t height, size_t num, box size, uint32_t *sums) {
#define ROW(Y) (from + (size_t)((Y) < 0 ? 0 : (Y) < height ? (Y) : height - 1) * num)
    for (int32_t y = 0; y < height; y++) {
        for (int32_t k = -size.radius; k <= size.radius; k++)
            add_line(sums, ROW(y + k), num);
        weigh_line(sums, ROW(y - size.radius - 1), ROW(y + size.radius + 1), size, num, to + (size_t)y * num);
    }
#undef ROW
}

static void blur(uint8_t *rgb, int32_t height, int32_t width, double radius) {
    if (!(radius > 0))
        return;
    const box size = make_box(radius < 1000 ? (float)radius : 1000); /* more would take long and leave one colour */
    const size_t num = 3 * (size_t)width, all = (size_t)height * num;
    uint32_t *sums = vip_ops_memory(4 * num + num + 6 * ((size_t)size.radius + 1) + all);
    uint8_t *line = (uint8_t *)(sums + num), *other = line + num + 6 * ((size_t)size.radius + 1);
    memset(sums, 0, 4 * num);
    for (int32_t y = 0; y < height; y++)
        for (int i = 0; i < 3; i++)
            blur_row(rgb + (size_t)y * num, width, size, line, sums);
    blur_columns(rgb, other, height, num, size, sums);
    blur_columns(other, rgb, height, num, size, sums);
    blur_columns(rgb, other, height, num, size, sums);
    memcpy(rgb, other, all);
}

void vip_apply_ops(uint8_t *rgb, int32_t height, int32_t width, const vip_op *ops, int32_t num_ops,
                   const uint8_t *fill) {
    if (height < 1 || width < 1)
        return;
    const size_t num = 3 * (size_t)height * (size_t)width;
    for (const vip_op *op = ops; op < ops + num_ops; op++) {
        const double value = op->args[0];
        switch (op->kind) {
        case VIP_AUTOCONTRAST: autocontrast(rgb, num); break;
        case VIP_EQUALIZE: equalize(rgb, num); break;
        case VIP_INVERT: step_pixels(rgb, num, 0, 0, 255, 255); break;
        case VIP_POSTERIZE: step_pixels(rgb, num, 0, 0, 0, (uint8_t)(0xff00 >> vip_within(value, 0, 8))); break;
        case VIP_SOLARIZE: step_pixels(rgb, num, vip_within(ceil(value), 0, 256), 0, 255, 255); break;
        case VIP_SOLARIZE_ADD: step_pixels(rgb, num, 128, vip_within(value, 0, 255), 0, 255); break;
        case VIP_COLOR: blend_gray(rgb, height, width, (float)value); break;
        case VIP_CONTRAST: blend_flat(rgb, height, width, mean_gray(rgb, height, width), (float)value); break;
        case VIP_BRIGHTNESS: blend_flat(rgb, height, width, 0, (float)value); break;
        case VIP_SHARPNESS: sharpen(rgb, height, width, (float)value); break;
        case VIP_AFFINE: vip_affine(rgb, height, width, op, fill); break;
        case VIP_BLUR: blur(rgb, height, width, value); break;
        }
    }
}
