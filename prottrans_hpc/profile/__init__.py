"""Measuring and studying: scaling, memory, communication, and the models fitted to what was measured."""
