/* Resampling as Pillow does it: along rows first, rounded to 8 bits, then along columns.
 *
 * The differences to Pillow are 16-bit weights (its own have 22 bits), which now and then round a value the other way,
 * and the order of the work: four source rows at a time, and every output row as soon as its source rows are there, so
 * that all of it stays in the first-level cache.
 */
#include "resize.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

#if defined(__x86_64__) && !defined(VIP_PLAIN) /* the latter for a test of the portable code */
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

enum { BLOCK = 32 };    /* bytes that the pass along columns takes at once */
enum { MAX_BITS = 22 }; /* 255 * 2 ** 22 and the overshoot of a bicubic filter fit 32 bits */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static int scratch_key_failed;

static void free_scratch(void *memory) {
    vip_scratch *scratch = memory;
    free(scratch->across.exact);
    free(scratch->down.exact);
    free(scratch->rows);
    free(scratch->narrow);
    free(scratch);
}

static void make_scratch_key(void) {
    scratch_key_failed = pthread_key_create(&scratch_key, free_scratch);
}

vip_scratch *vip_get_scratch(void) {
    pthread_once(&scratch_once, make_scratch_key);
    if (scratch_key_failed)
        return NULL;
    vip_scratch *scratch = pthread_getspecific(scratch_key);
    if (scratch == NULL && (scratch = calloc(1, sizeof *scratch)) != NULL &&
        pthread_setspecific(scratch_key, scratch) != 0) {
        free(scratch);
        scratch = NULL;
    }
    return scratch;
}

int vip_reserve(uint8_t **memory, size_t *capacity, size_t size) {
#ifdef VIP_EXACT_MEMORY /* scripts/fuzz_native.py: a byte too many is to be noticed */
    *capacity = 0;
#endif
    if (size <= *capacity)
        return 0;
    free(*memory);
    *memory = calloc(1, size); /* zeros: the vector code reads, and multiplies by 0, what was never written */
    *capacity = *memory == NULL ? 0 : size;
    return *memory == NULL ? -1 : 0;
}

