"""How far memories reach: recall by distance, of what carries a past from segment to segment beside the bare mixer inside, and a needle in a million tokens."""
