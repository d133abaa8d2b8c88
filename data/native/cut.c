/* Crops of re-framed JPEGs (frame.h), without decoding: what is left of the file when only the segments that cover a
 * region are kept, the frame's size is changed to theirs and their restart markers are numbered anew. Any decoder makes
 * of that, within the region, the very pixels that it makes of the whole. Tables and indices are not trusted. */
#define _POSIX_C_SOURCE 200809L /* pread */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "frame.h"
#include "native.h"

enum { SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, RST0 = 0xD0, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD };
enum { APP0 = 0xE0, APP14 = 0xEE };

#define MIN_WIDTH 8      /* pixels; of narrower images libjpeg upsamples the colours in another way */
#define NUM_RESTARTS 8   /* markers count modulo 8 */
#define MAX_RECORD (1LL << 30)
#define MAX_PIXELS 178956970 /* Pillow's limit */

/* Segments that are kept, as [from, to) of rows and columns, and where they lie in the file. */
typedef struct {
    int32_t top, bottom, left, right;
    int32_t columns;       /* of the whole image */
    int64_t start, length; /* of the bytes that hold all of them */
    int64_t first;         /* bytes before the row `top` */
} selection;

typedef struct {
    uint8_t *bytes[NUM_SLOTS];
    int64_t sizes[NUM_SLOTS];
} memory;

static pthread_key_t memory_key;
static pthread_once_t memory_once = PTHREAD_ONCE_INIT;

static void free_memory(void *of_thread) {
    memory *own = of_thread;
    for (int slot = 0; slot < NUM_SLOTS; slot++)
        free(own->bytes[slot]);
    free(own);
}

static void make_key(void) {
    pthread_key_create(&memory_key, free_memory);
}

static memory *own_memory(void) {
    pthread_once(&memory_once, make_key);
    memory *own = pthread_getspecific(memory_key);
    if (!own && (own = calloc(1, sizeof *own)))
        pthread_setspecific(memory_key, own);
    return own;
}

uint8_t *vip_memory_grow(int slot, int64_t size) {
    memory *own = own_memory();
    if (!own || size > MAX_RECORD)
        return NULL;
    if (own->sizes[slot] < size) {
        uint8_t *bytes = realloc(own->bytes[slot], size + size / 4);
        if (!bytes)
            return NULL;
        own->bytes[slot] = bytes;
        own->sizes[slot] = size + size / 4;
    }
    return own->bytes[slot];
}

uint8_t *vip_memory(int slot, int64_t size) {
    memory *own = own_memory();
    if (own && own->sizes[slot] < size) { /* nothing to keep */
        free(own->bytes[slot]);
        own->bytes[slot] = NULL;
        own->sizes[slot] = 0;
    }
    return vip_memory_grow(slot, size);
}

static int32_t read_16(const uint8_t *at) {
    return at[0] << 8 | at[1];
}

static int32_t ceil_divide(int32_t value, int32_t by) {
    return (value + by - 1) / by;
}

/* The frame header: sizes, and how many pixels an MCU covers. */
static int parse_size(const uint8_t *at, int32_t length, vip_frame *frame) {
    int32_t components = length >= 8 ? at[7] : 0, max_h = 1, max_v = 1;
    if ((components != 1 && components != 3) || length < 8 + 3 * components || at[2] != 8)
        return VIP_ODD;
    for (int32_t i = 0; i < components && components > 1; i++) {
        int32_t h = at[8 + 3 * i + 1] >> 4, v = at[8 + 3 * i + 1] & 15;
        if (h < 1 || h > 4 || v < 1 || v > 4)
            return VIP_ODD;
        max_h = h > max_h ? h : max_h;
        max_v = v > max_v ? v : max_v;
    }
    frame->height = read_16(at + 3);
    frame->width = read_16(at + 5);
    frame->mcu_height = 8 * max_v;
    frame->mcu_width = 8 * max_h;
    frame->margin_y = max_v > 1 ? 2 : 0; /* one sample of a colour that is stored at half the resolution */
    frame->margin_x = max_h > 1 ? 2 : 0;
    frame->mcu_rows = ceil_divide(frame->height, frame->mcu_height);
    frame->mcus_per_row = ceil_divide(frame->width, frame->mcu_width);
    return frame->height && frame->width && (int64_t)frame->height * frame->width <= MAX_PIXELS ? VIP_OK : VIP_ODD;
}

