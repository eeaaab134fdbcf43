"""Measurements, and the demo image that they and `make run` use. Development only; never imported by clipfs."""
