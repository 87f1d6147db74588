"""A simulator that is a compiled C program: a random walk with drift, absorbed at zero. Compile `walk.c` first.

    cc -O2 -o simulators/programs/walk simulators/programs/walk.c -lm
    sbiplat simulate simulators/programs/walk.py:walk --n 10000 --seed 1 --out walk.bank
"""

import sbiplat as sp

walk = sp.command_simulator(
    ["./walk", "{drift}", "{start}", "{seed}"],
    name="walk",
    prior=sp.Prior({"drift": sp.Uniform(-2.0, -0.1), "start": sp.Uniform(1.0, 20.0)}),
    x_shape=(2,),
    output="stdout",
    x_labels=("steps", "highest"),
    x_transform="log",
    summary="When a random walk with drift is absorbed at zero, and how high it came.",
    time_limit=10,
)
