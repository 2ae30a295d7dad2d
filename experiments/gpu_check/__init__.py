"""Whether every op, backend and mixer computes on a GPU what it computes on a CPU, and how fast."""
