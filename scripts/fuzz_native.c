/* Calls the native core with damaged JPEGs and senseless samples; scripts/fuzz_native.py builds it with sanitizers.
 *
 * fuzz_native SEED COUNT FOLDER JPEG...: file i of a seed is always the same one. What goes wrong ends the program,
 * says which file it was, and leaves it as FOLDER/crash.jpg. */
#include <math.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { MAX_SEEDS = 256, MAX_SIDE = 48 };

static struct {
    uint8_t *bytes;
    int64_t length;
} seeds[MAX_SEEDS];
static int num_seeds;

static uint64_t state;
static uint64_t seed, number;
static const char *folder;
static uint8_t *jpeg; /* of exactly its length, so that one byte more is noticed */
static int64_t length;

/* splitmix64 */
static uint64_t draw(void) {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static int64_t below(int64_t limit) {
    return limit > 0 ? (int64_t)(draw() % (uint64_t)limit) : 0;
}

static int32_t side(int64_t limit) {
    return 1 + (int32_t)below(limit);
}

static int one_in(int64_t times) {
    return below(times) == 0;
}

static void tell(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/crash.jpg", folder);
    FILE *file = fopen(path, "wb");
    if (file != NULL) {
        fwrite(jpeg, 1, (size_t)length, file);
        fclose(file);
    }
    fprintf(stderr, "seed %llu, file %llu: %s\n", (unsigned long long)seed, (unsigned long long)number, path);
}

static void read_seed(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || num_seeds == MAX_SEEDS || fseek(file, 0, SEEK_END) != 0) {
        fprintf(stderr, "cannot use %s\n", path);
        exit(1);
    }
    seeds[num_seeds].length = ftell(file);
    seeds[num_seeds].bytes = malloc((size_t)seeds[num_seeds].length + 1);
    rewind(file);
    if (fread(seeds[num_seeds].bytes, 1, (size_t)seeds[num_seeds].length, file) != (size_t)seeds[num_seeds].length)
        exit(1);
    num_seeds++;
    fclose(file);
}

/* Replaces `cut` bytes at `at` by `num` others. */
static void splice(int64_t at, int64_t cut, const uint8_t *bytes, int64_t num) {
    uint8_t *joined = malloc((size_t)(length - cut + num) + 1);
    memcpy(joined, jpeg, (size_t)at);
    memcpy(joined + at, bytes, (size_t)num);
    memcpy(joined + at + num, jpeg + at + cut, (size_t)(length - at - cut));
    free(jpeg);
    jpeg = joined;
    length += num - cut;
}

static int64_t find_marker(int low, int high) {
    for (int64_t at = below(length); at + 20 < length; at++)
        if (jpeg[at] == 0xFF && jpeg[at + 1] >= low && jpeg[at + 1] <= high)
            return at;
    return -1;
}

/* Fields of the frame header: precision, height, width, number of components, factors, tables. */
static void edit_frame(void) {
    static const uint8_t telling[] = {0, 1, 2, 3, 4, 8, 0x11, 0x12, 0x21, 0x22, 0x41, 0x44, 0x7F, 0x80, 0xFF};
    for (int64_t at = 0; at + 20 < length; at++)
        if (jpeg[at] == 0xFF && jpeg[at + 1] >= 0xC0 && jpeg[at + 1] <= 0xC2) {
            jpeg[at + 1 + below(18)] = one_in(2) ? telling[below(sizeof telling)] : (uint8_t)draw();
            return;
        }
}

static void mutate(void) {
    const int other = (int)below(num_seeds);
    const int64_t at = below(length), most = length - at, head = length < 640 ? length : 640;
    const int64_t from = below(seeds[other].length), num = below(seeds[other].length - from);
    switch (below(9)) {
    case 0: /* a bit anywhere */
        jpeg[at] ^= (uint8_t)(1 << below(8));
        break;
    case 1: /* a byte of the header, where most is decided */
        jpeg[below(head)] = (uint8_t)draw();
        break;
    case 2:
        edit_frame();
        break;
    case 3: /* a piece less */
        splice(at, below(most < 64 || one_in(8) ? most : 64), seeds[other].bytes, 0);
        break;
    case 4: /* a piece of another file more */
        splice(at, 0, seeds[other].bytes + from, one_in(4) ? num : num % 64);
        break;
    case 5: /* a piece of another file instead */
        splice(at, below(most), seeds[other].bytes + from, num);
        break;
    case 6: { /* another marker */
        const int64_t marker = find_marker(0xC0, 0xFE);
        if (marker >= 0)
            jpeg[marker + 1] = (uint8_t)(0xC0 + below(63));
        break;
    }
    case 7: { /* another length of a segment */
        const int64_t marker = find_marker(0xC0, 0xFE);
        if (marker >= 0)
            jpeg[marker + 2 + below(2)] = (uint8_t)draw();
        break;
    }
    default: /* a whole byte pattern */
        memset(jpeg + at, one_in(2) ? 0xFF : 0, (size_t)below(most < 16 ? most : 16));
    }
}

