"""The parts of the paper's figure, a file a method."""
