"""Where things lie that several test files read."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
ACCEPTANCE = SHARED / "acceptance" / "fashion_mnist_efficientnet_lite0.safetensors"
