/* What exec_rows.py runs twice, natively and as a guest: fill memory with numbers, sort it, and say how long that took.
 *
 * Heap sort, since it goes through all of its memory again and again. The time includes the first touch of each page.
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static void sift(uint32_t *words, size_t top, size_t count)
{
	uint32_t moved = words[top];

	for (size_t child; (child = 2 * top + 1) < count; top = child) {
		if (child + 1 < count && words[child + 1] > words[child])
			child++;
		if (words[child] <= moved)
			break;
		words[top] = words[child];
	}
	words[top] = moved;
}

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	size_t count = argc > 1 ? strtoul(argv[1], NULL, 0) / sizeof(uint32_t) : 0;
	double started = now();
	uint32_t *words = malloc(count * sizeof(uint32_t)), state = 1;

	if (!words || !count)
		return 1;
	for (size_t i = 0; i < count; i++)
		words[i] = state = state * 1664525 + 1013904223;
	for (size_t i = count / 2; i--;)
		sift(words, i, count);
	for (size_t end = count; --end;) {
		uint32_t largest = words[0];

		words[0] = words[end];
		words[end] = largest;
		sift(words, 0, end);
	}
	for (size_t i = 1; i < count; i++)
		if (words[i - 1] > words[i])
			return 2;
	printf("%.6f\n", now() - started);
	return 0;
}
