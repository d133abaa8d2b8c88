/* Image.transform(AFFINE) on RGB, bilinear and bicubic: Pillow's pixels to the last bit, several times as fast.
 *
 * Pillow computes every value in double precision and drops its fraction. Here values are computed in single precision;
 * the error, at most 5e-4 (eight weights and eight sums below 512, rounded), is less than 1 / BANDS. Only where the
 * result is that close to a whole number, so that its fraction might be dropped on the wrong side, is it computed again
 * as by Pillow. Shear and translation along one axis need a filter in one direction alone.
 */
#include "ops.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__) && !defined(VIP_PLAIN)
#include <immintrin.h>
#endif

enum { MARGIN = 2 };   /* pixels around the source that repeat its edge */
enum { BANDS = 1024 }; /* to a whole */
enum { BLOCK = 8 };    /* values that are computed at once, also where fewer are wanted */

/* The source with its margin; `at` is pixel (0, 0). */
typedef struct {
    const uint8_t *at;
    ptrdiff_t stride;
    int32_t height, width;
    const double *args;
    int cubic;
    int sane;  /* coordinates do not suffer from cancellation */
    int shear; /* columns are shifted as a whole, so that the weights are their own in every row */
} source;

/* One row of output: where its pixels lie in the source, what becomes of them. */
typedef struct {
    int32_t *x, *y;       /* the first of the 4 x 4 source pixels */
    float *dx, *dy;       /* 0..1, from the second of them */
    float *across, *down; /* weights of the four */
    int32_t *shift;       /* of columns, in rows; and the four weights of every value */
    float *shifted[4];
    float *values; /* of three channels */
    uint8_t *near; /* whether they come from unequal pixels; then whether the dropped fraction may be wrong */
    uint8_t *fill; /* a row of nothing but the fill colour */
} row;

/* Pillow's order of operations: it decides the last bit. */
static double source_x(const double *args, int32_t x, int32_t y) {
    return args[0] * (x + 0.5) + args[1] * (y + 0.5) + args[2];
}

static double source_y(const double *args, int32_t x, int32_t y) {
    return args[3] * (x + 0.5) + args[4] * (y + 0.5) + args[5];
}

static int inside(const source *from, int32_t x, int32_t y) {
    const double at_x = source_x(from->args, x, y), at_y = source_y(from->args, x, y);
    return at_x >= 0 && at_x < from->width && at_y >= 0 && at_y < from->height;
}

/* Whole part and fraction of a coordinate >= 0, counted from pixel centres. */
static int32_t split(double coordinate, double *fraction) {
    const double value = coordinate - 0.5;
    const int32_t whole = (int32_t)value - (value < 0);
    *fraction = value - whole;
    return whole;
}

/* The first of the 4 x 4 pixels that (x, y) of the output is made of, and how far it lies beyond the second of them. */
static const uint8_t *find(const source *from, int32_t x, int32_t y, double *dx, double *dy) {
    const int32_t first_x = split(source_x(from->args, x, y), dx) - 1;
    const int32_t first_y = split(source_y(from->args, x, y), dy) - 1;
    return from->at + first_y * from->stride + first_x * 3;
}

static double mix(const source *from, double v1, double v2, double v3, double v4, double d) {
    if (!from->cubic)
        return v2 + (v3 - v2) * d;
    const double p2 = -v1 + v3, p3 = 2 * (v1 - v2) + v3 - v4, p4 = -v1 + v2 - v3 + v4;
    return v2 + d * (p2 + d * (p3 + d * p4));
}

/* One channel of 4 x 4 pixels from `p` on as Pillow computes it. */
static uint8_t exact(const source *from, const uint8_t *p, double dx, double dy) {
    double v[4];
    for (int k = 0; k < 4; k++, p += from->stride)
        v[k] = dy != 0 || k == 1 ? mix(from, p[0], p[3], p[6], p[9], dx) : 0;
    const double value = dy != 0 ? mix(from, v[0], v[1], v[2], v[3], dy) : v[1];
    return value <= 0 ? 0 : value >= 255 ? 255 : (uint8_t)value;
}

