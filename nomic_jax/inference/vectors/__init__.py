"""Files of vectors that ``launch.embed`` wrote: what they were made with, reading them, and taking them up again."""
