"""The durable store: sessions, their turns, and the generations that are running."""