static void make_jpeg(void) {
    const int which = (int)below(num_seeds);
    free(jpeg);
    jpeg = malloc(1);
    length = 0;
    splice(0, 0, seeds[which].bytes, seeds[which].length);
    for (int64_t times = below(4); times > 0 && length > 0; times--)
        mutate();
    if (!one_in(4) && (length < 2 || jpeg[length - 1] != 0xD9)) /* few would be decoded otherwise */
        splice(length, 0, (const uint8_t *)"\xFF\xD9", 2);
    uint8_t *exact = malloc((size_t)length + (length == 0));
    memcpy(exact, jpeg, (size_t)length);
    free(jpeg);
    jpeg = exact;
}

static double wild_number(void) {
    static const double wild[] = {0, 1, -1, 0.5, 255, 256, 1e9, -1e9, 1e300, -1e300, 1e-300};
    const int64_t which = below(16);
    if (which == 15)
        return NAN;
    if (which >= 13)
        return which == 13 ? INFINITY : -INFINITY;
    return which < 11 ? wild[which] : (double)(int64_t)draw() / 4e18;
}

static int32_t wild_integer(int32_t sensible) {
    return one_in(80) ? (int32_t)draw() : one_in(80) ? (int32_t)below(5) - 2 : sensible;
}

static void make_sample(vip_sample *sample, int32_t height, int32_t width, int32_t out_height, int32_t out_width) {
    memset(sample, 0, sizeof *sample);
    sample->top = wild_integer((int32_t)below(height));
    sample->left = wild_integer((int32_t)below(width));
    sample->height = wild_integer(side((int64_t)height - sample->top));
    sample->width = wild_integer(side((int64_t)width - sample->left));
    sample->window_top = wild_integer(one_in(2) ? 0 : (int32_t)below(20));
    sample->window_left = wild_integer(one_in(2) ? 0 : (int32_t)below(20));
    sample->resized_height = wild_integer((int32_t)((uint32_t)out_height + (uint32_t)sample->window_top));
    sample->resized_width = wild_integer((int32_t)((uint32_t)out_width + (uint32_t)sample->window_left));
    sample->filter = wild_integer(2 + (int32_t)below(2));
    sample->flip = (int32_t)below(2);
    sample->num_ops = wild_integer((int32_t)below(3));
    for (int32_t i = 0; i < VIP_MAX_OPS; i++) {
        sample->ops[i].kind = wild_integer((int32_t)below(13));
        sample->ops[i].filter = wild_integer(2 + (int32_t)below(2));
        for (int k = 0; k < 6; k++)
            sample->ops[i].args[k] = wild_number();
    }
}

static void cut_and_load(const vip_sample *sample, int32_t out_height, int32_t out_width, uint8_t *out) {
    const uint8_t *framed, *less;
    int64_t framed_length, less_length;
    int32_t head, top = sample->top, left = sample->left, status;
    if (one_in(4) && vip_reframe(jpeg, length, (int32_t)below(130), &framed, &framed_length, &head) == VIP_OK) {
        free(jpeg); /* the re-framed file, damaged once more, takes its place */
        length = framed_length;
        jpeg = malloc((size_t)length);
        memcpy(jpeg, framed, (size_t)length);
        if (one_in(2))
            jpeg[below(one_in(2) ? length : head)] = (uint8_t)draw();
    }
    if (vip_cut(jpeg, length, &top, &left, sample->height, sample->width, &less, &less_length) == VIP_OK) {
        vip_sample moved = *sample;
        moved.top = top;
        moved.left = left;
        uint8_t *copy = malloc((size_t)less_length);
        memcpy(copy, less, (size_t)less_length);
        vip_load(1, (const uint8_t *const *)&copy, &less_length, &moved, out_height, out_width, out, &status);
        free(copy);
    }
}

/* Returns whether the file was decoded. */
static int attack(void) {
    make_jpeg();
    int32_t height, width, status;
    const int32_t out_height = side(MAX_SIDE), out_width = side(MAX_SIDE);
    uint8_t *out = malloc((size_t)out_height * (size_t)out_width * 3);
    vip_sample sample;
    vip_sizes(1, (const uint8_t *const *)&jpeg, &length, &height, &width, &status);
    make_sample(&sample, height, width, out_height, out_width);
    vip_load(1, (const uint8_t *const *)&jpeg, &length, &sample, out_height, out_width, out, &status);
    if (one_in(4)) {
        const int32_t rgb_height = side(MAX_SIDE), rgb_width = side(MAX_SIDE);
        uint8_t *rgb = calloc((size_t)rgb_height * (size_t)rgb_width, 3);
        make_sample(&sample, rgb_height, rgb_width, out_height, out_width);
        vip_render(rgb, rgb_height, rgb_width, &sample, out_height, out_width, out);
        free(rgb);
    }
    cut_and_load(&sample, out_height, out_width, out);
    free(out);
    return status == VIP_OK;
}

int main(int argc, char **argv) {
    if (argc < 5)
        return 1;
    seed = strtoull(argv[1], NULL, 10);
    folder = argv[3];
    for (int i = 4; i < argc; i++)
        read_seed(argv[i]);
    __sanitizer_set_death_callback(tell);
    uint64_t decoded = 0;
    const uint64_t count = strtoull(argv[2], NULL, 10);
    for (number = 0; number < count; number++) {
        state = seed * 0xD1342543DE82EF95u + number;
        draw();
        decoded += (uint64_t)attack();
    }
    printf("%llu %llu\n", (unsigned long long)count, (unsigned long long)decoded);
    return 0;
}
