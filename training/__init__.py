"""What train.py, predict.py, make_graph.py and bench.py share. Imported before torch."""

import os

# Let idle OpenMP threads sleep: beside other processes, spinning makes a step much slower.
# The OpenMP library reads this when torch loads it.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
