"""Longer at use than in training: what each mixer's positions and states do beyond the length they were trained on."""
