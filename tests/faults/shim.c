/* Faults in real reads: preloaded into a process, it spoils reads of files whose path holds WL_FAULT_NAME.
 *
 * WL_FAULT: short   every read gives at most 1,000 bytes
 *           eintr   every second read fails with EINTR
 *           eio     reads that touch byte WL_FAULT_AT fail with EIO
 *           eof     reads end at byte WL_FAULT_AT
 *           slow    every read takes 2 ms
 *           map     mmap of the file fails with ENOMEM
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static int calls;

static int concerned(int fd) {
    char link[64], path[4096];
    const char *name = getenv("WL_FAULT_NAME");
    if (!name) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return strstr(path, name) != NULL;
}

/* How many of `want` bytes from `offset` may be read; -1 with errno for none. */
static ssize_t allowed(size_t want, off_t offset) {
    const char *fault = getenv("WL_FAULT");
    off_t at = atoll(getenv("WL_FAULT_AT") ? getenv("WL_FAULT_AT") : "0");
    if (!strcmp(fault, "short")) return want < 1000 ? want : 1000;
    if (!strcmp(fault, "eintr")) {
        if (__sync_fetch_and_add(&calls, 1) % 2) return want;
        errno = EINTR;
        return -1;
    }
    if (!strcmp(fault, "eio")) {
        if (offset <= at && at < offset + (off_t)want) { errno = EIO; return -1; }
        return want;
    }
    if (!strcmp(fault, "eof")) return offset >= at ? 0 : (offset + (off_t)want > at ? at - offset : (off_t)want);
    if (!strcmp(fault, "slow")) usleep(2000);
    return want;
}

static ssize_t spoiled(int fd, const struct iovec *iov, off_t offset, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "preadv2");
    ssize_t n = allowed(iov[0].iov_len, offset);
    if (n <= 0) return n;
    struct iovec part = {iov[0].iov_base, n};
    return real(fd, &part, 1, offset, flags);
}

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "preadv2");
    return count == 1 && concerned(fd) ? spoiled(fd, iov, offset, flags) : real(fd, iov, count, offset, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    return preadv2(fd, iov, count, offset, flags);
}
ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset) { return preadv2(fd, iov, count, offset, 0); }
ssize_t preadv64(int fd, const struct iovec *iov, int count, off_t offset) { return preadv2(fd, iov, count, offset, 0); }

ssize_t read(int fd, void *buffer, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    if (getenv("WL_FAULT") && concerned(fd)) {
        ssize_t n = allowed(count, lseek(fd, 0, SEEK_CUR));
        if (n < 0) return n;
        count = n;
    }
    return real(fd, buffer, count);
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "mmap");
    const char *fault = fd >= 0 ? getenv("WL_FAULT") : NULL;
    if (fault && !strcmp(fault, "map") && concerned(fd)) { errno = ENOMEM; return MAP_FAILED; }
    return real(address, length, protection, flags, fd, offset);
}
void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return mmap(address, length, protection, flags, fd, offset);
}
