"""Weight imprinting in PyTorch Lightning."""
