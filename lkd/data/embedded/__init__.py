"""The data and the teacher that the package carries: a class-balanced part of Fashion-MNIST (see SOURCE.md)."""

from pathlib import Path

FOLDER = Path(__file__).parent
ARCHIVE = FOLDER / "fashion_mnist.npz"
TEACHER = FOLDER / "teacher.safetensors"
