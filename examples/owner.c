/* An owner in C, against docs/PROTOCOL.md and nothing else: registers a file on a memfs, maps what it lies on, and says
 * which of its pages come and go, until memfs ends or it is interrupted.
 *
 *     cc -O2 -Wall -o owner examples/owner.c && ./owner /mnt/guest/private
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

#if __BYTE_ORDER != __LITTLE_ENDIAN
#error "messages are little-endian, and so is this program"
#endif

enum { HELLO = 1, HELLO_REPLY, REGISTER, REGISTERED, FAILED = 10, INVALIDATE_BEGIN, INVALIDATE_END, FALLOCATE, ACK, FENCED,
       CONVERT_BEGIN = 20, CONVERT_END };
enum { FORMAT = 1, MAX_MESSAGE = 65536, MAX_DESCRIPTORS = 2, MAP_HEADER = 4096 };

struct __attribute__((packed)) range { uint64_t start, end; }; /* pages, half-open */
struct __attribute__((packed)) message {
    uint16_t format, type;
    uint32_t length; /* of all of it */
    uint64_t request;
    union {
        struct __attribute__((packed)) { uint16_t min_version, max_version; uint8_t token[16]; char name[4]; } hello;
        struct __attribute__((packed)) { uint64_t file, ino, size, seals, granule; } registered;
        struct __attribute__((packed)) { uint32_t number; char text[512]; } error; /* Ack, Failed and Fenced */
        struct __attribute__((packed)) { uint64_t file; struct range pages; uint64_t cause; } notification;
        struct __attribute__((packed)) { uint64_t shared, private; uint8_t to_private; uint64_t cause; struct range pages[]; } convert;
        char bytes[MAX_MESSAGE - 16 + 1]; /* and a NUL behind a text */
    };
};
#define SIZE_OF_HEADER offsetof(struct message, bytes)

static struct message in;

static void die(const char *what, const char *why) {
    fprintf(stderr, "owner: %s: %s\n", what, why);
    exit(1);
}

/* Send the header and `length` bytes of the body, and a descriptor beside it unless that is -1. */
static void send_message(int sock, struct message *message, uint16_t type, uint64_t request, size_t length, int fd) {
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control = {0};
    message->format = FORMAT, message->type = type, message->request = request;
    message->length = SIZE_OF_HEADER + length;
    struct iovec data = {message, message->length};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    if (fd >= 0) {
        header.msg_control = control.space, header.msg_controllen = sizeof control.space;
        control.header = (struct cmsghdr){CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    }
    if (sendmsg(sock, &header, MSG_NOSIGNAL) < 0)
        die("memfs", strerror(errno));
}

/* Receive a message into `in`, and what descriptors are beside it into `fds`, which are -1 otherwise. */
static void receive(int sock, int fds[MAX_DESCRIPTORS]) {
    union { struct cmsghdr header; char space[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))]; } control;
    struct iovec data = {&in, MAX_MESSAGE};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    if (length <= 0)
        die("memfs", length ? strerror(errno) : "it has ended");
    if ((size_t)length < SIZE_OF_HEADER || in.format != FORMAT || in.length != length)
        die("memfs", "it does not speak this protocol");
    for (int i = 0; i < MAX_DESCRIPTORS; i++)
        fds[i] = -1;
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_level == SOL_SOCKET && first->cmsg_type == SCM_RIGHTS)
        memcpy(fds, CMSG_DATA(first), first->cmsg_len - CMSG_LEN(0));
    if (in.type == FAILED || in.type == FENCED)
        die(in.type == FAILED ? "memfs refuses" : "cut off", (in.bytes[length - SIZE_OF_HEADER] = 0, in.error.text));
}

static void expect(uint16_t type) {
    if (in.type != type)
        die("memfs", "it answers something else");
}

static int connect_to_memfs_of(int file) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (fgetxattr(file, "user.memfs.socket", address.sun_path, sizeof address.sun_path - 1) < 0)
        die("the file does not lie on a memfs", strerror(errno));
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address))
        die(address.sun_path, strerror(errno));
    return sock;
}

static void print(const char *what, const struct range *pages, size_t count) {
    printf("%s", what);
    for (; count; count--, pages++)
        printf(" %llu-%llu", (unsigned long long)pages->start, (unsigned long long)pages->end - 1);
    puts("");
    fflush(stdout);
}

int main(int argc, char **argv) {
    int fds[MAX_DESCRIPTORS], file = argc == 2 ? open(argv[1], O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) /* it stays open: nothing else keeps the mount from being unmounted */
        die(argc == 2 ? argv[1] : "usage", argc == 2 ? strerror(errno) : "owner FILE");
    int sock = connect_to_memfs_of(file);
    static struct message out;
    out.hello.min_version = out.hello.max_version = 2; /* no token: it is new, and does not come back */
    memcpy(out.hello.name, "in C", 4);
    send_message(sock, &out, HELLO, 1, sizeof out.hello, -1);
    receive(sock, fds);
    expect(HELLO_REPLY);
    send_message(sock, &out, REGISTER, 2, 0, file);
    receive(sock, fds);
    expect(REGISTERED);
    uint64_t size = in.registered.size;
    printf("owner of inode %llu, %llu bytes\n", (unsigned long long)in.registered.ino, (unsigned long long)size);
    fflush(stdout);
    char *memory = size ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fds[0], 0) : NULL;
    if (memory == MAP_FAILED)
        die(argv[1], strerror(errno));
    for (;;) {
        receive(sock, fds);
        const struct range *pages = &in.notification.pages;
        size_t count = 1;
        if (in.type == CONVERT_BEGIN || in.type == CONVERT_END)
            pages = in.convert.pages, count = (in.length - SIZE_OF_HEADER - 25) / sizeof *pages;
        static const char *const names[] = {[INVALIDATE_BEGIN] = "invalidate", [INVALIDATE_END] = "freed",
            [FALLOCATE] = "allocated", [CONVERT_BEGIN] = "convert", [CONVERT_END] = "converted"};
        if (in.type > CONVERT_END || !names[in.type])
            die("memfs", "it sends something else");
        print(names[in.type], pages, count); /* and unmap them from the guest, before the next line */
        out.error.number = 0;
        if (in.type != INVALIDATE_END && in.type != CONVERT_END)
            send_message(sock, &out, ACK, in.request, 4, -1);
    }
}