int vip_parse_frame(const uint8_t *jpeg, int64_t length, vip_frame *frame) {
    int32_t components = 0;
    memset(frame, 0, sizeof *frame);
    if (length < 4 || jpeg[0] != 0xFF || jpeg[1] != 0xD8)
        return VIP_ODD;
    for (int64_t at = 2; length - at >= 4;) {
        int32_t marker = jpeg[at + 1], size = read_16(jpeg + at + 2);
        const uint8_t *body = jpeg + at + 2; /* begins with its own length */
        if (jpeg[at] != 0xFF || size < 2 || size > length - at - 2)
            return VIP_ODD;
        if (marker == SOF0 || marker == SOF1) {
            if (components || parse_size(body, size, frame) != VIP_OK)
                return VIP_ODD;
            components = body[7];
        } else if (marker == DRI && size == 4) {
            frame->interval = read_16(body + 2);
        } else if (marker == TABLE_MARKER && size >= 2 + TABLE_ID_LENGTH &&
                   !memcmp(body + 2, TABLE_ID, TABLE_ID_LENGTH)) {
            frame->table_at = (int32_t)at + 4 + TABLE_ID_LENGTH;
            frame->num_segments = (size - 2 - TABLE_ID_LENGTH) / 2;
        } else if (marker == SOS) {
            frame->head = (int32_t)at + 2 + size;
            return components && size == 6 + 2 * components && body[2] == components ? VIP_OK : VIP_ODD;
        } else if (marker != DHT && marker != DQT && marker < APP0) {
            return VIP_ODD; /* progressive, arithmetic, hierarchical or out of order */
        }
        at += 2 + size;
    }
    return VIP_ODD;
}

/* Which segments a region (pixels) needs; VIP_ODD where the file has no table or one that cannot be its own. */
static int choose(const uint8_t *head, const vip_frame *frame, int64_t length, const int32_t box[4], selection *kept) {
    int64_t top = box[0], left = box[1], bottom = top + box[2], right = left + box[3];
    if (top < 0 || left < 0 || box[2] < 1 || box[3] < 1 || top >= frame->height || left >= frame->width)
        return VIP_ODD;
    if (!frame->table_at || !frame->interval || frame->mcus_per_row % frame->interval)
        return VIP_ODD;
    int32_t columns = frame->mcus_per_row / frame->interval, segment_width = frame->interval * frame->mcu_width;
    if (frame->num_segments != (int64_t)columns * frame->mcu_rows)
        return VIP_ODD;
    top = top > frame->margin_y ? top - frame->margin_y : 0;
    left = left > frame->margin_x ? left - frame->margin_x : 0;
    bottom = bottom + frame->margin_y < frame->height ? bottom + frame->margin_y : frame->height;
    right = right + frame->margin_x < frame->width ? right + frame->margin_x : frame->width;
    kept->columns = columns;
    kept->top = (int32_t)top / frame->mcu_height;
    kept->bottom = ceil_divide((int32_t)bottom, frame->mcu_height);
    kept->left = (int32_t)left / segment_width;
    kept->right = ceil_divide((int32_t)right, segment_width);
    if (kept->left && frame->width - kept->left * segment_width < MIN_WIDTH)
        kept->left--;
    int64_t at = frame->head, start = 0, end = 0;
    int32_t first = kept->top * columns + kept->left, last = (kept->bottom - 1) * columns + kept->right - 1;
    const uint8_t *table = head + frame->table_at;
    for (int32_t i = 0; i < frame->num_segments; i++) {
        if (i == kept->top * columns)
            kept->first = at;
        if (i == first)
            start = at;
        at += read_16(table + 2 * i);
        if (i == last)
            end = at;
    }
    kept->start = start;
    kept->length = end - start;
    return at + 2 == length ? VIP_OK : VIP_ODD;
}

