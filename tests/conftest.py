"""Settings of the whole suite."""

import os

# Tests run side by side: one thread each, and one in every process that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