static double bilinear(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Keys' cubic convolution with a = -0.5. */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1)
        return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

static int reserve_taps(vip_taps *taps, int32_t num, int32_t stride) {
    size_t pixels = (size_t)num, weights = pixels * (size_t)stride;
    uint8_t *memory = (uint8_t *)taps->exact;
    int status = vip_reserve(&memory, &taps->capacity, weights * (sizeof(double) + sizeof(int16_t)) + pixels * 8);
    taps->exact = (double *)memory;
    if (status != 0)
        return status;
    taps->num = num;
    taps->stride = stride;
    taps->starts = (int32_t *)(taps->exact + weights);
    taps->counts = taps->starts + pixels;
    taps->weights = (int16_t *)(taps->counts + pixels);
    return 0;
}

/* As many bits as the largest weight leaves room for in 16. */
static int32_t most_bits(double largest) {
    int32_t bits = 14;
    while (bits > 1 && largest * (1 << bits) + 0.5 >= 32767)
        bits--;
    while (bits < MAX_BITS && largest * (2 << bits) + 0.5 < 32767)
        bits++;
    return bits;
}

static void round_weights(vip_taps *taps, double largest) {
    taps->bits = most_bits(largest);
    const double unit = 1 << taps->bits;
    for (int32_t i = 0; i < taps->num; i++) {
        const double *exact = taps->exact + (size_t)i * (size_t)taps->stride;
        int16_t *weights = taps->weights + (size_t)i * (size_t)taps->stride;
        taps->starts[i] -= taps->begin;
        for (int32_t k = 0; k < taps->counts[i]; k++)
            weights[k] = (int16_t)(exact[k] * unit + (exact[k] < 0 ? -0.5 : 0.5));
        memset(weights + taps->counts[i], 0, (size_t)(taps->stride - taps->counts[i]) * sizeof *weights);
    }
}

int vip_make_taps(vip_taps *taps, int32_t in_size, int32_t out_size, int32_t first, int32_t num, int32_t filter,
                  int32_t flip) {
    const double scale = (double)in_size / out_size, stretch = scale < 1 ? 1 : scale;
    const double support = stretch * (filter == VIP_BICUBIC ? 2 : 1);
    const double window = 2 * support + 2 < in_size ? 2 * support + 2 : in_size;
    if (reserve_taps(taps, num, ((int32_t)window + 3) / 4 * 4) != 0)
        return -1;
    double largest = 0;
    taps->begin = in_size;
    taps->end = 0;
    for (int32_t i = 0; i < num; i++) {
        const int32_t slot = flip ? num - 1 - i : i;
        const double center = (first + i + 0.5) * scale;
        const double low = center - support + 0.5, high = center + support + 0.5;
        const int32_t start = low < 0 ? 0 : (int32_t)low, end = high > in_size ? in_size : (int32_t)high;
        double *exact = taps->exact + (size_t)slot * (size_t)taps->stride, sum = 0;
        for (int32_t k = 0; k < end - start; k++) {
            const double distance = (start + k - center + 0.5) / stretch;
            sum += exact[k] = filter == VIP_BICUBIC ? bicubic(distance) : bilinear(distance);
        }
        for (int32_t k = 0; k < end - start; k++) {
            exact[k] /= sum;
            largest = fabs(exact[k]) > largest ? fabs(exact[k]) : largest;
        }
        taps->starts[slot] = start;
        taps->counts[slot] = end - start;
        taps->begin = start < taps->begin ? start : taps->begin;
        taps->end = end > taps->end ? end : taps->end;
    }
    round_weights(taps, largest);
    return 0;
}

static size_t narrow_stride(int32_t width) {
    return ((size_t)width * 3 + 1 + BLOCK - 1) / BLOCK * BLOCK; /* one more: pixels are stored four bytes at a time */
}

size_t vip_reserve_rows(vip_scratch *scratch, int32_t width) {
    const size_t stride = ((size_t)width + 4) * 4; /* up to three pixels beyond the last are read, with weight 0 */
    const size_t rows = (size_t)(scratch->down.end - scratch->down.begin) + VIP_ROWS; /* the last four may be void */
    if (vip_reserve(&scratch->rows, &scratch->rows_capacity, stride * VIP_ROWS) != 0 ||
        vip_reserve(&scratch->narrow, &scratch->narrow_capacity, rows * narrow_stride(scratch->across.num)) != 0)
        return 0;
    return stride;
}

static uint8_t clip(int32_t value) {
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

/* The passes, for any processor. Along rows: VIP_ROWS of RGBX become as many of RGB. */
static void across_plain(const uint8_t *rows, size_t stride, const vip_taps *taps, uint8_t *out, size_t out_stride) {
    for (int r = 0; r < VIP_ROWS; r++) {
        for (int32_t i = 0; i < taps->num; i++) {
            const uint8_t *pixel = rows + (size_t)r * stride + (size_t)taps->starts[i] * 4;
            const int16_t *weights = taps->weights + (size_t)i * (size_t)taps->stride;
            int32_t sums[4];
            for (int c = 0; c < 4; c++)
                sums[c] = 1 << (taps->bits - 1);
            for (int32_t k = 0; k < taps->counts[i]; k++)
                for (int c = 0; c < 4; c++)
                    sums[c] += pixel[k * 4 + c] * weights[k];
            for (int c = 0; c < 3; c++)
                out[(size_t)r * out_stride + (size_t)i * 3 + (size_t)c] = clip(sums[c] >> taps->bits);
        }
    }
}

/* Along columns: `count` rows become one of `length` bytes. Reads whole blocks of BLOCK. */
static void down_plain(const uint8_t *rows, size_t stride, const int16_t *weights, int32_t count, int32_t bits,
                       uint8_t *out, size_t length) {
    for (size_t from = 0; from < length; from += BLOCK) {
        const size_t num = length - from < BLOCK ? length - from : BLOCK;
        int32_t sums[BLOCK];
        for (size_t i = 0; i < BLOCK; i++)
            sums[i] = 1 << (bits - 1);
        for (int32_t k = 0; k < count; k++)
            for (size_t i = 0; i < BLOCK; i++)
                sums[i] += rows[(size_t)k * stride + from + i] * weights[k];
        for (size_t i = 0; i < num; i++)
            out[from + i] = clip(sums[i] >> bits);
    }
}

#ifdef AVX2

/* Two weights in every 32-bit lane, as madd wants them. */
AVX2 static inline __m256i weight_pair(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return _mm256_set1_epi32(pair);
}

AVX2 static inline __m256i two_rows(const uint8_t *pixels, size_t stride) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)pixels)),
                                   _mm_loadu_si128((const __m128i *)(pixels + stride)), 1);
}

