/* The benchmark's client: does one thing many times in a directory and prints how long that took, in nanoseconds.
 *
 *     client WORKLOAD DIRECTORY COUNT
 *
 * In C because a tmpfs reads 4 KiB in less time than Python needs for a call. What must be there before the clock starts
 * is made before it starts; what was made is removed after it stops. COUNT is operations, or bytes / 1 MiB for big ones.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L
#define MIB (1L << 20)
#define FILE_PAGES 8192L /* of the file that is read and written at random: 32 MiB */

static struct timespec started;
static char *buffer;

static void start(void) { clock_gettime(CLOCK_MONOTONIC, &started); }

static void stop(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	printf("%ld\n", (now.tv_sec - started.tv_sec) * 1000000000L + now.tv_nsec - started.tv_nsec);
}

static long check(long result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
	return result;
}

static long next_page(void) /* the same pseudo-random sequence on every filesystem */
{
	static uint64_t state = 88172645463325252ULL;
	state ^= state << 13, state ^= state >> 7, state ^= state << 17;
	return state % FILE_PAGES;
}

static int file(long bytes)
{
	int fd = check(open("f", O_CREAT | O_RDWR | O_TRUNC, 0600), "open");
	for (long at = 0; at < bytes; at += MIB)
		if (check(pwrite(fd, buffer, MIB, at), "pwrite") != MIB)
			errx(1, "short write");
	return fd;
}

/*
 * An empty file, when as much memory as it will get has just been freed. Virtual
 * machines tell their host which large pages have been free for some seconds
 * (free page reporting), and to get those back costs ten times the rest.
 */
static int empty_file(long bytes)
{
	int fd = file(bytes);
	check(ftruncate(fd, 0), "ftruncate");
	return fd;
}

static void touch(int fd, long bytes, int twice)
{
	char *area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED)
		err(1, "mmap");
	if (twice) {
		for (long at = 0; at < bytes; at += PAGE)
			area[at] = 1;
		munmap(area, bytes);
		area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	}
	start();
	for (long at = 0; at < bytes; at += PAGE)
		((volatile char *)area)[at] = 2;
	stop();
	munmap(area, bytes);
}

/* What was in one file is in the other then: RFC patch 13, and what kvmsim's VMM does. */
static void convert(int from, int to, long at, long size)
{
	check(fallocate(to, 0, at, size), "fallocate");
	check(fallocate(from, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, size), "punch");
}

/* The same in one call, for any number of ranges: memfs/contract/conversion.py. */
struct conversion {
	uint64_t key, attributes, flags;
	struct { uint64_t offset, length; } ranges[512];
};

#define MEMFS_IOC_GET_SEALS _IOR('M', 0x41, uint32_t)
#define MEMFS_IOC_GET_KEY _IOR('M', 0x42, uint64_t)

static void convert_once(int private, struct conversion *conversion, long ranges, int to_private)
{
	unsigned long size = offsetof(struct conversion, ranges) + ranges * sizeof conversion->ranges[0];
	conversion->attributes = to_private ? 1 << 3 : 0;
	check(ioctl(private, _IOC(_IOC_WRITE, 'M', 0x43, size), conversion), "convert");
}

static void make_files(long count)
{
	char name[32];
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "entry-%07ld", i);
		close(check(open(name, O_CREAT | O_WRONLY, 0600), name));
	}
}

static void remove_files(long count)
{
	char name[32];
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "entry-%07ld", i);
		unlink(name);
	}
}

