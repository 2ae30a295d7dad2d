"""What a training step will take, before it is run: parameters, arithmetic, memory, traffic between ranks, and time."""
