"""Detectors: any of them can be a student, and a teacher."""
