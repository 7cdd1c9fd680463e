"""Real texts, models and trainings that the demo and the benchmarks share; neither of the two imports the other."""
