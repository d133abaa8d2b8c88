/* Regions of JPEGs: entropy decoding from the top to the last row that is needed, everything else for the region alone.
 *
 * The pixels are those of a full decode. Chroma samples are interpolated between neighbours, so a margin is decoded to
 * the left and right and dropped; above, the library reads what it needs by itself. Whatever makes it complain is left to
 * Pillow.
 */
#include "jpeg.h"

#include <string.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000090
#error "libjpeg-turbo 2.1 or newer is needed"
#endif

enum { MARGIN = 8 };                   /* pixels; a chroma sample spans four at most */
enum { MAX_PIXELS = 178956970 };       /* Pillow's own limit, as in data/decode.py */
enum { MAX_BUFFERED_PIXELS = 16 << 20 }; /* of files whose coefficients are all held in memory, up to 6 bytes a pixel */
enum { MAX_LENGTH = 1 << 30 };         /* bytes, as in data/decode.py */

static int is_whole(const uint8_t *jpeg, int64_t length) {
    return length >= 4 && length <= MAX_LENGTH && jpeg[0] == 0xFF && jpeg[1] == 0xD8 && jpeg[length - 2] == 0xFF &&
           jpeg[length - 1] == 0xD9;
}

int vip_jpeg_size(const uint8_t *jpeg, int64_t length, int32_t *height, int32_t *width) {
    *height = *width = 0;
    if (!is_whole(jpeg, length))
        return VIP_ODD;
    for (int64_t at = 2; at + 4 <= length;) {
        const int marker = jpeg[at + 1], size = jpeg[at + 2] << 8 | jpeg[at + 3];
        if (jpeg[at] != 0xFF)
            return VIP_ODD;
        if (marker == 0xFF) { /* fill bytes may precede a marker */
            at++;
            continue;
        }
        if (marker >= 0xC0 && marker <= 0xC2) {
            if (size < 8 || at + 2 + size > length)
                return VIP_ODD;
            const uint8_t *frame = jpeg + at + 4;
            const int32_t h = frame[1] << 8 | frame[2], w = frame[3] << 8 | frame[4];
            if (frame[0] != 8 || h == 0 || w == 0 || (int64_t)h * w > MAX_PIXELS || (frame[5] != 1 && frame[5] != 3))
                return VIP_ODD;
            *height = h;
            *width = w;
            return VIP_OK;
        }
        /* tables, comments and application data are passed over; others are out of place or of another kind of JPEG */
        if (size < 2 || (marker != 0xC4 && marker != 0xDB && marker != 0xDD && marker < 0xE0))
            return VIP_ODD;
        at += 2 + size;
    }
    return VIP_ODD;
}

static void leave(j_common_ptr jpeg) {
    longjmp(((vip_reader *)jpeg)->failed, 1);
}

static void leave_on_warning(j_common_ptr jpeg, int level) {
    if (level < 0)
        leave(jpeg);
}

static void say_nothing(j_common_ptr jpeg) {
    (void)jpeg;
}

static void next_rows(void *source, uint8_t *rows, size_t stride, int32_t num) {
    vip_reader *reader = source;
    while (num > 0) {
        JSAMPROW places[VIP_ROWS];
        for (int32_t i = 0; i < num; i++)
            places[i] = rows + (size_t)i * stride;
        const int32_t got = (int32_t)jpeg_read_scanlines(&reader->jpeg, places, (JDIMENSION)num);
        if (got == 0)
            longjmp(reader->failed, 1);
        rows += (size_t)got * stride;
        num -= got;
    }
}

/* Whether each coefficient of a progressive file has come with all its bits; the library smooths over blocks otherwise. */
static int is_complete(const struct jpeg_decompress_struct *jpeg) {
    if (jpeg->progressive_mode)
        for (int c = 0; c < jpeg->num_components; c++)
            for (int k = 0; k < DCTSIZE2; k++)
                if (jpeg->coef_bits[c][k] != 0)
                    return 0;
    return 1;
}

/* Up to the first row of the region; *skip pixels of each row precede it. Returns the bytes between rows, or 0. */
static size_t start(vip_reader *reader, const vip_sample *sample, vip_scratch *scratch, int32_t *skip) {
    struct jpeg_decompress_struct *jpeg = &reader->jpeg;
    jpeg_read_header(jpeg, TRUE);
    const J_COLOR_SPACE colours = jpeg->jpeg_color_space;
    if (jpeg->data_precision != 8 || jpeg->arith_code ||
        (colours != JCS_GRAYSCALE && colours != JCS_YCbCr && colours != JCS_RGB))
        return 0;
    const int64_t pixels = (int64_t)jpeg->image_height * jpeg->image_width;
    if (pixels > MAX_PIXELS || (jpeg_has_multiple_scans(jpeg) && pixels > MAX_BUFFERED_PIXELS))
        return 0;
    const JDIMENSION top = (JDIMENSION)(sample->top + scratch->down.begin);
    const JDIMENSION begin = (JDIMENSION)(sample->left + scratch->across.begin);
    const JDIMENSION end = (JDIMENSION)(sample->left + scratch->across.end) + MARGIN;
    if ((JDIMENSION)(sample->top + sample->height) > jpeg->image_height ||
        (JDIMENSION)(sample->left + sample->width) > jpeg->image_width)
        return 0;
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    if (!is_complete(jpeg))
        return 0;
    JDIMENSION offset = begin > MARGIN ? begin - MARGIN : 0;
    JDIMENSION width = (end < jpeg->image_width ? end : jpeg->image_width) - offset;
    jpeg_crop_scanline(jpeg, &offset, &width); /* rounds the offset down to whole blocks */
    if (top > 0)
        jpeg_skip_scanlines(jpeg, top);
    *skip = (int32_t)(begin - offset);
    return vip_reserve_rows(scratch, (int32_t)width);
}

static int read_and_resize(vip_reader *reader, const uint8_t *jpeg, int64_t length, const vip_sample *sample,
                           vip_scratch *scratch, uint8_t *out) {
    if (setjmp(reader->failed))
        return VIP_ODD;
    int32_t skip;
    jpeg_create_decompress(&reader->jpeg);
    jpeg_mem_src(&reader->jpeg, jpeg, (unsigned long)length);
    const size_t stride = start(reader, sample, scratch, &skip);
    if (stride == 0)
        return VIP_ODD;
    vip_resize(scratch, stride, skip, next_rows, reader, out);
    return VIP_OK;
}

int vip_jpeg_resize(const uint8_t *jpeg, int64_t length, const vip_sample *sample, vip_scratch *scratch, uint8_t *out) {
    if (!is_whole(jpeg, length))
        return VIP_ODD;
    vip_reader reader; /* made anew for every image: the library keeps tables from one to the next otherwise */
    memset(&reader, 0, sizeof reader);
    reader.jpeg.err = jpeg_std_error(&reader.errors);
    reader.errors.error_exit = leave;
    reader.errors.emit_message = leave_on_warning;
    reader.errors.output_message = say_nothing;
    const int status = read_and_resize(&reader, jpeg, length, sample, scratch, out);
    jpeg_destroy_decompress(&reader.jpeg);
    return status;
}