/* The markers in front, without metadata and with another size; returns where they end in `to`. */
static uint8_t *write_head(uint8_t *to, const uint8_t *head, const vip_frame *frame, int32_t height, int32_t width) {
    *to++ = 0xFF;
    *to++ = 0xD8;
    for (int32_t at = 2; at < frame->head;) {
        int32_t marker = head[at + 1], size = 2 + read_16(head + at + 2);
        if (marker <= APP0 || marker == APP14) {
            memcpy(to, head + at, size);
            if (marker == SOF0 || marker == SOF1) {
                to[5] = (uint8_t)(height >> 8);
                to[6] = (uint8_t)height;
                to[7] = (uint8_t)(width >> 8);
                to[8] = (uint8_t)width;
            }
            to += size;
        }
        at += size;
    }
    return to;
}

/* Copies the segments that are kept from `range`, the bytes kept->start and following; NULL where markers are not where
 * the table has them. */
static uint8_t *write_segments(uint8_t *to, const uint8_t *range, const uint8_t *table, const vip_frame *frame,
                               const selection *kept) {
    int64_t at = kept->first - kept->start; /* of a row's first segment, below 0 for the first row */
    int32_t written = 0;
    for (int32_t row = kept->top; row < kept->bottom; row++)
        for (int32_t column = 0; column < kept->columns; column++) {
            int32_t index = row * kept->columns + column, size = read_16(table + 2 * index);
            if (column >= kept->left && column < kept->right) {
                int is_last = index == frame->num_segments - 1; /* the file's last has no marker behind it */
                memcpy(to, range + at, size);
                to += size;
                if (!is_last && (size < 2 || to[-2] != 0xFF || to[-1] != RST0 + index % NUM_RESTARTS))
                    return NULL;
                if (is_last)
                    to += 2;
                to[-2] = 0xFF;
                to[-1] = (uint8_t)(RST0 + written++ % NUM_RESTARTS);
            }
            at += size;
        }
    to[-1] = EOI;
    return to;
}

/* Puts the smaller file together and moves the region's corner to where it lies in it. */
static int assemble(const uint8_t *head, const uint8_t *range, const vip_frame *frame, const selection *kept,
                    int32_t *top, int32_t *left, const uint8_t **out, int64_t *out_length) {
    int32_t segment_width = frame->interval * frame->mcu_width;
    int32_t y = kept->top * frame->mcu_height, x = kept->left * segment_width;
    int32_t bottom = kept->bottom * frame->mcu_height, right = kept->right * segment_width;
    int32_t height = (bottom < frame->height ? bottom : frame->height) - y;
    int32_t width = (right < frame->width ? right : frame->width) - x;
    uint8_t *cut = vip_memory(SLOT_CUT, frame->head + kept->length + 2);
    if (!cut)
        return VIP_ODD;
    uint8_t *end = write_head(cut, head, frame, height, width);
    end = write_segments(end, range, head + frame->table_at, frame, kept);
    if (!end)
        return VIP_ODD;
    *top -= y;
    *left -= x;
    *out = cut;
    *out_length = end - cut;
    return VIP_OK;
}

int vip_cut(const uint8_t *record, int64_t length, int32_t *top, int32_t *left, int32_t height, int32_t width,
            const uint8_t **out, int64_t *out_length) {
    vip_frame frame;
    selection kept;
    const int32_t box[4] = {*top, *left, height, width};
    if (vip_parse_frame(record, length, &frame) != VIP_OK || choose(record, &frame, length, box, &kept) != VIP_OK)
        return VIP_ODD;
    return assemble(record, record + kept.start, &frame, &kept, top, left, out, out_length);
}

