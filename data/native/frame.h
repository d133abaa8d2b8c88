/* What frame.c and cut.c share: the layout of a re-framed JPEG, and memory that a thread keeps between calls.
 *
 * A re-framed JPEG is a baseline one whose restart markers cut every row of MCUs into equal segments, about 64 pixels
 * wide, which decode independently of one another. How long they are stands in an APP11 marker in front: TABLE_ID, then
 * two bytes (big-endian) for each segment, its restart marker included, row by row. All else is any JPEG's.
 */
#ifndef VIP_FRAME_H
#define VIP_FRAME_H

#include <stdint.h>

#define TABLE_ID "VIPSEG1" /* with its final 0 */
#define TABLE_ID_LENGTH 8
#define TABLE_MARKER 0xEB
#define MAX_SEGMENTS 32750 /* what one marker holds */

typedef struct {
    int32_t height, width;         /* of the image, pixels */
    int32_t mcu_height, mcu_width; /* pixels */
    int32_t margin_y, margin_x;    /* pixels around a region that its own depend on, for colours are smoothed */
    int32_t mcu_rows, mcus_per_row;
    int32_t interval;     /* MCUs in a segment; 0 where there are no restart markers */
    int32_t head;         /* bytes up to the first segment */
    int32_t table_at;     /* where the lengths stand; 0 where there are none */
    int32_t num_segments; /* lengths in the table */
} vip_frame;

/* Reads the markers in front of the first scan. VIP_ODD for what is no baseline JPEG of one scan with one or three
 * components. */
int vip_parse_frame(const uint8_t *jpeg, int64_t length, vip_frame *frame);

/* `size` bytes or more that stay valid until the thread asks for this slot again; NULL where there is no memory. */
enum { SLOT_FRAMED, SLOT_HEAD, SLOT_RANGE, SLOT_CUT, NUM_SLOTS };
uint8_t *vip_memory(int slot, int64_t size);
/* The same, keeping what the slot holds. */
uint8_t *vip_memory_grow(int slot, int64_t size);

#endif
