"""Athanor's workflows: the command line, the graph of steps, the engine under it, the stages and the training loop."""

import os

from pipelines.engine.backends.search_path import rooted

rooted()()  # in every process, before further imports
# Threads of a matrix product wait for each other at its end, by default spinning for milliseconds. With one other busy
# process on a two-core machine they spin away the time the late one needs: 15 products a second, against 70 when they
# sleep after a short spin. libgomp reads this once, when torch loads it, and child processes inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
