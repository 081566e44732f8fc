"""What every room may use: errors, files, tensor files, processes, outputs, random numbers, statistics."""
