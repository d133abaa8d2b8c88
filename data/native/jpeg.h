/* Regions of JPEGs, for the library only. */
#ifndef VIP_JPEG_H
#define VIP_JPEG_H

#include <stdio.h> /* jpeglib.h wants it first */

#include <jpeglib.h>
#include <setjmp.h>
#include <stdint.h>

#include "native.h"
#include "resize.h"

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf failed;
} vip_reader;

/* The size from the markers before the first scan. VIP_ODD for all that Pillow should see: not a JPEG of 8 bits and 1 or
 * 3 components, not Huffman coded, too large, or without the marker at the very end that says that it is whole. */
int vip_jpeg_size(const uint8_t *jpeg, int64_t length, int32_t *height, int32_t *width);

/* Decodes what scratch->across and scratch->down need of the sample's box, and resizes it. VIP_OK or VIP_ODD. */
int vip_jpeg_resize(const uint8_t *jpeg, int64_t length, const vip_sample *sample, vip_scratch *scratch, uint8_t *out);

#endif
