"""A simulator that is a shell script with an input file and a .csv output: waiting times of twenty customers in a queue.

    sbiplat simulate simulators/programs/queue.py:queue --n 10000 --seed 1 --out queue.bank
"""

import sbiplat as sp

queue = sp.command_simulator(
    ["./queue.sh"],
    name="queue",
    prior=sp.Prior({"arrival": sp.LogUniform(0.2, 2.0, unit="1/min"), "service": sp.LogUniform(0.5, 5.0, unit="1/min")}),
    inputs={"queue.in": "arrival={arrival}\nservice={service}\nseed={seed}\n"},
    output="waits.csv",
    x_shape=(20, 2),
    x_labels=("customer", "wait"),
    summary="Waiting times of twenty customers, by a shell script.",
    time_limit=10,
)
