/* Whole files into one buffer, without Python's lock. */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "native.h"

enum { MAX_LENGTH = 1 << 30 }; /* bytes, as in data/decode.py */

static int read_all(int file, uint8_t *place, int64_t length) {
    while (length > 0) {
        const ssize_t got = read(file, place, (size_t)length);
        if (got > 0) {
            place += got;
            length -= got;
        } else if (got == 0 || errno != EINTR) {
            return VIP_UNREADABLE; /* an error, or the file has become shorter */
        }
    }
    return VIP_OK;
}

/* Opens without waiting for whoever writes to a FIFO; takes no notice of what is no regular file with content. */
static int read_file(const char *path, uint8_t *arena, int64_t capacity, int64_t offset, int64_t *length) {
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0)
        return VIP_UNREADABLE;
    struct stat facts;
    int status = VIP_UNREADABLE;
    if (fstat(file, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_size > 0 && facts.st_size <= MAX_LENGTH) {
        *length = facts.st_size;
        status = offset + *length <= capacity ? read_all(file, arena + offset, *length) : VIP_OK;
    }
    close(file);
    return status;
}

int64_t vip_read_files(int32_t num, const char *const *paths, uint8_t *arena, int64_t capacity, int64_t *offsets,
                       int64_t *lengths, int32_t *status) {
    int64_t needed = 0;
    for (int32_t i = 0; i < num; i++) {
        offsets[i] = needed;
        lengths[i] = 0;
        status[i] = read_file(paths[i], arena, capacity, needed, &lengths[i]);
        needed += lengths[i];
    }
    return needed;
}
