"""The parts of ``multi_gpu.py``: who is measured, in which processes, and what tables come of it."""
