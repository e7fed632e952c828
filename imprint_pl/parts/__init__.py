"""The parts of the paper's figure, one file for each method."""