static int read_at(int32_t file, uint8_t *to, int64_t length, int64_t offset) {
    while (length > 0) {
        ssize_t got = pread(file, to, (size_t)length, offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return VIP_UNREADABLE;
        to += got;
        offset += got;
        length -= got;
    }
    return VIP_OK;
}

/* A record that is a binary PPM file: the rows of the box. */
static int load_raw(const uint8_t *head, int32_t head_length, int32_t file, int64_t offset, int64_t length,
                    const vip_sample *sample, int32_t out_height, int32_t out_width, uint8_t *out) {
    char text[32] = "";
    int32_t width, height, used = 0;
    memcpy(text, head, (size_t)head_length < sizeof text ? (size_t)head_length : sizeof text - 1);
    if (sscanf(text, "P6 %9d %9d 255%n", &width, &height, &used) != 2 || used + 1 != head_length)
        return VIP_ODD;
    if (width < 1 || height < 1 || head_length + 3LL * width * height != length)
        return VIP_ODD;
    if (sample->top < 0 || sample->top >= height || sample->height < 1)
        return VIP_ODD;
    int32_t num_rows = sample->height < height - sample->top ? sample->height : height - sample->top;
    int64_t size = 3LL * width * num_rows;
    uint8_t *rows = vip_memory(SLOT_RANGE, size);
    if (!rows || read_at(file, rows, size, offset + head_length + 3LL * width * sample->top) != VIP_OK)
        return VIP_UNREADABLE;
    vip_sample moved = *sample;
    moved.top = 0;
    return vip_render(rows, num_rows, width, &moved, out_height, out_width, out);
}

/* A re-framed record: only what the box needs is read. */
static int load_cut(const uint8_t *head, int32_t head_length, int32_t file, int64_t offset, int64_t length,
                    const vip_sample *sample, int32_t out_height, int32_t out_width, uint8_t *out) {
    const int32_t box[4] = {sample->top, sample->left, sample->height, sample->width};
    vip_frame frame;
    selection kept;
    if (vip_parse_frame(head, head_length, &frame) != VIP_OK || choose(head, &frame, length, box, &kept) != VIP_OK)
        return VIP_ODD;
    uint8_t *range = vip_memory(SLOT_RANGE, kept.length);
    if (!range || read_at(file, range, kept.length, offset + kept.start) != VIP_OK)
        return VIP_UNREADABLE;
    const uint8_t *cut;
    int64_t cut_length;
    vip_sample moved = *sample;
    if (assemble(head, range, &frame, &kept, &moved.top, &moved.left, &cut, &cut_length) != VIP_OK)
        return VIP_ODD;
    return vip_load_one(cut, cut_length, &moved, out_height, out_width, out);
}

static int load_record(int32_t file, int64_t offset, int64_t length, int32_t head_length, const vip_sample *sample,
                       int32_t out_height, int32_t out_width, uint8_t *out) {
    if (length < 1 || length > MAX_RECORD || head_length < 0 || head_length > length)
        return VIP_ODD;
    if (head_length > 2) {
        uint8_t *head = vip_memory(SLOT_HEAD, head_length);
        if (!head || read_at(file, head, head_length, offset) != VIP_OK)
            return VIP_UNREADABLE;
        return (head[0] == 'P' ? load_raw : load_cut)(head, head_length, file, offset, length, sample, out_height,
                                                      out_width, out);
    }
    uint8_t *whole = vip_memory(SLOT_RANGE, length);
    if (!whole || read_at(file, whole, length, offset) != VIP_OK)
        return VIP_UNREADABLE;
    return vip_load_one(whole, length, sample, out_height, out_width, out);
}

void vip_load_pack(int32_t num, const int32_t *files, const int64_t *offsets, const int64_t *lengths,
                   const int32_t *heads, const vip_sample *samples, int32_t out_height, int32_t out_width,
                   uint8_t *out, int32_t *status) {
    for (int32_t i = 0; i < num; i++)
        status[i] = load_record(files[i], offsets[i], lengths[i], heads[i], samples + i, out_height, out_width,
                                out + (int64_t)i * out_height * out_width * 3);
}
