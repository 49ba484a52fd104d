"""Files of text other than jsonl, and how files of text are compressed."""
