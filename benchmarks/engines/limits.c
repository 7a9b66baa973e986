// Threads -> GB/s that they read from memory, and int8 operations per second of registers alone, the best of 12; one
// JSON line. Limits, not averages: what else runs on the machine must not lower them.
// cc -O3 -march=native -pthread limits.c -o limits && ./limits THREADS
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

enum { BYTES = 1 << 30, REPEATS = 12, ROUNDS = 20000000, CHAINS = 16, MOST_THREADS = 64 };

static uint64_t *memory;
static int threads;
static pthread_barrier_t together;
static volatile uint64_t sink;
static double operations;  // of one thread's register loop

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static uint64_t sum(const uint64_t *from, size_t count) {
    uint64_t total[8] = {0};
    for (size_t at = 0; at < count; at += 8)
        for (int lane = 0; lane < 8; ++lane) total[lane] += from[at + lane];
    uint64_t all = 0;
    for (int lane = 0; lane < 8; ++lane) all += total[lane];
    return all;
}

static void multiply(void) {
#if defined(__AVX512VNNI__)
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5), chains[CHAINS];
    for (int c = 0; c < CHAINS; ++c) chains[c] = _mm512_setzero_si512();
    for (int round = 0; round < ROUNDS / CHAINS; ++round)
        for (int c = 0; c < CHAINS; ++c) chains[c] = _mm512_dpbusd_epi32(chains[c], a, b);
    for (int c = 0; c < CHAINS; ++c) sink += (uint64_t)_mm512_reduce_add_epi32(chains[c]);
    operations = 128.0 * (ROUNDS / CHAINS) * CHAINS;
#elif defined(__ARM_FEATURE_DOTPROD)
    int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
    int32x4_t chains[CHAINS];
    for (int c = 0; c < CHAINS; ++c) chains[c] = vdupq_n_s32(0);
    for (int round = 0; round < ROUNDS / CHAINS; ++round)
        for (int c = 0; c < CHAINS; ++c) chains[c] = vdotq_s32(chains[c], a, b);
    for (int c = 0; c < CHAINS; ++c) sink += (uint64_t)vaddvq_s32(chains[c]);
    operations = 32.0 * (ROUNDS / CHAINS) * CHAINS;
#endif
}

static double started, read_s[REPEATS], multiply_s[REPEATS];

static void *work(void *argument) {
    size_t me = (size_t)argument, share = BYTES / sizeof(uint64_t) / threads / 8 * 8;
    for (int kind = 0; kind < 2; ++kind)
        for (int repeat = 0; repeat < REPEATS; ++repeat) {
            pthread_barrier_wait(&together);
            if (me == 0) started = now();
            pthread_barrier_wait(&together);
            if (kind == 0) sink += sum(memory + me * share, share);
            else multiply();
            pthread_barrier_wait(&together);
            if (me == 0) (kind ? multiply_s : read_s)[repeat] = now() - started;
        }
    return NULL;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words) {
    threads = count > 1 ? atoi(words[1]) : 1;
    if (threads < 1 || threads > MOST_THREADS) return 2;
    memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 1;
    madvise(memory, BYTES, MADV_HUGEPAGE);
    memset(memory, 1, BYTES);
    pthread_t all[MOST_THREADS];
    pthread_barrier_init(&together, NULL, threads);
    for (size_t t = 0; t < (size_t)threads; ++t) pthread_create(&all[t], NULL, work, (void *)t);
    for (int t = 0; t < threads; ++t) pthread_join(all[t], NULL);
    qsort(read_s, REPEATS, sizeof(double), ascending);
    qsort(multiply_s, REPEATS, sizeof(double), ascending);
    printf("{\"threads\": %d, \"read_gb_per_s\": %.2f, \"int8_tops\": %.3f}\n", threads,
           BYTES / read_s[0] / 1e9, threads * operations / multiply_s[0] / 1e12);
    return 0;
}
