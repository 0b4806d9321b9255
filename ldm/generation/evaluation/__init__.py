"""Samples or images of any origin, measured beside real ones by a protocol that travels with the figures."""
