"""Detectors, each of which can be a student or a teacher."""
