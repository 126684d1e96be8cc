"""What bench and tune are made of: the work, timed runs, starts, bytes moved, and tests on ranks."""
