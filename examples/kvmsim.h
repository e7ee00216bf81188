/* KVM's ioctls on a `kvmsim serve`, for VMMs in C: what is said over the socket (kvmsim/service/wire.py).
 *
 * A descriptor of the service's is a socket. An ioctl is one datagram and its answer another; what a structure names by
 * descriptors goes along. Numbers and structures are those of <linux/kvm.h>, and what follows for the RFC's.
 */

#ifndef KVMSIM_H
#define KVMSIM_H

#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define KVM_MEM_FD (1UL << 2)
#define KVM_EXIT_MEMORY_ERROR 36
#define KVM_EXIT_MEM_MAP_SHARED 1
#define KVM_EXIT_MEM_MAP_PRIVATE 2

struct kvm_userspace_memory_region_ext {
	struct kvm_userspace_memory_region region; /* userspace_addr: the offset into both files */
	int32_t fd, private_fd;
	uint32_t padding[6];
};

struct kvm_memory_error { /* in struct kvm_run, where its unions are */
	uint32_t type, padding;
	uint64_t gpa, size;
};

/* Not KVM's: a vCPU that makes accesses, and runs no code. */
#define KVMSIM_SET_ACCESSES 0x4018af00
#define KVMSIM_GET_VALUES 0x8008af01
#define KVMSIM_SHARED_BIT 0xaf02
enum { KVMSIM_LOAD, KVMSIM_STORE, KVMSIM_HYPERCALL };

struct kvmsim_access {
	uint64_t gpa;
	uint32_t kind, size;
	uint64_t value;
};

#define KVMSIM_MAX_PAYLOAD (1 << 16)

/* Open what /dev/kvm is elsewhere. Returns -1 with errno. */
static inline int kvmsim_open(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		int why = errno;

		close(fd);
		errno = why;
		return -1;
	}
	return fd;
}

/* Make an ioctl. `in`: its structure, `out`: what it gives back; `sent` and `got`: descriptors, at most 2 each; those
 * that do not come are -1. Returns the ioctl's value, or -1 with errno. A signal interrupts KVM_RUN, with EINTR.
 */
static inline int64_t kvmsim_ioctl(int fd, uint32_t number, uint64_t argument, const void *in, size_t in_size, void *out,
				   size_t out_size, const int *sent, int nr_sent, int *got)
{
	struct {
		uint32_t number, zero;
		uint64_t argument;
	} call = {number, 0, argument}, interrupt = {0, 0, 0};
	struct {
		int32_t error;
		uint32_t zero;
		int64_t value;
	} answer;
	union {
		char space[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} rights;
	struct iovec from[] = {{&call, sizeof(call)}, {(void *)in, in_size}}, to[] = {{&answer, sizeof(answer)}, {out, out_size}};
	struct msghdr message = {.msg_iov = from, .msg_iovlen = 2};
	struct cmsghdr *control;
	ssize_t size;

	memset(&rights, 0, sizeof(rights));
	if (nr_sent) {
		message.msg_control = &rights;
		message.msg_controllen = CMSG_SPACE(nr_sent * sizeof(int));
		control = CMSG_FIRSTHDR(&message);
		control->cmsg_level = SOL_SOCKET;
		control->cmsg_type = SCM_RIGHTS;
		control->cmsg_len = CMSG_LEN(nr_sent * sizeof(int));
		memcpy(CMSG_DATA(control), sent, nr_sent * sizeof(int));
	}
	if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0)
		return -1;
	if (got)
		got[0] = got[1] = -1;
	for (;;) {
		message = (struct msghdr){.msg_iov = to, .msg_iovlen = 2, .msg_control = &rights, .msg_controllen = sizeof(rights)};
		size = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
		if (size >= 0 || errno != EINTR)
			break;
		if (number == KVM_RUN)
			send(fd, &interrupt, sizeof(interrupt), MSG_NOSIGNAL); /* and its answer is EINTR */
	}
	if (size < (ssize_t)sizeof(answer)) {
		if (size >= 0)
			errno = ECONNRESET;
		return -1;
	}
	for (control = CMSG_FIRSTHDR(&message); control; control = CMSG_NXTHDR(&message, control))
		if (control->cmsg_level == SOL_SOCKET && control->cmsg_type == SCM_RIGHTS && got)
			memcpy(got, CMSG_DATA(control), control->cmsg_len - CMSG_LEN(0));
	if (answer.error) {
		errno = answer.error;
		return -1;
	}
	return answer.value;
}

#endif
