"""Matplotlib figures of descents, of spectra and of trainings."""