/* Four pixels of four rows at a time: pairs of pixels side by side, channel by channel, widened to 16 bits. */
AVX2 static void across_avx2(const uint8_t *rows, size_t stride, const vip_taps *taps, uint8_t *out,
                             size_t out_stride) {
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i second = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const __m256i half = _mm256_set1_epi32(1 << (taps->bits - 1));
    const __m128i shift = _mm_cvtsi32_si128(taps->bits);
    for (int32_t i = 0; i < taps->num; i++, out += 3) {
        const uint8_t *pixels = rows + (size_t)taps->starts[i] * 4;
        const int16_t *weights = taps->weights + (size_t)i * (size_t)taps->stride;
        __m256i upper = half, lower = half;
        for (int32_t k = 0; k < taps->counts[i]; k += 4, pixels += 16) {
            const __m256i w01 = weight_pair(weights + k), w23 = weight_pair(weights + k + 2);
            const __m256i a = two_rows(pixels, stride), b = two_rows(pixels + 2 * stride, stride);
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(_mm256_shuffle_epi8(a, first), w01));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(_mm256_shuffle_epi8(b, first), w01));
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(_mm256_shuffle_epi8(a, second), w23));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(_mm256_shuffle_epi8(b, second), w23));
        }
        const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(upper, shift), _mm256_sra_epi32(lower, shift));
        const __m256i bytes = _mm256_packus_epi16(words, words);
        const int64_t even = _mm256_extract_epi64(bytes, 0), odd = _mm256_extract_epi64(bytes, 2);
        const int32_t pixel[VIP_ROWS] = {(int32_t)even, (int32_t)odd, (int32_t)(even >> 32), (int32_t)(odd >> 32)};
        for (int r = 0; r < VIP_ROWS; r++) /* the fourth byte is overwritten by the next pixel */
            memcpy(out + (size_t)r * out_stride, &pixel[r], 4);
    }
}

AVX2 static void down_avx2(const uint8_t *rows, size_t stride, const int16_t *weights, int32_t count, int32_t bits,
                           uint8_t *out, size_t length) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (bits - 1));
    const __m128i shift = _mm_cvtsi32_si128(bits);
    for (size_t from = 0; from < length; from += BLOCK) {
        __m256i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int32_t k = 0; k < count; k += 2) { /* a row beyond an odd count has weight 0 */
            const uint8_t *row = rows + (size_t)k * stride + from;
            const __m256i a = _mm256_loadu_si256((const __m256i *)row);
            const __m256i b = _mm256_loadu_si256((const __m256i *)(row + stride));
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            const __m256i pair = weight_pair(weights + k);
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
        }
        const __m256i low = _mm256_packs_epi32(_mm256_sra_epi32(s0, shift), _mm256_sra_epi32(s1, shift));
        const __m256i high = _mm256_packs_epi32(_mm256_sra_epi32(s2, shift), _mm256_sra_epi32(s3, shift));
        const __m256i bytes = _mm256_packus_epi16(low, high);
        if (length - from >= BLOCK) {
            _mm256_storeu_si256((__m256i *)(out + from), bytes);
        } else {
            uint8_t last[BLOCK];
            _mm256_storeu_si256((__m256i *)last, bytes);
            memcpy(out + from, last, length - from);
        }
    }
}

#endif

void vip_resize(vip_scratch *scratch, size_t stride, int32_t skip, vip_next_rows next, void *source, uint8_t *out) {
    const vip_taps *across = &scratch->across, *down = &scratch->down;
    const size_t between = narrow_stride(across->num), length = (size_t)across->num * 3;
    void (*pass_across)(const uint8_t *, size_t, const vip_taps *, uint8_t *, size_t) = across_plain;
    void (*pass_down)(const uint8_t *, size_t, const int16_t *, int32_t, int32_t, uint8_t *, size_t) = down_plain;
#ifdef AVX2
    if (__builtin_cpu_supports("avx2")) {
        pass_across = across_avx2;
        pass_down = down_avx2;
    }
#endif
    const int32_t num_rows = down->end - down->begin;
    for (int32_t done = 0, y = 0; y < down->num;) {
        const int32_t more = num_rows - done < VIP_ROWS ? num_rows - done : VIP_ROWS;
        next(source, scratch->rows, stride, more);
        pass_across(scratch->rows + (size_t)skip * 4, stride, across, scratch->narrow + (size_t)done * between,
                    between);
        done += more;
        for (; y < down->num && down->starts[y] + down->counts[y] <= done; y++)
            pass_down(scratch->narrow + (size_t)down->starts[y] * between, between,
                      down->weights + (size_t)y * (size_t)down->stride, down->counts[y], down->bits,
                      out + (size_t)y * length, length);
    }
}