/* Whether 4 x 4 pixels are all the same. */
static int flat(const uint8_t *p, ptrdiff_t stride) {
    return memcmp(p, p + 3, 9) == 0 && memcmp(p, p + stride, 12) == 0 && memcmp(p, p + 2 * stride, 12) == 0 &&
           memcmp(p, p + 3 * stride, 12) == 0;
}

/* Computes again what may be wrong. */
static void settle(const source *from, const row *to, int32_t y, int32_t begin, int32_t end, uint8_t *rgb) {
    const uint8_t *next = to->near + 3 * begin, *last = to->near + 3 * end;
    while ((next = memchr(next, 1, (size_t)(last - next))) != NULL) {
        const ptrdiff_t x = (next - to->near) / 3;
        double dx, dy;
        const uint8_t *p = find(from, (int32_t)x, y, &dx, &dy);
        if ((dx == 0 && dy == 0) || flat(p, from->stride))
            memcpy(rgb + 3 * x, p + from->stride + 3, 3);
        else
            for (int c = 0; c < 3; c++)
                if (to->near[3 * x + c])
                    rgb[3 * x + c] = exact(from, p + c, dx, dy);
        next = to->near + 3 * (x + 1);
    }
}

/* Drops the fractions of `num` values, and clears `near` where that is safe: away from whole numbers, at or below 0,
 * above 255. What comes from equal pixels is a whole number but for the error, so that is rounded. */
FAST static void truncate_row(const float *restrict values, uint8_t *restrict bytes, uint8_t *restrict near,
                              int32_t num) {
    for (int32_t i = 0; i < num; i++) {
        int32_t value = (int32_t)(values[i] * BANDS);
        value = value < 0 ? 0 : value > 255 * BANDS + BANDS / 2 ? 255 * BANDS + BANDS / 2 : value;
        bytes[i] = (uint8_t)((value + (near[i] == 0 ? BANDS / 2 - 1 : 0)) / BANDS);
        near[i] = ((value + 1) % BANDS <= 1) & (value > BANDS / 2) & (near[i] != 0);
    }
}

FAST static void locate(const row *to, const double *args, int32_t y, int32_t begin, int32_t end) {
    const double x_of_row = args[1] * (y + 0.5), y_of_row = args[4] * (y + 0.5);
    int32_t *restrict xs = to->x, *restrict ys = to->y;
    float *restrict dx = to->dx, *restrict dy = to->dy;
    for (int32_t x = begin; x < end; x++) { /* one too large, so that the cast rounds down */
        const double at_x = args[0] * (x + 0.5) + x_of_row + args[2] + 0.5;
        const double at_y = args[3] * (x + 0.5) + y_of_row + args[5] + 0.5;
        const int32_t whole_x = (int32_t)at_x, whole_y = (int32_t)at_y;
        dx[x] = (float)(at_x - whole_x);
        dy[x] = (float)(at_y - whole_y);
        xs[x] = whole_x - 2;
        ys[x] = whole_y - 2;
    }
}

static inline void weigh(float d, int cubic, float *weights) {
    weights[0] = cubic ? d * (-1 + d * (2 - d)) : 0;
    weights[1] = cubic ? 1 + d * d * (d - 2) : 1 - d;
    weights[2] = cubic ? d * (1 + d * (1 - d)) : d;
    weights[3] = cubic ? d * d * (d - 1) : 0;
}

FAST static void weigh_row(const float *restrict d, int cubic, float *restrict weights, int32_t begin, int32_t end) {
    for (int32_t x = begin; x < end; x++)
        weigh(d[x], cubic, weights + 4 * x);
}

static void filter_area(const source *from, const row *to, int32_t begin, int32_t end) {
    for (int32_t x = begin; x < end; x++) {
        const uint8_t *p = from->at + to->y[x] * from->stride + to->x[x] * 3;
        const float *w = to->across + 4 * x;
        float sums[12] = {0};
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 12; i++)
                sums[i] += to->down[4 * x + k] * p[k * from->stride + i];
        for (int c = 0; c < 3; c++)
            to->values[3 * x + c] = w[0] * sums[c] + w[1] * sums[3 + c] + w[2] * sums[6 + c] + w[3] * sums[9 + c];
    }
}

