"""What the labs stand on: their instruments, and the checks, hints and solutions of their exercises."""
