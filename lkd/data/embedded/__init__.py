"""The data and the teacher that the package carries: a class-balanced part of Fashion-MNIST (see SOURCE.md)."""

from pathlib import Path

ARCHIVE = Path(__file__).with_name("fashion_mnist.npz")
ARCHIVE_HASH = "ba62dd753c3679f0c3ae7b7874cee8b4d2a7d0c3be817504bf0aa633ac886162"  # sha256
TEACHER = Path(__file__).with_name("teacher.safetensors")
