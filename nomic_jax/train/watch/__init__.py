"""What a run reports: metrics, progress, goodput, FLOPs, skipped steps, and the HLO of its step."""
