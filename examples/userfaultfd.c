/* A userfaultfd(2) handler over a mapping of a memfs file: says what content a page has when it is first touched, as who
 * brings a guest's memory from elsewhere does (lazy restore, post-copy). Here it is the page's number.
 *
 *     cc -O2 -Wall -pthread -o userfaultfd examples/userfaultfd.c && ./userfaultfd /mnt/guest/ram
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096 };

static int uffd;
static char *memory;

static void *serve(void *unused) {
    static char content[PAGE] __attribute__((aligned(PAGE)));
    struct uffd_msg message;
    while (read(uffd, &message, sizeof message) == sizeof message) {
        uint64_t address = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
        snprintf(content, sizeof content, "page %zu", (size_t)(address - (uintptr_t)memory) / PAGE);
        struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)content, .len = PAGE};
        if (ioctl(uffd, UFFDIO_COPY, &copy)) /* allocates the page in the file; wakes who waits */
            err(1, "UFFDIO_COPY"); /* ENOSPC: the mount is full */
    }
    return unused;
}

int main(int argc, char **argv) {
    struct stat status;
    int file = argc == 2 ? open(argv[1], O_RDWR | O_CLOEXEC) : -1;
    if (argc != 2)
        errx(1, "usage: userfaultfd FILE");
    if (file < 0 || fstat(file, &status))
        err(1, "%s", argv[1]);
    memory = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED)
        err(1, "%s", argv[1]);
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        err(1, "userfaultfd (`memfs doctor` says who may)");
    struct uffdio_register range = {{(uintptr_t)memory, status.st_size}, UFFDIO_REGISTER_MODE_MISSING, 0};
    if (ioctl(uffd, UFFDIO_REGISTER, &range)) /* EINVAL without passthrough: it is a mapping of FUSE's then */
        err(1, "%s: UFFDIO_REGISTER", argv[1]);
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, NULL))
        errx(1, "no thread");
    for (off_t at = 0; at < status.st_size; at += status.st_size / 4)
        printf("%s\n", memory + at);
    return 0;
}
