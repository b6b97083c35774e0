"""Doing it: the engine that maps, reads, converts and copies what a plan decided."""
