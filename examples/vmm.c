/* A VMM in C, whose KVM is `kvmsim serve`: it never has guest memory, but answers what the guest asks for.
 *
 *     cc -O2 -Wall -o vmm examples/vmm.c
 *     kvmsim serve --socket /tmp/kvm.sock &
 *     ./vmm /tmp/kvm.sock /mnt/guest
 *
 * It makes two files on a memfs, of which the private one is guest-sealed, lays a memslot on them, and runs a vCPU: a
 * guest that stores to private memory, hands a page to the host, and takes it back. Each KVM_EXIT_MEMORY_ERROR is
 * answered by converting the page: punch a hole on one side, allocate on the other. So that it runs where there is no
 * /dev/kvm, the vCPU makes accesses that are listed here, and runs no code.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/xattr.h>

#include "kvmsim.h"

#define SIZE (1UL << 20)
#define PAGE 4096UL

struct guest {
	int vm, vcpu, shared, private;
	struct kvm_run *run;
	uint64_t shared_bit;
};

static void check(int64_t result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "vmm: %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static int make_file(const char *directory, const char *name, int is_private)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	unlink(path);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	check(fd, path);
	if (is_private) { /* the seal, while nobody has it open: from now on nobody reads, writes or maps it */
		close(fd);
		check(setxattr(path, "user.memfs.seals", "guest", 5, 0), "seal");
		fd = open(path, O_RDWR | O_CLOEXEC);
		check(fd, path);
	}
	check(ftruncate(fd, SIZE), "ftruncate");
	return fd;
}

static void create(struct guest *guest, int kvm, const char *directory)
{
	struct kvm_userspace_memory_region_ext slot = {.region = {.slot = 0, .flags = KVM_MEM_FD, .memory_size = SIZE}};
	int got[2], files[2];

	check(kvmsim_ioctl(kvm, KVM_CREATE_VM, 0, NULL, 0, NULL, 0, NULL, 0, got), "KVM_CREATE_VM");
	guest->vm = got[0];
	slot.fd = files[0] = guest->shared = make_file(directory, "shared", 0);
	slot.private_fd = files[1] = guest->private = make_file(directory, "private", 1);
	check(kvmsim_ioctl(guest->vm, KVM_SET_USER_MEMORY_REGION, 0, &slot, sizeof(slot), NULL, 0, files, 2, NULL),
	      "KVM_SET_USER_MEMORY_REGION");
	check(kvmsim_ioctl(guest->vm, KVM_CREATE_VCPU, 0, NULL, 0, NULL, 0, NULL, 0, got), "KVM_CREATE_VCPU");
	guest->vcpu = got[0];
	guest->run = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, got[1], 0);
	check(guest->run == MAP_FAILED ? -1 : 0, "mmap of struct kvm_run");
	close(got[1]);
	guest->shared_bit = 1UL << kvmsim_ioctl(guest->vm, KVMSIM_SHARED_BIT, 0, NULL, 0, NULL, 0, NULL, 0, NULL);
}

static void convert(struct guest *guest, const struct kvm_memory_error *wanted)
{
	int to_private = wanted->type == KVM_EXIT_MEM_MAP_PRIVATE;
	int from = to_private ? guest->shared : guest->private, to = to_private ? guest->private : guest->shared;

	printf("the guest wants %" PRIu64 " bytes at gpa %#" PRIx64 " %s\n", (uint64_t)wanted->size, (uint64_t)wanted->gpa,
	       to_private ? "private" : "shared");
	check(fallocate(from, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, wanted->gpa, wanted->size), "punch");
	check(fallocate(to, 0, wanted->gpa, wanted->size), "fallocate");
}

static void run(struct guest *guest)
{
	for (;;) {
		check(kvmsim_ioctl(guest->vcpu, KVM_RUN, 0, NULL, 0, NULL, 0, NULL, 0, NULL), "KVM_RUN");
		switch (guest->run->exit_reason) {
		case KVM_EXIT_MEMORY_ERROR:
			convert(guest, (struct kvm_memory_error *)&guest->run->hw);
			break;
		case KVM_EXIT_MMIO:
			printf("the guest %s a device at gpa %#" PRIx64 "\n", guest->run->mmio.is_write ? "stores to" : "loads from",
			       (uint64_t)guest->run->mmio.phys_addr);
			memset(guest->run->mmio.data, 0x2a, sizeof(guest->run->mmio.data));
			break;
		case KVM_EXIT_HLT:
			printf("the guest halts\n");
			return;
		default:
			fprintf(stderr, "vmm: an exit that nobody expected: %u\n", guest->run->exit_reason);
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	struct guest guest;
	char byte;
	int kvm;

	if (argc != 3) {
		fprintf(stderr, "usage: vmm SOCKET DIRECTORY\n");
		return 2;
	}
	kvm = kvmsim_open(argv[1]);
	check(kvm, argv[1]);
	create(&guest, kvm, argv[2]);

	const uint64_t shared = guest.shared_bit;
	const struct kvmsim_access program[] = {
		{0x3000, KVMSIM_STORE, 8, 0x5ec2e7},	   /* private: a secret */
		{0x3000, KVMSIM_LOAD, 8, 0},
		{0x3000 | shared, KVMSIM_LOAD, 8, 0},	   /* the page is given to the host, empty */
		{0x3000 | shared, KVMSIM_STORE, 1, '!'},
		{SIZE, KVMSIM_LOAD, 1, 0},		   /* where there is no memory */
		{0x3000, KVMSIM_LOAD, 8, 0},		   /* and taken back, empty again */
	};
	uint64_t values[4] = {0};

	check(kvmsim_ioctl(guest.vcpu, KVMSIM_SET_ACCESSES, 0, program, sizeof(program), NULL, 0, NULL, 0, NULL), "accesses");
	run(&guest);
	check(kvmsim_ioctl(guest.vcpu, KVMSIM_GET_VALUES, 0, NULL, 0, values, sizeof(values), NULL, 0, NULL), "values");
	printf("it loaded %#" PRIx64 ", then %#" PRIx64 ", %#" PRIx64 " and %#" PRIx64 "\n", values[0], values[1], values[2],
	       values[3]);
	if (pread(guest.private, &byte, 1, 0x3000) < 0)
		printf("what is private, its VMM cannot read: %s\n", strerror(errno));
	return 0;
}
