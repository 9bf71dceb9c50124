/*
 * Stands in for two functions of libc in a process that simulates one seed: getrandom and clock_gettime.
 *
 * Hash maps, tokio's choice between branches that are ready, nonces and election timeouts all begin at the operating
 * system's randomness. With REGENT_SIMULATION_RANDOM set it is a sequence that this number begins, so that the same
 * seed gives the same run. Who reads the wall clock of the real world then (the Date header of HTTP does) finds it
 * standing still: the clocks of the simulated machines are elsewhere. Without the variable nothing changes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static uint64_t drawn;

/* SplitMix64 (Steele, Lea, Flood, 2014). */
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

ssize_t getrandom(void *buffer, size_t length, unsigned int flags) {
    const char *seed = getenv("REGENT_SIMULATION_RANDOM");
    if (seed == NULL) {
        return syscall(SYS_getrandom, buffer, length, flags);
    }
    uint64_t begin = strtoull(seed, NULL, 10);
    unsigned char *out = buffer;
    for (size_t done = 0; done < length;) {
        uint64_t number = __atomic_add_fetch(&drawn, 1, __ATOMIC_RELAXED);
        uint64_t word = mix(mix(begin) + number * 0x9e3779b97f4a7c15ULL);
        size_t part = length - done < sizeof word ? length - done : sizeof word;
        memcpy(out + done, &word, part);
        done += part;
    }
    return (ssize_t)length;
}

typedef int (*clock_function)(clockid_t, struct timespec *);

int clock_gettime(clockid_t clock, struct timespec *now) {
    /* libc's own needs no system call, and it is asked for at every step of every machine. */
    static clock_function real;
    if (clock == CLOCK_REALTIME && getenv("REGENT_SIMULATION_RANDOM") != NULL) {
        now->tv_sec = 1735689600;
        now->tv_nsec = 0;
        return 0;
    }
    if (real == NULL) {
        real = (clock_function)dlsym(RTLD_NEXT, "clock_gettime");
    }
    return real == NULL ? (int)syscall(SYS_clock_gettime, clock, now) : real(clock, now);
}
