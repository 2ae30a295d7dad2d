"""How far training reaches: one exact step on a million tokens and more."""
