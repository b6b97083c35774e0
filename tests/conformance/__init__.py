"""Conformance of deferred construction: what it builds is what ordinary construction builds."""