/* Four taps that lie `step` bytes apart, for `num` bytes. */
FAST static void filter_line(const uint8_t *restrict p, ptrdiff_t step, const float *w, float *restrict values,
                             int32_t num) {
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    for (int32_t i = 0; i < num; i++)
        values[i] = w0 * p[i] + w1 * p[i + step] + w2 * p[i + 2 * step] + w3 * p[i + 3 * step];
}

/* Where all pixels that a filter sees are equal, as in a sky, the value is theirs and need not be computed again. */
FAST static void find_unequal(const uint8_t *restrict p, ptrdiff_t step, int others, uint8_t *restrict near,
                              int32_t num) {
    memset(near, 0, (size_t)num);
    for (int k = 1; k <= others; k++)
        for (int32_t i = 0; i < num; i++)
            near[i] |= p[i] ^ p[i + k * step];
}

#if defined(__x86_64__) && !defined(VIP_PLAIN)
#define AVX2 __attribute__((target("avx2,fma")))

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

AVX2 static inline __m128i eight(const uint8_t *p) {
    return _mm_loadl_epi64((const __m128i *)p);
}

AVX2 static inline __m256 eight_floats(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p)));
}

/* A few neighbouring columns have the same shift; what is computed beyond them, the next ones overwrite. */
AVX2 static void filter_columns(const source *from, const row *to, int32_t y, int32_t begin, int32_t end) {
    const ptrdiff_t stride = from->stride;
    for (int32_t x = begin, stop; x < end; x = stop) {
        for (stop = x + 1; stop < end && to->shift[stop] == to->shift[x]; stop++)
            continue;
        for (int32_t i = 3 * x; i < 3 * stop; i += BLOCK) {
            const uint8_t *p = from->at + (y + to->shift[x] - 1) * stride + i;
            __m256 sum = _mm256_mul_ps(eight_floats(p), _mm256_loadu_ps(to->shifted[0] + i));
            for (int k = 1; k < 4; k++)
                sum = _mm256_fmadd_ps(eight_floats(p + k * stride), _mm256_loadu_ps(to->shifted[k] + i), sum);
            __m128i unequal = _mm_xor_si128(eight(p + stride), eight(p + 2 * stride));
            if (from->cubic) {
                const __m128i upper = _mm_xor_si128(eight(p), eight(p + stride));
                const __m128i lower = _mm_xor_si128(eight(p + 2 * stride), eight(p + 3 * stride));
                unequal = _mm_or_si128(unequal, _mm_or_si128(upper, lower));
            }
            _mm256_storeu_ps(to->values + i, sum);
            _mm_storel_epi64((__m128i *)(to->near + i), unequal);
        }
    }
}

/* Two pixels of `num` rows, and two bytes more, which will get no weight. */
AVX2 static inline __m256 down(const uint8_t *p, ptrdiff_t stride, const float *w, int num) {
    __m256 sum = _mm256_mul_ps(eight_floats(p), _mm256_broadcast_ss(w));
    for (int k = 1; k < num; k++)
        sum = _mm256_fmadd_ps(eight_floats(p + k * stride), _mm256_broadcast_ss(w + k), sum);
    return sum;
}

