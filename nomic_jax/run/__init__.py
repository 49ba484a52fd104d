"""What a run leaves on disk: checkpoints, hashes, records, lineage. Training is above it."""
