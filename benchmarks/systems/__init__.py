"""The systems that `peers.py` compares, one file each; each is opened in a process of its own (`worker.py`)."""
