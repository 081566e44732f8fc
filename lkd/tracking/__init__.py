"""What is written of a run: its directory, its record, W&B, lineage, the Hub."""
