/* A random walk with drift that is absorbed at zero: prints when it was absorbed and how far it had come.
 *
 *     cc -O2 -o walk walk.c -lm
 *     ./walk DRIFT START SEED
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t state;

/* splitmix64: all randomness comes from SEED */
static double uniform(void) {
    uint64_t z = (state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return ((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

static double normal(void) {
    return sqrt(-2.0 * log(1.0 - uniform())) * cos(6.283185307179586 * uniform());
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: walk DRIFT START SEED\n");
        return 2;
    }
    double drift = atof(argv[1]), position = atof(argv[2]), highest = position;
    state = strtoull(argv[3], NULL, 10);
    int step = 0;
    for (; step < 10000 && position > 0.0; step++) {
        position += drift + normal();
        if (position > highest) highest = position;
    }
    printf("steps highest\n%d %.17g\n", step, highest);
    return 0;
}