AVX2 static void filter_area_avx2(const source *from, const row *to, int32_t begin, int32_t end) {
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 1, 1, 1, 0, 0), last = _mm256_setr_epi32(2, 2, 2, 3, 3, 3, 0, 0);
    const __m256i middle = _mm256_setr_epi32(1, 1, 1, 2, 2, 2, 0, 0);
    const __m256i second = _mm256_setr_epi32(3, 4, 5, 0, 0, 0, 0, 0);
    const ptrdiff_t stride = from->stride;
    for (int32_t x = begin; x < end; x++) {
        const uint8_t *p = from->at + to->y[x] * stride + to->x[x] * 3;
        const float *w = to->down + 4 * x;
        const __m256 across = _mm256_castps128_ps256(_mm_loadu_ps(to->across + 4 * x));
        __m256 sum;
        if (from->cubic) {
            sum = _mm256_mul_ps(down(p, stride, w, 4), _mm256_permutevar8x32_ps(across, first));
            sum = _mm256_fmadd_ps(down(p + 6, stride, w, 4), _mm256_permutevar8x32_ps(across, last), sum);
        } else {
            sum = _mm256_mul_ps(down(p + 3 + stride, stride, w + 1, 2), _mm256_permutevar8x32_ps(across, middle));
        }
        sum = _mm256_add_ps(sum, _mm256_permutevar8x32_ps(sum, second));
        _mm_storeu_ps(to->values + 3 * x, _mm256_castps256_ps128(sum)); /* the fourth makes way for the next pixel */
    }
}
#else
#define has_avx2() 0
#define filter_columns(...) ((void)0)
#define filter_area_avx2(...) ((void)0)
#endif

/* Rows with the same weights throughout, in one direction only. Returns 0 where they are not so. */
static int transform_line(const source *from, const row *to, int32_t y, int32_t begin, int32_t end) {
    double dx, dy;
    const uint8_t *p = find(from, begin, y, &dx, &dy);
    if (from->args[0] != 1 || from->args[3] != 0 || (dx != 0 && dy != 0))
        return 0;
    const ptrdiff_t step = dy == 0 ? 3 : from->stride, other_step = dy == 0 ? from->stride : 3;
    const int32_t num = 3 * (end - begin);
    float weights[4];
    p += other_step;
    weigh((float)(dy == 0 ? dx : dy), from->cubic, weights);
    filter_line(p, step, weights, to->values + 3 * begin, num);
    find_unequal(from->cubic ? p : p + step, step, from->cubic ? 3 : 1, to->near + 3 * begin, num);
    return 1;
}

static void transform_any(const source *from, const row *to, int32_t y, int32_t begin, int32_t end) {
    memset(to->near + 3 * begin, 1, 3 * (size_t)(end - begin));
    locate(to, from->args, y, begin, end);
    weigh_row(to->dx, from->cubic, to->across, begin, end);
    weigh_row(to->dy, from->cubic, to->down, begin, end);
    if (has_avx2())
        filter_area_avx2(from, to, begin, end);
    else
        filter_area(from, to, begin, end);
}

static void transform_row(const source *from, const row *to, int32_t y, int32_t begin, int32_t end, uint8_t *rgb) {
    if (!from->sane) {
        memset(to->near + 3 * begin, 1, 3 * (size_t)(end - begin));
    } else {
        if (from->shear && has_avx2())
            filter_columns(from, to, y, begin, end);
        else if (!transform_line(from, to, y, begin, end))
            transform_any(from, to, y, begin, end);
        truncate_row(to->values + 3 * begin, rgb + 3 * begin, to->near + 3 * begin, 3 * (end - begin));
    }
    settle(from, to, y, begin, end, rgb);
}

/* Narrows begin..end, by less than it might, to the x where step * (x + 0.5) + start lies in 0..size. */
static void narrow(double step, double start, int32_t size, int32_t *begin, int32_t *end) {
    if (step == 0)
        return;
    const double first = -start / step, last = (size - start) / step;
    const int32_t low = *begin, high = *end;
    *begin = vip_within(fmin(first, last) - 2, low, high);
    *end = vip_within(fmax(first, last) + 2, low, high);
}

/* Which pixels of a row come from inside the source: they lie side by side, because rounding is monotonic. */
static void find_row(const source *from, int32_t y, int32_t *begin, int32_t *end) {
    const double *args = from->args;
    *begin = 0;
    *end = from->width;
    narrow(args[0], args[1] * (y + 0.5) + args[2], from->width, begin, end);
    narrow(args[3], args[4] * (y + 0.5) + args[5], from->height, begin, end);
    while (*begin < *end && !inside(from, *begin, y))
        ++*begin;
    while (*begin < *end && !inside(from, *end - 1, y))
        --*end;
}

