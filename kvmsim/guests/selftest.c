/* A guest of native code that tests kvmsim's memory: what it does is said by a letter in rsi when it starts.
 *
 * It runs without a kernel below it, at CPL 3 (kvmsim/engines/user_mode.py). Virtual addresses from 0 on are private
 * memory, from SHARED on shared memory, so each page can be touched on either side, which converts it. It says how it
 * went by the exit code, and in rbx and rcx of its last `out`. `make guest` builds it anew; the binary is in the
 * repository, for machines without a compiler.
 */

typedef unsigned char u8;
typedef unsigned long u64;

#define PAGE 4096UL
#define SHARED (1UL << 40)
#define AREA 0x800000UL /* pages from here on are for the tests; the program lies below */
#define MAX_PAGES 2048  /* of the area that chaos keeps account of */
#define WORDS 8         /* in each page */

#define PORT_HYPERCALL 0x4b
#define PORT_HALT 0xf4
#define PORT_CONSOLE 0x3f8
#define MAP_GPA_RANGE 12
#define ENCRYPTED (1 << 4)

enum side { SHARED_SIDE, PRIVATE_SIDE };

static u64 hypercall(u64 nr, u64 a, u64 b, u64 c)
{
	u64 result = nr;

	__asm__ volatile("outb %%al, %1" : "+a"(result) : "i"(PORT_HYPERCALL), "b"(a), "c"(b), "d"(c) : "memory");
	return result;
}

static u64 convert(u64 gpa, u64 pages, enum side to)
{
	return hypercall(MAP_GPA_RANGE, gpa, pages, to == PRIVATE_SIDE ? ENCRYPTED : 0);
}

static void __attribute__((noreturn)) halt(u64 code, u64 b, u64 c)
{
	for (;;)
		__asm__ volatile("outb %%al, %0" ::"i"(PORT_HALT), "a"(code), "b"(b), "c"(c) : "memory");
}

static void say(const char *text)
{
	for (; *text; text++)
		__asm__ volatile("outb %%al, %%dx" ::"a"(*text), "d"(PORT_CONSOLE));
}

static volatile u64 *at(u64 gpa, enum side side)
{
	return (volatile u64 *)(gpa + (side == SHARED_SIDE ? SHARED : 0));
}

/* -- c: what a guest may rely on ----------------------------------------------------------------------------------- */

static u64 steps;

static void expect(u64 found, u64 wanted)
{
	steps++;
	if (found != wanted)
		halt(1, steps, found);
}

static void expect_empty(u64 gpa, enum side side)
{
	for (u64 offset = 0; offset < PAGE; offset += 8)
		if (*at(gpa + offset, side))
			halt(2, steps, gpa + offset);
	steps++;
}

static void check(void)
{
	const u64 a = AREA, b = AREA + PAGE;

	*at(a, SHARED_SIDE) = 0x1111; /* absent: allocated when it is touched */
	expect(*at(a, SHARED_SIDE), 0x1111);
	*at(a, PRIVATE_SIDE) = 0x2222; /* converted by touching it */
	expect(*at(a, PRIVATE_SIDE), 0x2222);
	*at(a, PRIVATE_SIDE) = 0;
	expect_empty(a, PRIVATE_SIDE); /* nothing of what was shared */
	*at(a + 8, PRIVATE_SIDE) = 0x3333;
	expect(convert(a, 1, SHARED_SIDE), 0);
	expect_empty(a, SHARED_SIDE); /* and nothing of what was private */
	expect(convert(a, 2, PRIVATE_SIDE), 0);
	expect_empty(a, PRIVATE_SIDE);
	*at(b, PRIVATE_SIDE) = 0x4444;
	expect(convert(a, 1, SHARED_SIDE), 0); /* its neighbour stays */
	expect(*at(b, PRIVATE_SIDE), 0x4444);
	expect(convert(b, 1, PRIVATE_SIDE), 0); /* it is: nothing happens */
	expect(*at(b, PRIVATE_SIDE), 0x4444);
	*at(b - 4, PRIVATE_SIDE) = 0x5555666677778888; /* across two pages, of which the first is converted */
	expect(*at(b - 4, PRIVATE_SIDE), 0x5555666677778888);
	expect(hypercall(99, 0, 0, 0), -1000UL);
	expect(convert(a + 1, 1, SHARED_SIDE), -22UL);
	expect(convert(1UL << 45, 1, SHARED_SIDE), -22UL);
	say("hello from native code\n");
	halt(0, steps, 0);
}

/* -- x: at random, with account of what must be where -------------------------------------------------------------- */

static u64 state;