int main(int argc, char **argv)
{
	struct stat status;
	if (argc != 4)
		errx(2, "usage: client WORKLOAD DIRECTORY COUNT");
	const char *what = argv[1];
	long count = atol(argv[3]);
	check(chdir(argv[2]), argv[2]);
	buffer = aligned_alloc(PAGE, MIB);
	memset(buffer, 'x', MIB);

	if (!strcmp(what, "pread")) {
		int fd = file(FILE_PAGES * PAGE);
		start();
		for (long i = 0; i < count; i++)
			check(pread(fd, buffer, PAGE, next_page() * PAGE), what);
		stop();
	} else if (!strcmp(what, "pwrite")) {
		int fd = file(FILE_PAGES * PAGE);
		start();
		for (long i = 0; i < count; i++)
			check(pwrite(fd, buffer, PAGE, next_page() * PAGE), what);
		stop();
	} else if (!strcmp(what, "read")) {
		int fd = file(count * MIB);
		start();
		for (long i = 0; i < count; i++)
			check(pread(fd, buffer, MIB, i * MIB), what);
		stop();
	} else if (!strcmp(what, "write")) {
		int fd = empty_file(count * MIB);
		start();
		for (long i = 0; i < count; i++)
			check(pwrite(fd, buffer, MIB, i * MIB), what);
		stop();
	} else if (!strcmp(what, "touch") || !strcmp(what, "retouch")) {
		int fd = empty_file(count * PAGE);
		check(ftruncate(fd, count * PAGE), "ftruncate");
		touch(fd, count * PAGE, what[0] == 'r');
	} else if (!strcmp(what, "fallocate")) {
		int fd = file(0);
		start();
		for (long i = 0; i < count; i++)
			check(fallocate(fd, 0, i * PAGE, PAGE), what);
		stop();
	} else if (!strcmp(what, "punch")) {
		int fd = file(0);
		check(fallocate(fd, 0, 0, count * PAGE), "fallocate");
		start();
		for (long i = 0; i < count; i++)
			check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, i * PAGE, PAGE), what);
		stop();
	} else if (!strcmp(what, "fallocate-big")) {
		int fd = empty_file(count * MIB);
		start();
		check(fallocate(fd, 0, 0, count * MIB), what);
		stop();
	} else if (!strcmp(what, "punch-big")) {
		int fd = file(0);
		check(fallocate(fd, 0, 0, count * MIB), "fallocate");
		start();
		check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, count * MIB), what);
		stop();
	} else if (!strcmp(what, "stat")) {
		file(MIB);
		start();
		for (long i = 0; i < count; i++)
			check(stat("f", &status), what);
		stop();
	} else if (!strcmp(what, "create-unlink") || !strcmp(what, "create-stat-unlink")) {
		int with_stat = strlen(what) > strlen("create-unlink");
		start();
		for (long i = 0; i < count; i++) {
			close(check(open("new", O_CREAT | O_EXCL | O_WRONLY, 0600), what));
			if (with_stat)
				check(stat("new", &status), what);
			check(unlink("new"), what);
		}
		stop();
	} else if (!strcmp(what, "readdir")) {
		long seen = 0;
		make_files(count);
		start();
		DIR *directory = opendir(".");
		for (struct dirent *entry; (entry = readdir(directory));)
			seen += entry->d_name[0] != '.';
		closedir(directory);
		stop();
		if (seen != count)
			errx(1, "%ld entries seen", seen);
		remove_files(count);
	} else if (!strncmp(what, "convert:", 8)) { /* convert:PAGES, so many at a time, there and back */
		int shared = check(open("shared", O_RDWR), "shared"), private = check(open("private", O_RDWR), "private");
		long size = atol(what + 8) * PAGE;
		start();
		for (long i = 0; i < count; i++) {
			long at = size < MIB ? i % 64 * size : 0;
			convert(shared, private, at, size);
			convert(private, shared, at, size);
		}
		stop();
	} else if (!strncmp(what, "convert-once:", 13)) { /* convert-once:PAGES, likewise, in one call */
		int shared = check(open("shared", O_RDWR), "shared"), private = check(open("private", O_RDWR), "private");
		long size = atol(what + 13) * PAGE;
		struct conversion conversion = {0};
		check(ioctl(shared, MEMFS_IOC_GET_KEY, &conversion.key), "key");
		start();
		for (long i = 0; i < count; i++) {
			conversion.ranges[0].offset = size < MIB ? i % 64 * size : 0;
			conversion.ranges[0].length = size;
			convert_once(private, &conversion, 1, 1);
			convert_once(private, &conversion, 1, 0);
		}
		stop();
	} else if (!strcmp(what, "scattered") || !strcmp(what, "scattered-once")) { /* 512 pages, there and back */
		int shared = check(open("shared", O_RDWR), "shared"), private = check(open("private", O_RDWR), "private");
		struct conversion conversion = {0};
		int once = strlen(what) > strlen("scattered");
		if (once)
			check(ioctl(shared, MEMFS_IOC_GET_KEY, &conversion.key), "key");
		for (long i = 0; i < 512; i++) {
			conversion.ranges[i].offset = 2 * i * PAGE;
			conversion.ranges[i].length = PAGE;
		}
		start();
		for (long i = 0; i < count; i++)
			for (int to_private = 1; to_private >= 0; to_private--)
				if (once)
					convert_once(private, &conversion, 512, to_private);
				else
					for (long page = 0; page < 512; page++)
						convert(to_private ? shared : private, to_private ? private : shared, 2 * page * PAGE, PAGE);
		stop();
	} else if (!strcmp(what, "ask")) { /* a call whose answer takes no work */
		int fd = file(0);
		uint32_t seals;
		start();
		for (long i = 0; i < count; i++)
			check(ioctl(fd, MEMFS_IOC_GET_SEALS, &seals), what);
		stop();
	} else if (!strcmp(what, "populate")) { /* files that stay, for the memory row */
		start();
		make_files(count);
		stop();
		return 0;
	} else
		errx(2, "no workload %s", what);
	unlink("f");
	return 0;
}
