"""Our mixers against other people's modules of the same mechanism: time and peak memory of forward and backward."""