static u64 random(u64 below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

static u64 words[MAX_PAGES][WORDS];
static u8 sides[MAX_PAGES];

static void forget(u64 page, enum side side)
{
	for (u64 word = 0; word < WORDS; word++)
		words[page][word] = 0;
	sides[page] = side;
}

/* The pages of a vCPU are those whose numbers leave its own as the rest. */
static void chaos(u64 vcpu, u64 vcpus, u64 pages, u64 count, u64 may_lose)
{
	u64 taken = 0, conversions = 0;

	while (count--) {
		u64 page = random(pages / vcpus) * vcpus + vcpu, word = random(WORDS), gpa = AREA + page * PAGE;
		volatile u64 *where;

		if (!random(32)) {
			enum side to = random(2);

			if (convert(gpa, 1, to))
				halt(3, page, to);
			if (sides[page] != to) {
				forget(page, to);
				conversions++;
			}
			continue;
		}
		if (!random(64)) { /* the access below converts it */
			forget(page, !sides[page]);
			conversions++;
		}
		where = at(gpa + word * (PAGE / WORDS), sides[page]);
		if (random(2)) {
			*where = words[page][word] = state | 1;
		} else {
			u64 found = *where;

			if (found == words[page][word])
				continue;
			if (found || !may_lose || sides[page] != PRIVATE_SIDE)
				halt(4, page, found);
			words[page][word] = 0;
			taken++;
		}
	}
	halt(0, taken, conversions);
}

/* -- the rest ------------------------------------------------------------------------------------------------------ */

/* s: spin for ever, with a counter in each of two places that must never differ by more than what is being stored. */
static void spin(void)
{
	volatile u64 *first = at(AREA, PRIVATE_SIDE), *second = at(AREA + PAGE, SHARED_SIDE);

	for (;;) {
		++*first;
		++*second;
	}
}

/* w: touch pages, `times` over, and say by how much a clock went on. */
static void sweep(u64 gpa, u64 pages, enum side side, u64 times)
{
	u64 sum = 0;

	while (times--)
		for (u64 page = 0; page < pages; page++)
			sum += ++*at(gpa + page * PAGE, side);
	halt(0, sum, 0);
}

/* p: fill pages, watch them, and say which the host has taken away. */
static void say_number(u64 number)
{
	char text[24], *at = text + sizeof(text);

	*--at = 0;
	do
		*--at = '0' + number % 10;
	while (number /= 10);
	say(at);
}

#define WATCHED 1024

static void watch(void)
{
	for (u64 page = 0; page < WATCHED; page++)
		*at(AREA + page * PAGE, PRIVATE_SIDE) = page + 1;
	say("watching pages 2048 to 3071 of my private memory\n");
	for (u64 first = 0;; first = (first + 1) % WATCHED) {
		u64 end = first;

		while (end < WATCHED && *at(AREA + end * PAGE, PRIVATE_SIDE) != end + 1)
			if (*at(AREA + end++ * PAGE, PRIVATE_SIDE))
				halt(4, end - 1, 0);
		if (end == first)
			continue;
		say("the host took pages ");
		say_number(AREA / PAGE + first);
		say("..");
		say_number(AREA / PAGE + end - 1);
		say("; they came back empty\n");
		halt(0, end - first, 0);
	}
}

/* m: code that stores into itself. */
static void modify(void)
{
	volatile u8 *code = (volatile u8 *)AREA;
	u64 sum = 0;

	for (u64 round = 1; round <= 3; round++) {
		code[0] = 0xb8; /* mov eax, round; ret */
		code[1] = round;
		code[2] = code[3] = code[4] = 0;
		code[5] = 0xc3;
		sum = sum * 10 + ((u64(*)(void))AREA)();
	}
	halt(0, sum, 0);
}

/* j: run what the VMM has put at AREA, each time it lets us. */
static void jump(u64 times)
{
	u64 sum = 0;

	while (times--) {
		sum = sum * 10 + ((u64(*)(void))AREA)();
		hypercall(98, sum, 0, 0);
	}
	halt(0, sum, 0);
}

static void ports(u64 count)
{
	while (count--)
		__asm__ volatile("outb %%al, $0x80" ::"a"(0));
	halt(0, 0, 0);
}

void __attribute__((noreturn, used)) guest_main(u64 vcpu, u64 what, u64 a, u64 b, u64 c, u64 d)
{
	switch (what) {
	case 'c':
		check();
		break;
	case 'x':
		state = d * 2654435761UL + vcpu + 1;
		chaos(vcpu, a, b, c, d >> 32);
		break;
	case 's':
		spin();
		break;
	case 'w':
		sweep(a, b, c, d);
		break;
	case 'p':
		watch();
		break;
	case 'm':
		modify();
		break;
	case 'j':
		jump(a);
		break;
	case 'o':
		ports(a);
		break;
	case 'u':
		__asm__ volatile("ud2");
		break;
	}
	halt(5, what, 0);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall guest_main\n");