static void shift_columns(const source *from, const row *to) {
    for (int32_t x = 0; x < from->width; x++) {
        const double shift = from->args[3] * (x + 0.5) + from->args[5], whole = floor(shift);
        float weights[4];
        weigh((float)(shift - whole), from->cubic, weights);
        to->shift[x] = (int32_t)whole;
        for (int k = 0; k < 4; k++)
            to->shifted[k][3 * x] = to->shifted[k][3 * x + 1] = to->shifted[k][3 * x + 2] = weights[k];
    }
}

static void repeat(uint8_t *to, const uint8_t *pixel, int32_t num) {
    for (int32_t x = 0; x < num; x++)
        memcpy(to + 3 * x, pixel, 3);
}

static void pad(const uint8_t *rgb, int32_t height, int32_t width, uint8_t *padded, ptrdiff_t stride) {
    for (int32_t y = 0; y < height; y++) {
        uint8_t *to = padded + (y + MARGIN) * stride, *end = to + 3 * ((ptrdiff_t)MARGIN + width);
        memcpy(to + 3 * MARGIN, rgb + (ptrdiff_t)y * width * 3, (size_t)width * 3);
        repeat(to, to + 3 * MARGIN, MARGIN);
        repeat(end, end - 3, MARGIN);
    }
    for (int i = 0; i < MARGIN; i++) {
        memcpy(padded + i * stride, padded + MARGIN * stride, (size_t)stride);
        memcpy(padded + (height + MARGIN + i) * stride, padded + (height + MARGIN - 1) * stride, (size_t)stride);
    }
}

static float *take(float **memory, ptrdiff_t num) {
    float *taken = *memory;
    *memory += num;
    return taken;
}

/* Lays out a row's arrays from `memory` on, `room` values in those that are computed in blocks; returns the end. */
static uint8_t *lay_out(row *to, float *memory, ptrdiff_t num, ptrdiff_t room) {
    to->x = (int32_t *)take(&memory, num);
    to->y = (int32_t *)take(&memory, num);
    to->shift = (int32_t *)take(&memory, num);
    to->dx = take(&memory, num);
    to->dy = take(&memory, num);
    to->across = take(&memory, 4 * num);
    to->down = take(&memory, 4 * num);
    to->values = take(&memory, room);
    for (int k = 0; k < 4; k++)
        to->shifted[k] = take(&memory, room);
    to->near = (uint8_t *)memory;
    to->fill = to->near + room;
    return to->fill + room;
}

void vip_affine(uint8_t *rgb, int32_t height, int32_t width, const vip_op *op, const uint8_t *fill) {
    const ptrdiff_t num = width, stride = 3 * (num + 2 * MARGIN), room = 3 * num + BLOCK;
    const ptrdiff_t size = 4 * (13 * num + 5 * room) + 2 * room + stride * (height + 2 * MARGIN) + BLOCK;
    const double *args = op->args;
    row to;
    uint8_t *padded = lay_out(&to, vip_ops_memory((size_t)size), num, room);
    source from = {.at = padded + MARGIN * stride + MARGIN * 3, .stride = stride, .height = height, .width = width};
    from.args = args;
    from.cubic = op->filter != VIP_BILINEAR;
    from.sane = 1;
    for (int i = 0; i < 6; i++)
        from.sane &= fabs(args[i]) < 1e4;
    from.shear = from.sane && args[0] == 1 && args[1] == 0 && args[2] == 0 && args[4] == 1;
    if (from.shear)
        shift_columns(&from, &to);
    pad(rgb, height, width, padded, stride);
    repeat(to.fill, fill, width);
    for (int32_t y = 0; y < height; y++, rgb += 3 * num) {
        int32_t begin, end;
        find_row(&from, y, &begin, &end);
        memcpy(rgb, to.fill, 3 * (size_t)begin);
        memcpy(rgb + 3 * end, to.fill, 3 * (size_t)(width - end));
        if (begin < end)
            transform_row(&from, &to, y, begin, end, rgb);
    }
}
