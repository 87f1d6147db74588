#!/bin/sh
# A queue of twenty customers: reads its parameters from queue.in, writes each customer's waiting time to waits.csv.
. ./queue.in
awk -v arrival="$arrival" -v service="$service" -v seed="$seed" 'BEGIN {
    srand(seed)
    now = 0; free = 0
    print "customer,wait"
    for (k = 1; k <= 20; k++) {
        now += -log(1 - rand()) / arrival
        begin = now > free ? now : free
        free = begin - log(1 - rand()) / service
        printf "%d,%.9g\n", k, begin - now
    }
}' > waits.csv
